#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A runtime's own pool as a region: read and written by descriptor, never mapped by the daemon.

Every byte goes the whole way and comes back; an owner who cuts, seals or withholds its file harms itself; a
file that could make the daemon wait is not taken.
"""
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvtier import ROWS_ALL, Client, Error, Region, budget
from lib.attacks import Q
from lib.raw import REGION, REGION_CLOSE, REGION_IMPORT, Raw, Refused
from lib.rows import LANES, WIDTH, Neighbour, Rows
from lib.world import E_INVAL, E_LIMIT, E_TIMEOUT, Failed, Skip, Tap, World, equal, expect, matches, until

KEY, SECRET = b"imported-pool-16", b"i" * 32


def memfd(nbytes, name="engine-pool", flags=os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING):
    fd = os.memfd_create(name, flags)
    os.ftruncate(fd, nbytes)
    return fd


class Pool:
    """A memfd of the engine's, with the engine's own mapping of it; makes regions for Rows."""

    def __init__(self, name="engine-pool", make=memfd):
        self.name, self.make = name, make

    def __call__(self, client, nbytes):
        self.fd = self.make(nbytes, self.name)
        self.view = mmap.mmap(self.fd, nbytes)
        return Region(client, nbytes, fd=self.fd)

    def bytes_held(self):
        return os.fstat(self.fd).st_blocks * 512

    def close(self):
        self.view.close()
        os.close(self.fd)


def held_by(d, name="engine-pool"):
    """Descriptors of files by that name in the daemon."""
    n = 0
    for fd in os.listdir(f"/proc/{d.pid}/fd"):
        try:
            n += name in os.readlink(f"/proc/{d.pid}/fd/{fd}")
        except FileNotFoundError:
            pass
    return n


def let_go(d):
    until(lambda: f"{held_by(d)} descriptors of pools in the daemon", lambda: not held_by(d), 5)


def same(r, pool):
    """The engine sees in its own mapping what the library moved in its own."""
    for lane in range(LANES):
        for plane in (0, 1):
            off = r.place(lane, plane, 0)
            positions = r.seq.resident(lane)
            equal(pool.view[off:off + len(positions) * WIDTH], r.expected(lane, plane, positions), f"lane {lane}")


def round_trip(d, make=memfd):
    with Client(d.socket, name="engine") as c:
        pool = Pool(make=make)
        r = Rows(c, "engine", region=pool)
        os.close(os.dup(pool.fd))
        r.append(600)
        before = pool.bytes_held()
        out, _, dropped = r.plan(device=100, dram=200, nvme=ROWS_ALL)
        equal((out, dropped), (500 * LANES, 0), "rows out and dropped")
        same(r, pool)
        info = r.seq.info()
        expect(info["tier_rows"]["dram"] and info["tier_rows"]["nvme"], f"rows in both tiers: {info}")
        expect(pool.bytes_held() < before / 2, f"{pool.bytes_held()} of {before} bytes are still held")
        r.append(40)
        r.fetch(0, 64)
        same(r, pool)
        r.truncate(500)
        r.append(30)
        r.plan(device=64, nvme=ROWS_ALL)
        r.whole()
        same(r, pool)
        with open(f"/proc/{d.pid}/maps", encoding="ascii") as f:
            expect("kvtier-" in (maps := f.read()), "the daemon's own segments are in its maps")
        expect(pool.name not in maps, "the daemon mapped the pool")
        equal(held_by(d), 1, "descriptors of the pool in the daemon")
        expect(d.tier("device")["bytes"] >= pool.bytes_held() > 0, "status counts the pool")
        r.close()
        let_go(d)
        pool.close()
    misses = d.status()["misses"]
    expect(not any(misses.values()), f"misses: {misses}")


def in_dev_shm(d):
    if not os.access("/dev/shm", os.W_OK):
        raise Skip("no /dev/shm here")
    paths = []

    def make(nbytes, name):
        fd, path = tempfile.mkstemp(prefix=name, dir="/dev/shm")
        paths.append(path)
        os.ftruncate(fd, nbytes)
        return fd

    try:
        round_trip(d, make)
    finally:
        for path in paths:
            os.unlink(path)


# ---- owners who misbehave -----------------------------------------------------------------


def cut(d, c, tag, size, policy):
    """Rows in the pool and below it, then only `size` bytes of the pool: asking for more to leave is a miss."""
    pool = Pool()
    r = Rows(c, tag, region=pool)
    r.append(600)
    r.plan(device=300, dram=ROWS_ALL)
    io = d.status()["misses"]["io"]
    whole = os.fstat(pool.fd).st_size
    os.ftruncate(pool.fd, size)
    ident = r.seq.request(budget(20, ROWS_ALL, 0, policy=policy, manual=True))
    until(f"a miss after a cut to {size} bytes, policy {policy}", lambda: d.status()["misses"]["io"] > io, 10)
    os.ftruncate(pool.fd, whole)  # zeros by now, but rows can be moved about again
    r.seq.apply(r.wait(ident))
    expect(len(r.seq.resident(0)) <= 300, "more rows than before")
    r.seq.apply(r.wait(r.seq.request(budget(10, ROWS_ALL, 0, manual=True))))
    equal(len(r.seq.resident(0)), 10, "rows of lane 0 once the file is whole")
    r.close()
    pool.close()


def truncated(d):
    near = Neighbour(d.socket)
    near.well()
    pid = d.pid
    with Client(d.socket, name="cutter", timeout_ms=10000) as c:
        for i, size in enumerate((0, 4096, 100000)):
            for policy in ("streaming", "keydiff"):  # without and with a look at K
                cut(d, c, f"cut-{i}-{policy}", size, policy)
    near.well()
    near.stop()
    expect(d.alive() and d.pid == pid, "the daemon died")
    equal(d.status()["misses"]["corrupt"], 0, "corrupt pages")


def sealed(d):
    """A pool that cannot be written any more takes no rows, and costs none: another region gets them."""
    with Client(d.socket, name="sealer", timeout_ms=10000) as c:
        pool = Pool()
        r = Rows(c, "sealer", region=pool, leased=True, key=KEY, secret=SECRET)
        r.append(400)
        r.plan(device=50, dram=100, nvme=ROWS_ALL)
        fcntl.fcntl(pool.fd, fcntl.F_ADD_SEALS, 0x10)  # FUTURE_WRITE: mappings stay, pwrite() is refused
        r.plan(ROWS_ALL, 0, ROWS_ALL)
        equal(r.check(), 50 * LANES, "rows on the device after a promotion that cannot be")
        gens = r.gens
        r.close()
        r = Rows(c, "sealer", resume=True, leased=True, key=KEY, secret=SECRET, region=Pool("second-pool"))
        equal(r.rows, 400, "rows of the resumed sequence")
        r.gens = gens
        r.whole()
        r.close(drop=True)
        pool.close()
    misses = d.status()["misses"]
    equal((misses["corrupt"], misses["stale"]), (0, 0), "pages lost")


def killed(d):
    """A leased sequence whose owner dies: its rows are read from the file, which is then let go."""
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            c = Client(d.socket, name="victim")
            r = Rows(c, "victim", region=Pool(), leased=True, key=KEY, secret=SECRET)
            r.append(500)
            r.plan(device=400, dram=ROWS_ALL)
            os.write(tell, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        equal(os.read(ready, 1), b"1", "the victim's word")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
    let_go(d)
    with Client(d.socket, name="heir", timeout_ms=10000) as c:
        pool = Pool()
        r = Rows(c, "victim", region=pool, resume=True, leased=True, key=KEY, secret=SECRET)
        equal(r.rows, 500, "rows")
        r.whole()
        same(r, pool)
        r.close(drop=True)
        pool.close()


HOLDER = r"""
import ctypes, fcntl, mmap, os, struct, sys
fd, libc = int(sys.argv[1]), ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 323, "aarch64": 282}.get(os.uname().machine, -1)
uffd = libc.syscall(number, 0)  # userfaultfd: a page of ours that never arrives
if uffd < 0:
    sys.exit(77)
fcntl.ioctl(uffd, 0xc018aa3f, struct.pack("<3Q", 0xaa, 0, 0))
page = mmap.mmap(-1, 4096)
addr = ctypes.addressof(ctypes.c_char.from_buffer(page))
fcntl.ioctl(uffd, 0xc020aa00, struct.pack("<4Q", addr, 4096, 1, 0))
print("holding", flush=True)
libc.pwrite(fd, ctypes.c_void_p(addr), 1, ctypes.c_long(0))  # waits for the page with the inode locked
"""


def withheld(d):
    """The owner keeps the file's lock: its promotion waits, nobody else's, and nothing is lost by it."""
    near = Neighbour(d.socket)
    with Client(d.socket, name="holder", timeout_ms=2000) as c:
        pool = Pool()
        r = Rows(c, "holder", region=pool)
        r.append(500)
        r.plan(device=50, dram=100, nvme=ROWS_ALL)
        p = subprocess.Popen([sys.executable, "-c", HOLDER, str(pool.fd)], stdout=subprocess.PIPE, pass_fds=[pool.fd])
        try:
            if p.stdout.readline() != b"holding\n":
                raise Skip(f"no userfaultfd here (exit status {p.wait()})")
            until("the holder waits for its page",
                  lambda: Path(f"/proc/{p.pid}/stat").read_text(encoding="ascii").split(") ")[1][0] in "SD", 5)
            time.sleep(0.1)
            ident = r.seq.request(budget(ROWS_ALL, 0, ROWS_ALL, manual=True))
            try:
                r.seq.wait(ident, timeout_ms=1000)
                raise Failed("the promotion went through: the file was not held")
            except Error as e:
                equal(e.code, E_TIMEOUT, "code")
            near.well(20)
        finally:
            p.kill()
            p.wait()
        r.seq.apply(r.wait(ident))
        equal(r.check(), 500 * LANES, "rows on the device")
        r.close()
        pool.close()
    near.stop()


# ---- what is not taken ------------------------------------------------------------------------


def bad_files(d):
    """(name, fd, bytes, the daemon's line, the library's line or None for the daemon's)"""
    other = "must be tmpfs or hugetlbfs"
    fd = memfd(8192)
    yield "too short", os.dup(fd), 8193, r"bytes: 8193, the file has 8192", None
    yield "read-only", os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), 4096, r"fd: mode .*reading and writing", None
    yield "write-only", os.open(f"/proc/self/fd/{fd}", os.O_WRONLY), 4096, r"fd: mode .*reading and writing", None
    yield "a path", os.open(f"/proc/self/fd/{fd}", os.O_PATH), 4096, r"fd: mode .*reading and writing", None
    yield "appending", os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_APPEND), 4096, r"fd: mode .*(O_APP|app)", None
    os.close(fd)
    yield "/dev/zero", os.open("/dev/zero", os.O_RDWR), 4096, other, None
    yield "a directory's path", os.open("/dev/shm", os.O_RDONLY), 4096, r"fd: mode", None
    disk, path = tempfile.mkstemp(dir=d.store)
    os.unlink(path)
    os.ftruncate(disk, 8192)
    yield "on a disk", disk, 4096, other, r"fd: file system 0x[0-9a-f]+, must be tmpfs or hugetlbfs"
    out, end = os.pipe()
    os.close(out)
    yield "a pipe", end, 4096, r"fd: mode", None
    sealed_fd = memfd(8192)
    fcntl.fcntl(sealed_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    yield "sealed", sealed_fd, 4096, r"fd: seals 0x8, must allow writing", None
    try:
        huge = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
        os.ftruncate(huge, 2 << 20)
        os.pwrite(huge, b"", 0)
    except OSError:  # as on every kernel up to now
        yield "huge pages", huge, 4096, r"cannot be written by pwrite|the file has", None


def refused(d):
    fds = d.fds()
    with Raw(d.socket) as r, Client(d.socket, name="asker") as c:
        r.hello()
        expect(r.well(), "not served")  # and a turn of the loop later: it keeps nothing of the hello open
        base = d.fds()
        for name, fd, nbytes, line, own in bad_files(d):
            try:
                r.ask(REGION_IMPORT, Q.pack(nbytes), [fd])
                raise Failed(f"{name}: taken")
            except Refused as e:
                equal(e.status, E_INVAL, f"{name}: status ({e.text})")
                matches(e.text, line, name)
            try:
                Region(c, nbytes, fd=fd)
                raise Failed(f"{name}: taken through the library")
            except Error as e:
                equal(e.code, E_INVAL, f"{name}: code ({e})")
                matches(str(e), own or line, f"{name}, the library's line")
            os.close(fd)
            until(lambda n=name: f"{n}: {d.fds()} descriptors in the daemon, must be {base}", lambda: d.fds() == base, 5)
        expect(r.well(), "not served any more")
    until(lambda: f"{d.fds()} descriptors, {fds} before", lambda: d.fds() <= fds, 5)


def quota(d):
    fd = memfd(8 << 20)
    with Raw(d.socket) as r:
        r.hello()

        def limited(kind, nbytes, with_fd):
            try:
                r.ask(kind, Q.pack(nbytes), [fd] if with_fd else ())
                raise Failed(f"{nbytes} bytes: taken")
            except Refused as e:
                equal(e.status, E_LIMIT, "status")
                matches(e.text, r"bytes: \d+, tenant default has \d+ of 4194304 left", "text")

        limited(REGION_IMPORT, 4 << 20 | 1, True)
        payload, got = r.ask(REGION_IMPORT, Q.pack(3 << 20), [fd])
        equal(got, [], "descriptors in the reply")
        equal(payload[8:16], Q.pack(3 << 20), "bytes")
        limited(REGION_IMPORT, 2 << 20, True)
        limited(REGION, 2 << 20, False)
        r.ask(REGION_CLOSE, payload[:8])
        r.ask(REGION_IMPORT, Q.pack(4 << 20), [fd])
    os.close(fd)


def main():
    tap = Tap()
    with World() as d:
        tap.case("a memfd: out to both tiers and back, every byte, never mapped", round_trip, d)
        tap.case("a file in /dev/shm likewise", in_dev_shm, d)
        tap.case("cut behind the daemon's back: misses, no harm to others", truncated, d)
        tap.case("sealed behind the daemon's back: promoted elsewhere, nothing lost", sealed, d)
        tap.case("withheld by its owner: it waits alone", withheld, d)
        tap.case("SIGKILL of the owner: another process resumes every byte", killed, d)
        tap.case("files that are not taken: one clear line each, no descriptor kept", refused, d)
    with World(tenant_default={"max_region": "4M"}) as d:
        tap.case("imports count against max_region", quota, d)
    tap.done()


if __name__ == "__main__":
    main()
