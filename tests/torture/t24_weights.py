#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""torture 24: weight files that are tampered with, cut, foreign, or valid and adversarial

pass: bad ones are all refused by name (file, field, value, limit); 0 wrong bytes with the others
quick: 300 files
full: 1,000 files
plants: weights-hash-skipped weights-infinite-accepted

A bad file is offered to `kvtier-weights verify`, to `kvtierctl policy load` and, one of five, as the model's file in model_dir:
then a sequence must run the fallback policy and say why. A valid one is loaded, and a client whose every row can be told
from every other appends, demotes, promotes, recalls and truncates under it, with adaptive budgets, and compares every byte.
"""
import ctypes
import hashlib
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from kvtier import ROWS_ALL, Client  # noqa: E402
from kvtier._lib import Layout  # noqa: E402
from kvtier.daemon import build_dir  # noqa: E402
from lib import raw  # noqa: E402
from lib.rows import DIM, HEADS, LANES, LAYERS, WIDTH, Rows  # noqa: E402
from lib.world import E_NOENT, SEED, Failed, Tap, World, equal, expect, matches  # noqa: E402

FILES = 1000 if os.environ.get("KVT_TORTURE") == "full" else 300
RND = random.Random(SEED)
KINDS = ("kvp", "position", "qfilter")
U32, U64, F32 = "<I", "<Q", "<f"
# header: name: (offset, format)
FIELD = {"version": (8, U32), "header_size": (12, U32), "total_size": (16, U64), "layers": (120, U32), "heads": (124, U32),
         "k_dim": (128, U32), "v_dim": (132, U32), "rope_type": (136, U32), "rope_theta": (140, F32), "keys": (144, U32),
         "kind": (148, U32), "dtype": (152, U32), "proj": (156, U32), "pos_kind": (160, U32), "pos_rows": (164, U32),
         "pos_dim": (168, U32), "hidden": (172, U32), "rank": (176, U32), "dist_rows": (180, U32), "lane_off": (184, U64),
         "lane_stride": (192, U64), "calib_off": (200, U64), "calib_size": (208, U64), "octave": (216, U32)}
LINE = (r"{path}: (magic|name|size|type|digest|reserved1|calibration|{fields}|layer \d+ head \d+ \w+\[\d+\]|calibration\[\d+\])"
        r"[^:]*: \S.*")


# ---- making them -------------------------------------------------------------------------


def get(b, field):
    off, fmt = FIELD[field]
    return struct.unpack_from(fmt, b, off)[0]


def put(b, field, v):
    off, fmt = FIELD[field]
    struct.pack_into(fmt, b, off, v)


def seal(b):
    b[24:56] = hashlib.sha256(b[56:]).digest()
    return b


def named(b, name):
    b[56:120] = name.encode().ljust(64, b"\0")
    return seal(b)


def lane_elems(b):
    """(bytes of an element, elements of a lane), padding left out."""
    return (2, (get(b, "lane_stride") // 2)) if get(b, "kind") == 1 else (4, get(b, "lane_stride") // 4)


def table(lanes=LANES, knots=4, lengths=1, distances=1, scores=None, values=None, sense=1.0, magic=4407628.0, version=1.0):
    """A calibration section."""
    scores = [float(k) for k in range(knots)] if scores is None else scores
    values = [k / knots for k in range(knots)] if values is None else values
    edges = [100.0 * (i + 1) for i in range(lengths - 1)] + [50.0 * (i + 1) for i in range(distances - 1)]
    lane = [sense] + (list(scores) + list(values)) * (lengths * distances)
    words = [magic, version, lanes, knots, lengths, distances] + edges + lane * lanes
    return struct.pack(f"<{len(words)}f", *words)


def with_calibration(b, section):
    b = b[:]
    put(b, "calib_off", len(b))
    put(b, "calib_size", len(section))
    b += section
    put(b, "total_size", len(b))
    return seal(b)


class Base:
    """A good file of each kind, by the tool."""

    def __init__(self, top):
        self.top, self.file = top, {}
        for kind in KINDS:
            path = top / f"base.{kind}"
            subprocess.run([str(build_dir() / "kvtier-weights"), "random", "--layers", str(LAYERS), "--heads", str(HEADS), "--dim",
                            str(DIM), "--model", "pattern", "--kind", kind, "--net", "narrow", "-o", str(path)], check=True)
            self.file[kind] = bytearray(path.read_bytes())

    def any(self):
        return self.file[RND.choice(KINDS)][:]


def flipped(base):
    b = base.any()
    at = RND.choice((RND.randrange(56), RND.randrange(256), RND.randrange(len(b)), RND.randrange(len(b))))
    b[at] ^= 1 << RND.randrange(8)
    return f"bit flipped in byte {at}", b, None


def cut(base):
    b = base.any()
    n = RND.choice((0, 1, 255, 256, RND.randrange(len(b)), len(b) - 1))
    return f"cut to {n} bytes", b[:n], r"size: "


def longer(base):
    b = base.any()
    return "longer than it says", b + bytes(RND.randrange(1, 5000)), r"total_size: \d+, must be \d+"


def field(base):
    """A header field that cannot be, with the digest right."""
    b = base.any()
    name = RND.choice([f for f in FIELD if f not in ("total_size",)])
    if name == "rope_theta":
        v = RND.choice((float("nan"), float("inf"), -1.0))
    elif name == "calib_size":
        v = RND.choice((3, 2**64 - 4, 2**40 + 4))
    elif name in ("lane_off", "lane_stride", "calib_off"):
        v = RND.choice((get(b, name) + 64, 2**64 - 1, 2**63, 1))
    else:
        v = RND.choice((2**32 - 1, 2**31, 1 << 21))
    put(b, name, v)
    return f"{name} {v}", seal(b), rf"({name}|kind|lane_stride|total_size): "


def version(base):
    b = base.any()
    v = RND.choice((0, 2, 3, 2**32 - 1))
    put(b, "version", v)
    return f"version {v}", seal(b), rf"version: {v}, must be 1"


def infinite(base):
    b = base.any()
    width, n = lane_elems(b)
    n -= 64 // width  # the padding of a lane is no weight
    at = 256 + RND.randrange(LANES) * get(b, "lane_stride") + RND.randrange(max(n, 1)) * width
    struct.pack_into("<H" if width == 2 else "<I", b, at, RND.choice((0x7F80, 0xFF80, 0x7FC0)) << (0 if width == 2 else 16))
    return f"not finite at byte {at}", seal(b), r"layer \d+ head \d+ \w+\[\d+\]: not finite"


def calibration(base):
    nan, bad = float("nan"), float("inf")
    section, want = RND.choice((
        (table(magic=1.0), "magic"), (table(version=2.0), r"version: 2, must be 1"), (table(lanes=LANES + 1), "lanes: 5, must be 4"),
        (table(scores=[3, 2, 1, 0]), "knot 1"), (table(values=[-1, 0, 0, 0]), "value 0"), (table(sense=-1.0), "sensitivity"),
        (table()[:-4], r"\d+ bytes, must be \d+"), (table() + bytes(4), r"\d+ bytes, must be"), (bytes(24), "magic"),
        (table(values=[0, 0, 0, nan]), r"not finite"), (table(scores=[0, 0, 0, bad]), r"not finite")))
    return f"calibration ({want})", with_calibration(base.file["kvp"], section), rf"calibration(\[\d+\])?: .*{want}"


def foreign(base):
    pick = RND.randrange(7)
    b = (RND.randbytes(RND.randrange(1, 5000)), b"", Path(sys.executable).read_bytes()[:40000], b'{"weights": [1, 2, 3]}\n' * 40,
         struct.pack("<Q", 80) + b'{"w":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}'.ljust(80) + bytes(999),
         bytes(base.file["kvp"][::-1]), b"KVTIERWT" + bytes(4000))[pick]
    return f"foreign ({pick})", bytearray(b), r"(magic|size|version): "


BAD = (flipped, flipped, cut, longer, field, field, version, infinite, infinite, calibration, foreign)


# ---- valid, and as bad as can be --------------------------------------------------------------


def fill(b, fn):
    """Every weight by fn(lane, element, elements)."""
    width, n = lane_elems(b)
    fmt, shift = ("<H", 16) if width == 2 else ("<I", 0)
    for lane in range(LANES):
        at = 256 + lane * get(b, "lane_stride")
        for i in range(n - 64 // width):
            bits = struct.unpack("<I", struct.pack("<f", fn(lane, i, n)))[0]
            struct.pack_into(fmt, b, at + i * width, bits >> shift)
    return seal(b)


BIG, TINY = 3.38e38, 1e-40
WORST = {
    "all zero": lambda l, i, n: 0.0, "all minus zero": lambda l, i, n: -0.0, "all equal": lambda l, i, n: 1.0,
    "all huge": lambda l, i, n: BIG, "all huge below zero": lambda l, i, n: -BIG, "huge of both signs": lambda l, i, n: (BIG, -BIG)[i % 2],
    "denormals": lambda l, i, n: TINY * (1 + i % 3), "half huge, half zero": lambda l, i, n: BIG if i < n // 2 else 0.0,
    "at random, huge": lambda l, i, n: RND.uniform(-BIG, BIG), "at random": lambda l, i, n: RND.uniform(-9, 9),
    "one lane huge": lambda l, i, n: BIG if l == 1 else 0.01, "huge and denormal": lambda l, i, n: BIG if i % 3 else TINY,
    "steps": lambda l, i, n: float(i % 2), "square roots of huge": lambda l, i, n: 1.8e19 * (-1) ** (i // 7),
}
TABLES = {
    "no calibration": None, "calibration": table(), "calibration, flat": table(values=[0, 0, 0, 0]),
    "calibration, huge": table(scores=[-BIG, -1, 1, BIG], values=[0, 1, BIG, BIG]), "calibration, insensitive": table(sense=0.0),
    "calibration, too sensitive": table(sense=BIG, values=[BIG] * 4), "calibration, denormal": table(scores=[0, TINY, TINY, TINY], values=[TINY] * 4),
    "calibration, many": table(knots=64, lengths=4, distances=4, scores=[0.0] * 64, values=[1.0] * 64),
}


def adversarial(base, k):
    kind, how, tab = KINDS[k % 3], list(WORST)[k // 3 % len(WORST)], list(TABLES)[k % len(TABLES)]
    b = fill(base.file[kind][:], WORST[how])
    if kind == "kvp" and k % 2:
        put(b, "rope_theta", RND.choice((1e-38, 3e38, 1.0, 1e-3)))
        put(b, "rope_type", RND.choice((1, 2)))
        put(b, "octave", RND.choice((1, 64)))
    if kind == "qfilter" and k % 2:
        put(b, "rope_theta", 3e38)
    if TABLES[tab] is not None:
        b = with_calibration(b, TABLES[tab])
    return f"{kind}: {how}, {tab}", kind, seal(b)


# ---- offering them --------------------------------------------------------------------------------


class Trial:
    def __init__(self, d, top):
        self.d, self.top, self.base = d, top, Base(top)
        self.client = Client(d.socket, timeout_ms=10000)
        self.refused = self.loaded = self.fell_back = self.rows = 0
        self.seen = {}

    def offer(self, path, want):
        """Both tools refuse it with one line."""
        line = LINE.format(path=re.escape(str(path)), fields="|".join(FIELD))
        for argv in (["kvtier-weights", "verify", str(path)],
                     ["kvtierctl", "--socket", self.d.admin, "policy", "load", str(path)]):
            p = subprocess.run([str(build_dir() / argv[0])] + argv[1:], capture_output=True, text=True, timeout=30, check=False)
            equal(p.returncode, 1, f"exit status of {argv[0]} ({p.stderr.strip()})")
            equal(p.stderr.count("\n"), 1, f"lines of {argv[0]}: {p.stderr!r}")
            matches(p.stderr, line, argv[0])
            if want:
                matches(p.stderr, want, argv[0])
        self.refused += 1

    def fall_back(self, name, path, want):
        """The model of this name has that file: its sequences run the fallback, and show says why."""
        with Client(self.d.socket, timeout_ms=10000) as c:  # one client registers 64 models at most
            r = Rows(c, name, model=name)
            r.append(90)
            r.plan(device=40, dram=ROWS_ALL, policy="kvp")
            equal(r.seq.info()["policy"], "streaming", "the policy that runs")
            key = next(s["key"] for s in self.d.seqs() if s["model"] == name)
            why = self.d.ctl("show", key)["policy_reason"]
            matches(why, rf"^kvp: {re.escape(str(path))}: ", "the reason")
            if want:
                matches(why, want, "the reason")
            r.whole()
            r.close(drop=True)
        self.fell_back += 1

    def bad(self, make, n):
        what, b, want = make(self.base)
        path = self.top / f"bad{n}.kvp"
        path.write_bytes(b)
        try:
            self.offer(path, want)
            if n % 5 == 0:
                name = f"m{n}"
                there = self.d.models / f"{name}.kvp"
                there.write_bytes(named(b, name) if make is calibration else b)  # looked at after the name
                self.fall_back(name, there, want if get_kind(b) == 1 else None)
                there.unlink()
        except Failed as e:
            raise Failed(f"{what}: {e}") from None
        path.unlink(missing_ok=True)
        self.seen[make.__name__] = self.seen.get(make.__name__, 0) + 1

    def recall(self, r):
        """Rows that were demoted to DRAM, asked for by queries: copied right."""
        r.plan(device=60, dram=ROWS_ALL)
        r.seq.recall_prepare()
        lay = r.layouts[0]
        w = Layout(k_off=lay.k_off + r.cap * WIDTH, v_off=lay.v_off + r.cap * WIDTH, k_head_stride=lay.k_head_stride,
                   v_head_stride=lay.v_head_stride, k_row_stride=WIDTH, v_row_stride=WIDTH, cap=32)
        q = (ctypes.c_float * (HEADS * DIM))(*[RND.uniform(-1, 1) for _ in range(HEADS * DIM)])
        counts, positions, _ = r.seq.recall(0, q, 1, 32, w, probe=1000)
        for h in range(HEADS):
            at = list(positions[h * 32:h * 32 + counts[h]])
            for plane, off, stride in ((0, w.k_off, w.k_head_stride), (1, w.v_off, w.v_head_stride)):
                got = bytes(r.buf[off + h * stride:off + h * stride + len(at) * WIDTH])
                expect(got == r.expected(h, plane, at), f"recalled rows of head {h} are wrong")
            self.rows += len(at)
        r.seq.recall_end()

    def valid(self, k):
        what, kind, b = adversarial(self.base, k)
        path = self.top / "valid.kvp"
        path.write_bytes(b)
        try:
            p = subprocess.run([str(build_dir() / "kvtier-weights"), "verify", str(path)], capture_output=True, text=True,
                               check=False)
            equal((p.returncode, p.stderr), (0, ""), "kvtier-weights verify")
            self.d.ctl("policy", "load", str(path))
            r = Rows(self.client, f"valid{k}")
            for dev in (48, 20, 96):
                r.append(70)
                r.plan(device=dev, dram=64, nvme=ROWS_ALL, policy=kind)
                self.rows += r.check()
            equal(r.seq.info()["policy"], kind, "the policy that runs")
            self.recall(r)
            r.truncate(100)
            r.append(50)
            r.plan(device=30, dram=64, nvme=ROWS_ALL)
            r.whole()
            self.rows += r.check()
            r.close(drop=True)
            if kind == "kvp":
                self.scorer()
        except Failed as e:
            raise Failed(f"{what}: {e}") from None
        self.loaded += 1

    def scorer(self):
        """The network for a client's GPU: it comes, or there is a reason."""
        with raw.Raw(self.d.socket) as c:
            c.hello(features=127)
            model, _ = c.model(name=b"pattern", n_layers=LAYERS, dtype=1, head_dim=DIM, rope=1, post_rope=1, theta=10000.0,
                               layers=[(0, HEADS, WIDTH, WIDTH, 0, 0)] * LAYERS)
            try:
                c.ask(13, struct.pack("<Q32s", model, b"kvp"))
            except raw.Refused as e:
                equal(e.status, E_NOENT, f"status ({e.text})")
                expect(e.text, "no reason")


def get_kind(b):
    return get(b, "kind") if len(b) >= 256 else 1


def no_files(t):
    """What is not a regular file, or not there."""
    os.mkfifo(t.top / "fifo")
    (t.top / "loop").symlink_to("loop")
    for path, want in ((t.top, "type: not a regular file"), (t.top / "fifo", "type: not a regular file"),
                       ("/dev/zero", "type: not a regular file"), (t.top / "loop", "[Tt]oo many"), (t.top / "none", "No such file")):
        for argv in (["kvtier-weights", "verify", str(path)], ["kvtierctl", "--socket", t.d.admin, "policy", "load", str(path)]):
            p = subprocess.run([str(build_dir() / argv[0])] + argv[1:], capture_output=True, text=True, timeout=30, check=False)
            equal((p.returncode, p.stderr.count("\n")), (1, 1), f"{argv[0]}: {p.stderr!r}")
            matches(p.stderr, re.escape(str(path)) + ": .*" + want, argv[0])


def others(t):
    """Good files of other models: loaded under their own name only, refused by name where they lie in the way."""
    shapes = {"layers": (LAYERS + 1, HEADS, DIM), "heads": (LAYERS, HEADS + 1, DIM), "k_dim": (LAYERS, HEADS, 2 * DIM)}
    for i, (name, (layers, heads, dim)) in enumerate(shapes.items()):
        model = f"other{i}"
        there = t.d.models / f"{model}.kvp"
        subprocess.run([str(build_dir() / "kvtier-weights"), "random", "--layers", str(layers), "--heads", str(heads), "--dim", str(dim),
                        "--model", model, "--net", "narrow", "-o", str(there)], check=True)
        t.fall_back(model, there, rf"{name}: \d+, must be the model's \d+")
    there = t.d.models / "third.kvp"
    there.write_bytes(t.base.file["kvp"])
    t.fall_back("third", there, r"name: pattern, must be the model's third")
    there.write_bytes(named(t.base.file["position"][:], "fourth"))
    there.rename(t.d.models / "fourth.kvp")
    t.fall_back("fourth", t.d.models / "fourth.kvp", r"kind: position, must be kvp")


def kept(t):
    """After all the refusals the file loaded last is still the one in use."""
    path = t.top / "good.kvp"
    path.write_bytes(t.base.file["kvp"])
    t.d.ctl("policy", "load", str(path))
    _, b, want = version(t.base)
    bad = t.top / "late.kvp"
    bad.write_bytes(b)
    t.offer(bad, want)
    r = Rows(t.client, "kept")
    r.append(100)
    r.plan(device=40, dram=ROWS_ALL, policy="kvp")
    equal(r.seq.info()["policy"], "kvp", "the policy that runs")
    weights = [p["weights"] for p in t.d.ctl("policy", "list")["policies"] if p["name"] == "kvp"]
    equal(weights, [str(path)], "the weights in use")
    r.whole()
    r.close(drop=True)


def many_bad(t, n):
    for i in range(n):
        t.bad(BAD[i % len(BAD)], i)


def many_valid(t, n):
    for k in range(n):
        t.valid(k)


def main():
    tap = Tap()
    valid = FILES // 5
    with World(policy={"adaptive": "lanes"}, dram={"size": "64M"}) as d:
        top = Path(d.run) / "files"
        top.mkdir()
        t = Trial(d, top)
        pid = d.pid
        tap.case(f"{FILES - valid - 11} bad files are refused by name", many_bad, t, FILES - valid - 11)
        tap.case("what is no file", no_files, t)
        tap.case("other models' files", others, t)
        tap.case(f"{valid} valid, adversarial files: every byte right", many_valid, t, valid)
        tap.case("a refused file changes nothing", kept, t)
        tap.case("the same daemon", lambda: expect(d.alive() and d.pid == pid, "it died"))
        misses = d.status()["misses"]
        tap.case("no miss", lambda: equal(sum(v for v in misses.values() if isinstance(v, int)), 0, f"misses {misses}"))
        t.client.close()
        print(f"# figure: {t.refused} bad weight files refused by name twice each ({t.fell_back} times a sequence ran the fallback and said why); "
              f"{t.loaded} adversarial ones, 0 of {t.rows:,} rows wrong", flush=True)
        print("# " + ", ".join(f"{k} {v}" for k, v in sorted(t.seen.items())))
    tap.done()


if __name__ == "__main__":
    main()
