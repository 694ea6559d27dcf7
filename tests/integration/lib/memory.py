# SPDX-License-Identifier: MIT
"""Attacks through shared memory: rings, slots, random bytes, and writing to what is published read-only."""
import ctypes
import errno
import fcntl
import mmap
import os
import random
import re
import struct
import time

from . import raw
from .attacks import Q, QII, garbage
from .raw import ALL, RING_HEAD, RING_TAIL, RING_WAKE, SEQ_CLOSE, SEQ_INFO, SEQ_OPEN, SEQ_TRUNCATE, HungUp, Raw
from .raw import Refused, message
from .world import SEED, equal, expect, until

LIBC = ctypes.CDLL(None, use_errno=True)
PUNCH_HOLE_KEEP_SIZE, F_ADD_SEALS = 3, 1033
MADV_REMOVE = 9

# ---- the control segment -----------------------------------------------------------------


def rings(a):
    def jump(r, tail):
        r.ready()
        for _ in range(3):
            r.push()
        time.sleep(0.02)
        r.put32(RING_TAIL, tail)
        r.kick()

    def plans(r, n):
        """A plan is announced twice at most, so n of them fill the ring of 64 entries."""
        r.len_word(0, 200)
        view = mmap.mmap(r.plan_fd, r.plan_bytes, prot=mmap.PROT_READ)
        for i in range(n):
            ident = r.request(device=150 - i)
            until("a READY plan", lambda w=ident: struct.unpack_from("<QI", view) >= (w, 2), 5)
            r.put64(r.slot + 8, ident)

    def impossible_head(r):
        r.ready()
        r.put32(r.cq + RING_HEAD, 0x7FFFFFFF)
        plans(r, 100)

    def fill(r, **kw):
        """A READY plan and a full ring."""
        r.ready(**kw)
        r.len_word(0, 200)
        view = mmap.mmap(r.plan_fd, r.plan_bytes, prot=mmap.PROT_READ)
        for i in range(100):
            ident = r.request(device=150 - i)
            until("a READY plan", lambda w=ident: struct.unpack_from("<QI", view) >= (w, 2), 5)
            if struct.unpack_from("<I", r.ctl, r.cq + RING_TAIL)[0] >= r.entries:
                break
            r.put64(r.slot + 8, ident)

    def end_in_a_fork(r):
        """A fork leaves a READY plan alone, so nothing has to be told; taking the plan back does, and cannot be."""
        fill(r)
        r.put32(r.cq + RING_HEAD, 0x7FFFFFFF)
        r.ask(SEQ_OPEN, raw.seq_open(op=raw.FORK, parent=r.s, prefix=100, region=r.region_handle))
        r.ask(SEQ_TRUNCATE, QII.pack(r.s, 100, 0))

    def deaf_forks(r):
        r.hello(max_seqs=4000, plan_bytes=1 << 24)
        r.model()
        r.region_handle, _, _ = r.region()
        r.seq(region=r.region_handle, max_rows=64)
        for _ in range(3000):
            r.send(message(SEQ_OPEN, raw.seq_open(op=raw.FORK, parent=r.s, region=r.region_handle, max_rows=64)))

    def broken(r, last):
        """Whatever it is told next ends it."""
        fill(r, lifetime=1)
        r.put32(r.cq + RING_HEAD, 0x7FFFFFFF)
        try:
            last(r)
        finally:
            expect(r.gone(), "still connected")
            for s in a.d.seqs():
                if "neighbour" not in s["client"]:
                    a.d.ctl("drop", s["handle"])
        raise HungUp

    def clogged(r):
        """Who shares a file with the daemon shares its flags."""
        r.ready()
        for fd in (r.wake_fd, r.notify_fd):
            fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        os.write(r.notify_fd, struct.pack("<Q", raw.U64 - 1))
        r.len_word(0, 200)
        for i in range(20):
            r.put32(r.cq + RING_WAKE, 1)
            r.request(device=150 - i)
            r.kick()

    def flood(r):
        r.ready()
        for i in range(r.entries):
            slot = raw.RING_ENTRY + i * raw.ENTRY
            r.ctl[slot:slot + raw.ENTRY] = struct.pack("<IIQ48x", raw.Q_DIRTY, 0, r.s)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            r.put32(RING_TAIL, struct.unpack_from("<I", r.ctl, RING_HEAD)[0] + r.entries)
            r.kick()

    def deaf(r):
        r.ready()
        r.sock.settimeout(5)
        for _ in range(100000):
            r.send(message(SEQ_INFO, Q.pack(r.s)))

    for name, tail in (("too far", 1000), ("back", 1), ("by half the numbers", 0x80000003), ("to 2^32-1", ALL)):
        a.attack(f"the ring's cursor jumps {name}", lambda r, t=tail: jump(r, t), ended=r"submit ring: impossible cursor")
    a.attack("the other ring's cursor is impossible", impossible_head, ended=r"complete ring: impossible cursor")
    for name, last in (
            ("truncates", lambda r: r.ask(SEQ_TRUNCATE, QII.pack(r.s, 10, 0))),
            ("closes a leased sequence", lambda r: r.ask(SEQ_CLOSE, QII.pack(r.s, 0, 0))),
            ("closes a sequence for good", lambda r: r.ask(SEQ_CLOSE, QII.pack(r.s, 1, 0))),
            ("loses its sequence to kvtierctl", lambda r: a.d.ctl("drop", f"0x{r.s:x}"))):
        a.attack(f"with a broken ring it {name}", lambda r, f=last: broken(r, f),
                 ended=r"complete ring: impossible cursor")
    a.attack("makes its wake-ups block and fills them", clogged)
    for kind in (0, 2, 64, 99, ALL):
        a.attack(f"a ring entry of type {kind}", lambda r, k=kind: r.ready().push(k), ended=rf"entry type {kind} is not")
    a.attack("garbage ring entries", lambda r: r.ready().push(raw=b"\xee" + garbage(63)), ended=r"entry type \d+ is not")
    a.attack("never reads its ring", lambda r: plans(r.ready(), 100))
    a.attack("a ring full of hints for a second", flood)
    a.attack("the other ring breaks before a fork and a cut", end_in_a_fork, ended=r"complete ring: impossible cursor")
    a.attack("does not read its replies while it forks", deaf_forks, ended=r"does not read its replies")
    a.attack("does not read its replies", deaf, ended=r"does not read its replies")


def slots(a):
    def words(*steps, poke=True, **kw):
        def fn(r):
            r.ready(**kw)
            for epoch, rows in steps:
                r.len_word(epoch, rows)
                if poke:
                    r.push()
                time.sleep(0.03)
        return fn

    def acked(*values):
        def fn(r):
            r.ready()
            r.len_word(0, 200)
            ident = r.request(device=32)
            plans = mmap.mmap(r.plan_fd, r.plan_bytes, prot=mmap.PROT_READ)
            until("a READY plan", lambda: struct.unpack_from("<QI", plans)[1] == 2, 5)
            for v in values:
                r.put64(r.slot + 8, ident if v is None else v)
                r.push()
                time.sleep(0.03)
        return fn

    def nack(r):
        r.ready()
        for w in range(16):
            r.put64(r.slot + 16 + 8 * w, raw.U64)
        r.len_word(0, 200)
        ident = r.request(device=32)
        time.sleep(0.1)
        r.put64(r.slot + 8, ident)
        r.push()
        equal(struct.unpack_from("<I", r.ask(SEQ_INFO, Q.pack(r.s))[0])[0], 200, "rows")

    a.attack("length past max_rows", words((0, 2000), max_rows=1024), ended=r"slot.len: epoch 0 rows 2000, .*0\.\.1024")
    a.attack("length past its layouts", words((0, 300)), ended=r"slot.len: 300 rows, a layout has room for 256")
    a.attack("length goes backwards", words((0, 64), (0, 32)), ended=r"slot.len: epoch 0 rows 32, must be .* 64\.\.")
    a.attack("length of a future epoch", words((7, 10)), ended=r"slot.len: epoch 7")
    a.attack("length 2^64-1", words((ALL, ALL)), ended=r"slot.len: epoch 4294967295")
    a.attack("a bad length without a hint", words((3, 3), poke=False), ended=r"slot.len: epoch 3")
    a.attack("an acknowledgement from the future", acked(999), ended=r"slot.acked: 999, plans so far")
    a.attack("an acknowledgement of 2^64-1", acked(raw.U64), ended=r"slot.acked: 18446744073709551615")
    a.attack("an acknowledgement taken back", acked(None, 0), ended=r"slot.acked: 0, plans so far")
    a.attack("every bit of the nack words", nack)


def scribble(a):
    """Random bytes everywhere; whoever is hung up on comes again."""
    rnd = random.Random(SEED)

    def control(r):
        r.sock.close()
        end, lives = time.monotonic() + 2, 0
        while time.monotonic() < end:
            lives += 1
            with Raw(a.d.socket) as v:
                try:
                    v.ready()
                    lo, hi = rnd.choice(((0, v.cq), (v.cq, v.slots), (v.slots, len(v.ctl)), (0, len(v.ctl))))
                    stop = time.monotonic() + 0.1
                    while time.monotonic() < stop:
                        off = rnd.randrange(lo, hi)
                        n = min(rnd.choice((1, 4, 8, 64, 4096)), hi - off)
                        v.ctl[off:off + n] = garbage(n)
                        v.kick()
                        v.request()
                except (HungUp, Refused):
                    pass
        expect(lives > 5, f"only {lives} lives")

    def region(r):
        """The rows change under the daemon while it copies them: it may store what it likes, of this client only."""
        r.ready(layouts=[raw.layout(0, score=500 << 10, score_head=4096), raw.layout(4 * 320 * 64, score=600 << 10,
                                                                                      score_head=4096)])
        end, rows = time.monotonic() + 2, 0
        while time.monotonic() < end:
            rows = min(rows + 16, 256)
            r.len_word(0, rows)
            r.push()
            r.request(device=8, policy=rnd.choice((b"client", b"keydiff", b"random", b"kvp", b"cur", b"lagkv")))
            for _ in range(20):
                off = rnd.randrange(0, len(r.mem) - 4096)
                r.mem[off:off + 4096] = garbage(4096)

    before = len(a.d.log_lines())
    a.tap.case("two seconds of random bytes in the control segment", lambda: (
        control(Raw(a.d.socket)), a.near.well(), expect(a.d.alive(), "the daemon died")))
    said = [x for x in a.d.log_lines()[before:] if " ended: " in x]
    a.tap.case("each of those was told why", lambda: (
        expect(said, "none was hung up on"),
        expect(all(re.search(r"ended: (submit ring|complete ring|slot\.|message)", x) for x in said), said)))
    a.attack("two seconds of random bytes in the region", region)


# ---- published memory ------------------------------------------------------------------------


def published(a):
    def fails(what, fn, codes=(errno.EPERM, errno.EACCES, errno.EBADF, errno.EINVAL)):
        try:
            got = fn()
        except OSError as e:
            expect(e.errno in codes, f"{what}: {e}")
            return
        expect(isinstance(got, int) and got < 0 and ctypes.get_errno() in codes, f"{what}: it was possible")

    def seal(fd, bits):
        return LIBC.fcntl(fd, F_ADD_SEALS, bits)

    def punch(fd, size):
        return LIBC.fallocate(fd, PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(size))

    def protect(fd, size):
        LIBC.mmap.restype = ctypes.c_void_p
        p = LIBC.mmap(None, ctypes.c_size_t(size), 1, 1, fd, ctypes.c_long(0))
        return LIBC.mprotect(ctypes.c_void_p(p), ctypes.c_size_t(size), 3) or LIBC.madvise(
            ctypes.c_void_p(p), ctypes.c_size_t(size), MADV_REMOVE)

    def attempts(r):
        r.ready()
        r.len_word(0, 100)
        r.request(device=20)
        time.sleep(0.1)
        size = r.plan_bytes
        view = mmap.mmap(r.plan_fd, size, prot=mmap.PROT_READ)
        before = view[:]
        expect(any(before), "no plan to write to")
        fds = [r.plan_fd]
        try:
            fds.append(os.open(f"/proc/self/fd/{r.plan_fd}", os.O_RDWR))
        except OSError as e:
            equal(e.errno, errno.EACCES, "reopening")
        for fd in fds:
            fails("mmap", lambda f=fd: mmap.mmap(f, size, prot=mmap.PROT_READ | mmap.PROT_WRITE))
            fails("pwrite", lambda f=fd: os.pwrite(f, b"x", 0))
            fails("ftruncate", lambda f=fd: os.ftruncate(f, 0))
            fails("growing", lambda f=fd: os.ftruncate(f, size * 2))
            fails("punching", lambda f=fd: punch(f, size))
            fails("sealing", lambda f=fd: seal(f, 0x8))
            fails("mprotect, madvise", lambda f=fd: protect(f, size))
        equal(view[:], before, "published bytes")

    def exchange(r):
        """The client's own memory: it may write and punch, never resize or seal what the daemon has mapped."""
        r.ready()
        for fd, size in ((r.ctl_fd, len(r.ctl)), (r.region_fd, len(r.mem))):
            for what, fn in (("shrinking", lambda f=fd: os.ftruncate(f, 0)), ("growing", lambda f=fd, n=size: os.ftruncate(
                    f, n * 2)), ("sealing", lambda f=fd: seal(f, 0x8)), ("future sealing", lambda f=fd: seal(f, 0x10))):
                fails(what, fn)
        equal(punch(r.region_fd, len(r.mem)), 0, "punching its own region")
        r.len_word(0, 100)
        r.request(device=20)

    def stranger(r):
        """Another user who gets hold of the descriptor cannot reopen it for writing."""
        r.hello()
        pid = os.fork()
        if not pid:
            os.setuid(65534)
            try:
                os.open(f"/proc/self/fd/{r.plan_fd}", os.O_RDWR)
                os._exit(1)
            except OSError as e:
                os._exit(0 if e.errno == errno.EACCES else 2)
        equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0, "the stranger's exit status")

    a.attack("writes to published memory in every way", attempts)
    a.attack("resizes and seals exchange memory", exchange)
    if os.getuid() == 0:
        a.attack("another user reopens published memory", stranger)
