#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""torture 18: client and daemon of the protocol before ours, ours and the next; stores and files of other versions

pass: works, or one clear refusal that names both versions; what is refused is not touched
quick: the whole matrix
full: the same
plants: version-ignored store-version-ignored

Both sides exist in three builds (build/vN: the objects that say the protocol's number, compiled with another one). A pair of
one version works a client's whole cycle and compares every byte; any other pair ends in KVT_E_VERSION. Structs of the C ABI are
handed over by callers older and newer than the library: every `size` from none to far too large.
"""
import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from kvtier import ROWS_ALL, Client, Error, Model, Region, budget  # noqa: E402
from kvtier import _lib  # noqa: E402
from kvtier._lib import lib  # noqa: E402
from kvtier.daemon import build_dir  # noqa: E402
from lib import raw  # noqa: E402
from lib.disk import CONTAINER, SUPER_B, UNIT, crc32c  # noqa: E402
from lib.raw import HungUp, Raw, Refused  # noqa: E402
from lib.rows import LANES, Rows, cycle  # noqa: E402
from lib.world import E_INVAL, E_VERSION, Failed, Tap, World, equal, expect, matches, until  # noqa: E402

OURS = raw.VERSION
VERSIONS = (OURS - 1, OURS, OURS + 1)


class Any(World):
    """A daemon of any version: it is up when it listens, whatever it says to us."""

    def __init__(self, version, **sections):
        super().__init__(**sections)
        self.version = version
        if version != OURS:
            self.binary = str(build_dir() / f"v{version}" / "kvtierd")

    def start(self, wait_s=60):
        with open(self.log, "ab") as log:
            self.proc = subprocess.Popen([self.binary, "--config", self.config], stdout=log, stderr=log)

        def up():
            try:
                Raw(self.socket).close()
                return True
            except OSError:
                return False
        until("a daemon that listens", up, wait_s)
        return self

    __enter__ = start


# ---- the matrix ------------------------------------------------------------------------------


def client(socket):
    """This file as a client's program: one line says what came of it."""
    try:
        with Client(socket, timeout_ms=5000) as c:
            r = Rows(c, "pair")
            for _ in range(3):
                cycle(r)
            r.whole()
            r.close()
        print("works")
    except Error as e:
        print(f"refused {e.code} {e}")


def pair(mine, d):
    so = build_dir() / ("libkvtier.so.0" if mine == OURS else f"v{mine}/libkvtier.so.0")
    t = time.monotonic()
    p = subprocess.run([sys.executable, __file__, "--client", d.socket], env=dict(os.environ, KVTIER_LIB=str(so)),
                       capture_output=True, text=True, timeout=60, check=False)
    said = p.stdout.strip()
    if mine == d.version:
        equal(said, "works", f"client {mine}, daemon {d.version} ({p.stderr[-300:]})")
    else:
        matches(said, rf"^refused {E_VERSION} .*version: ({mine}, must be {d.version}|{d.version}, must be {mine})$",
                f"client {mine}, daemon {d.version}")
        expect(time.monotonic() - t < 5, "the refusal came at once")
    expect(d.alive(), "the daemon died")


def ctl(d):
    """kvtierctl of ours asks any daemon."""
    p = subprocess.run([str(build_dir() / "kvtierctl"), "--socket", d.admin, "status"], capture_output=True, text=True, check=False,
                       timeout=20)
    if d.version == OURS:
        equal(p.returncode, 0, f"exit status ({p.stderr})")
        return
    expect(p.returncode != 0, "it was answered")
    equal(p.stderr.count("\n"), 1, f"lines: {p.stderr!r}")
    matches(p.stderr, rf"version: {d.version}, must be {OURS}|version: {OURS}, must be {d.version}", "the line")


def reconnect(d):
    """A client lives through an upgrade to another protocol and back: VERSION meanwhile, then served again."""
    with Client(d.socket, timeout_ms=3000) as c:
        r = Rows(c, "before")
        r.append(50)
        d.kill()
        other = Any(d.version + 1)
        mine, other.run, other.config, other.log = other.run, d.run, d.config, d.log
        other.start()
        try:
            end = time.monotonic() + 20
            codes = set()
            while E_VERSION not in codes and time.monotonic() < end:
                try:
                    Region(c, 4096)
                    raise Failed("a daemon of another version served")
                except Error as e:
                    codes.add(e.code)
                time.sleep(0.05)
            expect(E_VERSION in codes, f"codes {codes}, VERSION must be among them")
            r.check()  # what it holds is its own
        finally:
            other.kill()
            for p in (mine, other.own_store):
                shutil.rmtree(p, ignore_errors=True)
        d.start()

        def again():
            try:
                Region(c, 4096).close()
                return True
            except Error:
                return False
        until("the library connects again", again, 20)
        fresh = Rows(c, "after")
        cycle(fresh)
        fresh.close()


# ---- hellos ------------------------------------------------------------------------------------


def hellos(d):
    """Every version of the header, whatever follows: one answer, and the connection may still speak ours."""
    for v in (0, OURS - 1, OURS + 1, 255, 65535):
        for body in (raw.hello(), raw.hello() + bytes(64), b"", bytes(3000)):
            for kind in (raw.HELLO, raw.MODEL, 99, 0x7FFF):
                with Raw(d.socket) as c:
                    try:
                        c.ask(kind, body, version=v)
                        raise Failed(f"version {v}, type {kind}: accepted")
                    except Refused as e:
                        equal((e.status, e.text), (E_VERSION, f"version: {v}, must be {OURS}"), "the refusal")
                    except HungUp:
                        raise Failed(f"version {v}, type {kind}: hung up without a word") from None
                    c.hello()
                    expect(c.well(), "not served in our version afterwards")


def features(d):
    """The daemon takes what both know; a client that knows less or more is served."""
    known = 0x7F
    for asked in (0, 1, 0x15, known, 0xFFFFFFFF, 0x80000000):
        with Raw(d.socket) as c:
            payload, fds = c.ask(raw.HELLO, raw.hello(features=asked))
            equal(struct.unpack_from("<I", payload)[0], asked & known, f"features of {asked:#x}")
            equal(len(fds), 4, "descriptors")
            expect(c.well(), "not served")


# ---- structs of other lengths ----------------------------------------------------------------------


class Sized:
    """A struct as callers of other headers have it: `size` bytes, known ones first, behind it bytes that nobody may touch."""

    GUARD = 64

    def __init__(self, s, size, fill=0):
        full = bytes(s)
        self.size, self.keep = size, s  # it owns what its pointers name
        self.buf = (ctypes.c_char * (max(size, 16) + self.GUARD))()
        head = full[:size]
        self.buf[:len(head)] = head
        for i in range(len(full), size):
            self.buf[i] = bytes([fill])
        for i in range(max(size, 16), len(self.buf)):
            self.buf[i] = b"\x5a"
        struct.pack_into("<Q", self.buf, 0, size)
        self.before = bytes(self.buf)

    def ptr(self, cls):
        p = ctypes.cast(self.buf, ctypes.POINTER(cls))
        p.keep = self
        return p

    def untouched(self, what):
        equal(bytes(self.buf[max(self.size, 16):]), self.before[max(self.size, 16):], f"{what}: bytes behind the struct")

    def tail(self, known):
        return bytes(self.buf[known:self.size])


def end_of(cls, field):
    f = getattr(cls, field)
    return f.offset + f.size


def taken(name, cls, make, call, least):
    """An options struct: every size from nothing to 5,000. least: its last field that this call needs."""
    known, enough = ctypes.sizeof(cls), end_of(cls, least)
    for size in (0, 1, 7, 8, 4097, 5000, 2**63, 2**64 - 1):
        s = Sized(make(), min(size, 5000))
        struct.pack_into("<Q", s.buf, 0, size)
        rc, line = call(s.ptr(cls))
        equal(rc, E_INVAL, f"{name} of size {size}: {line}")
        matches(line, rf"size: {size}, must be sizeof the struct \({known} here\)", f"{name} of size {size}")
    for size in range(enough, known + 1):
        rc, line = call(Sized(make(), size).ptr(cls))
        expect(rc >= 0, f"{name} of {size} bytes, an older caller's: {rc} {line}")
    for size in (known + 1, known + 8, known + 200, 4096):
        rc, line = call(Sized(make(), size).ptr(cls))
        expect(rc >= 0, f"{name} of {size} bytes, a newer caller's with zeros: {rc} {line}")
        rc, line = call(Sized(make(), size, fill=1).ptr(cls))
        equal(rc, E_INVAL, f"{name} of {size} bytes, with a field that nobody here knows: {line}")
        matches(line, rf"byte {known} is set, this library knows {known} bytes", name)


def given(name, cls, call, make=None):
    """A result struct: never a byte more than it has; what the library does not know stays."""
    known = ctypes.sizeof(cls)
    make = make or cls
    for size in (0, 8, 4097, 2**64 - 1):
        s = Sized(make(), min(size, 5000))
        struct.pack_into("<Q", s.buf, 0, size)
        rc, line = call(s.ptr(cls))
        equal(rc, E_INVAL, f"{name} of size {size}: {line}")
        s.untouched(name)
    for size in list(range(16, known + 1)) + [known + 1, known + 64, 4096]:
        s = Sized(make(), size, fill=0x33)
        rc, line = call(s.ptr(cls))
        expect(rc >= 0, f"{name} of {size} bytes: {rc} {line}")
        s.untouched(name)
        equal(s.tail(known), b"\x33" * max(0, size - known), f"{name}: bytes that this library does not know")
        equal(struct.unpack_from("<Q", s.buf)[0], size, f"{name}.size")


def line_of(rc):
    return rc, lib.last_error().decode()


def structs(d):
    L = _lib

    def opened(fn, close):
        def call(p):
            out = ctypes.c_void_p()
            rc = line_of(fn(p, ctypes.byref(out)))
            if rc[0] == 0 and out.value:
                close(out)
            return rc
        return call

    taken("open_opts", L.OpenOpts, lambda: L.sized(L.OpenOpts, socket=d.socket.encode(), timeout_ms=5000),
          opened(lib.open, lib.close), "timeout_ms")
    with Client(d.socket, timeout_ms=10000) as c, tempfile.TemporaryDirectory(prefix="kvt.") as tmp:
        r = Rows(c, "structs")
        r.append(300)
        layers = (L.LayerDesc * 2)(*[L.LayerDesc(kv_heads=2, k_bytes=64, v_bytes=64)] * 2)
        taken("model_desc", L.ModelDesc,
              lambda: L.sized(L.ModelDesc, name=b"pattern", layers=layers, n_layers=2, dtype=1, head_dim=16, world=1),
              opened(lambda p, out: lib.model_register(c.ptr, p, out), lib.model_release), "world")
        given("stats", L.Stats, lambda p: line_of(lib.stats(c.ptr, p)))
        given("seq_info", L.SeqInfo, lambda p: line_of(lib.seq_info(r.seq.ptr, p)))
        budgets(r)
        plans(r)
        sequences(c, r)
        recalls(r)
        traces(tmp, opened)
        r.whole()
        r.close()


def budgets(r):
    def ask(p):
        ident = ctypes.c_uint64()
        rc = line_of(lib.plan_request(r.seq.ptr, p, ctypes.byref(ident)))
        if rc[0] == 0:
            r.seq.apply(r.wait(ident.value))
        return rc
    taken("budget", _lib.Budget, lambda: budget(200, ROWS_ALL, 0, manual=True), ask, "manual")


def plans(r):
    L = _lib
    ident = r.seq.request(budget(100, ROWS_ALL, 0, manual=True))
    given("plan", L.Plan, lambda p: line_of(lib.plan_wait(r.seq.ptr, ident, L.PLAN_READY, 10000, p)))
    full = r.wait(ident)
    for size in range(16, ctypes.sizeof(L.Plan) + 1):
        s = Sized(full, size)
        rc, line = line_of(lib.plan_kept(s.ptr(L.Plan), 0, None, 0))
        if size >= end_of(L.Plan, "resident_after"):
            equal(rc, 100, f"kept rows by a plan of {size} bytes ({line})")
        else:
            equal(rc, E_INVAL, f"kept rows by a plan of {size} bytes ({line})")
            matches(line, rf"plan.size: {size}, must be at least", "the line")
        rc, line = line_of(lib.plan_promoted(s.ptr(L.Plan), 0, None, 0))
        equal(rc, 0 if size == ctypes.sizeof(L.Plan) else E_INVAL, f"promoted rows by a plan of {size} bytes ({line})")
    r.seq.apply(full)


def sequences(c, r):
    def options():
        o = _lib.sized(_lib.SeqOpts, max_rows=4096, region=region.ptr, layouts=r.layouts)
        return o
    model, region = r.model, Region(c, r.region.nbytes)

    def open_one(p):
        out = ctypes.c_void_p()
        rc = line_of(lib.seq_open(c.ptr, model.ptr, p, ctypes.byref(out)))
        if rc[0] == 0:
            lib.seq_close(out)
        return rc
    taken("seq_opts", _lib.SeqOpts, options, open_one, "layouts")

    def fork_one(p):
        out = ctypes.c_void_p()
        rc = line_of(lib.seq_fork(r.seq.ptr, 10, p, ctypes.byref(out)))
        if rc[0] == 0:
            lib.seq_close(out)
        return rc
    taken("seq_opts of a fork", _lib.SeqOpts, options, fork_one, "layouts")
    region.close()


def recalls(r):
    L = _lib
    lay = r.layouts[0]
    q = (ctypes.c_float * 32)(*[1.0] * 32)
    counts, positions = (ctypes.c_uint32 * 2)(), (ctypes.c_uint32 * 64)()

    def options():
        return L.sized(L.RecallOpts, group=1, dtype=1, rows=16, window_rows=32, k_off=lay.k_off + r.cap * 64,
                       v_off=lay.v_off + r.cap * 64, k_head_stride=lay.k_head_stride, v_head_stride=lay.v_head_stride,
                       k_row_stride=64, v_row_stride=64)

    def ask(p, ret=None):
        ret = ret or ctypes.pointer(L.sized(L.Recalled, counts=counts, positions=positions))
        return line_of(lib.seq_recall(r.seq.ptr, 0, q, 1, p, ret))
    taken("recall_opts", L.RecallOpts, options, ask, "v_row_stride")
    given("recalled", L.Recalled, lambda p: ask(ctypes.pointer(options()), p),
          lambda: L.sized(L.Recalled, counts=counts, positions=positions))
    r.seq.recall_end()


def traces(tmp, opened):
    L = _lib
    taken("trace_opts", L.TraceOpts, lambda: L.sized(L.TraceOpts, dir=tmp.encode()), opened(lib.trace_open, lib.trace_close), "dir")
    t, s = ctypes.c_void_p(), ctypes.c_void_p()
    opts = L.sized(L.TraceOpts, dir=tmp.encode())
    equal(lib.trace_open(ctypes.byref(opts), ctypes.byref(t)), 0, "trace_open")
    given("trace_stats", L.TraceStats, lambda p: line_of(lib.trace_stats(t, p)))

    def model():
        return L.sized(L.TraceModel, name=b"pattern", layers=1, heads=1, group=1, k_dim=4, v_dim=4, dtype=1)
    taken("trace_model", L.TraceModel, model, opened(lambda p, out: lib.trace_begin(t, p, None, out), lib.trace_discard), "dtype")
    rows = (ctypes.c_float * 64)()
    at = ctypes.addressof(rows)

    def span(p):
        m = model()
        equal(lib.trace_begin(t, ctypes.byref(m), None, ctypes.byref(s)), 0, "trace_begin")
        rc = line_of(lib.trace_rows(s, p))
        lib.trace_discard(s)
        return rc
    taken("trace_span", L.TraceSpan, lambda: L.sized(L.TraceSpan, n=2, k=at, v=at, q=at, k_row=16, v_row=16, q_row=16), span, "q_row")
    lib.trace_close(t)


# ---- files -----------------------------------------------------------------------------------------


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def stamp(path, at, version):
    """Another version in the unit at this place, its checksum right."""
    with open(path, "r+b") as f:
        f.seek(at)
        unit = bytearray(f.read(UNIT))
        struct.pack_into("<II", unit, 8, version, 0)
        struct.pack_into("<I", unit, 12, crc32c(bytes(unit)))
        f.seek(at)
        f.write(unit)


def stores(d, where):
    """Refused by one line, in whichever superblock it stands, and not one byte is changed. Then it is as good as before."""
    store, beside = os.path.join(d.store, CONTAINER), sorted(os.listdir(d.store))
    good = Path(store).read_bytes()
    for version in (0, 2, 3, 2**32 - 1):
        for at in where:
            stamp(store, at, version)
        before, mtime = sha(store), os.stat(store).st_mtime_ns
        d.refuses_to_start(rf"{CONTAINER}: version {version}, this daemon knows 1$")
        equal(sha(store), before, f"the store of version {version}, after it was refused")
        equal(os.stat(store).st_mtime_ns, mtime, "when it was written last")
        equal(sorted(os.listdir(d.store)), beside, "files beside it")
        with open(store, "r+b") as f:
            f.write(good[:1 << 20])


def kept(d):
    """What was there before all of this is there still."""
    d.start()
    with Client(d.socket, timeout_ms=10000) as c:
        r = Rows(c, "old", resume=True, leased=True, key=b"k" * 16, secret=b"s" * 32, equal_lanes=False)
        r.gens = [0] * r.seq.rows
        equal(r.rows, 400, "rows")
        r.whole()
        r.close(drop=True)


def fill(d):
    d.start()
    with Client(d.socket, timeout_ms=10000) as c:
        r = Rows(c, "old", leased=True, key=b"k" * 16, secret=b"s" * 32, equal_lanes=False)
        r.append(400)
        r.plan(device=50, nvme=ROWS_ALL)
        r.close()
    d.stop()


def tool(argv, pattern):
    p = subprocess.run([str(build_dir() / argv[0])] + argv[1:], capture_output=True, text=True, timeout=30, check=False)
    equal((p.returncode, p.stderr.count("\n")), (1, 1), f"{' '.join(argv)}: {p.stderr!r}")
    matches(p.stderr, pattern, argv[0])


def files(d):
    """Weight files and traces of other versions: one line, and the file as it was."""
    top = Path(d.run)
    weights, traces_dir = top / "w.kvp", top / "traces"
    subprocess.run([str(build_dir() / "kvtier-weights"), "random", "--layers", "1", "--heads", "2", "--dim", "16", "--model", "m", "--net",
                    "narrow", "-o", str(weights)], check=True)
    traces_dir.mkdir()
    subprocess.run([str(build_dir() / "tests" / "integration" / "make_traces"), str(traces_dir), "1", "2", "32", "3"], check=True)
    trace = next(traces_dir.rglob("*.kvtr"))
    for path, argvs in ((weights, (["kvtier-weights", "verify"], ["kvtierctl", "--socket", d.admin, "policy", "load"])),
                        (trace, (["kvtier-trace", "verify"],))):
        for version in (0, 2, 2**32 - 1):
            b = bytearray(path.read_bytes())
            struct.pack_into("<I", b, 8, version)
            if path == weights:
                b[24:56] = hashlib.sha256(b[56:]).digest()
            other = path.with_name("other" + path.suffix)
            other.write_bytes(b)
            for argv in argvs:
                tool(argv + [str(other)], rf"{re.escape(str(other))}: .*version: {version}, must be 1")
            equal(other.read_bytes(), bytes(b), "the file, after it was refused")


def main():
    tap = Tap()
    for version in VERSIONS:
        with Any(version) as d:
            for mine in VERSIONS:
                tap.case(f"client {mine}, daemon {version}", pair, mine, d)
            tap.case(f"kvtierctl {OURS}, daemon {version}", ctl, d)
            if version == OURS:
                tap.case("hellos and messages of every version", hellos, d)
                tap.case("feature bits that one side does not know", features, d)
                tap.case("structs of older and newer callers", structs, d)
                tap.case("files of other versions", files, d)
                tap.case("an upgrade to another protocol and back, under a client", reconnect, d)
    d = World()
    try:
        tap.case("a store with rows", fill, d)
        tap.case("a store of another version", stores, d, (0, SUPER_B))
        tap.case("one superblock of another version", stores, d, (SUPER_B,))
        tap.case("its rows are there still", kept, d)
    finally:
        d.__exit__(None, None, None)
    print(f"# figure: {len(VERSIONS) ** 2} pairs of client and daemon: {len(VERSIONS)} work, "
          f"{len(VERSIONS) ** 2 - len(VERSIONS)} refused by one line; stores of 4 other versions refused and unchanged")
    tap.done()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        client(sys.argv[2])
    else:
        main()
