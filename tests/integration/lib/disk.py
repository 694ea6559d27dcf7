# SPDX-License-Identifier: MIT
"""The store on disk: missing, locked, full, damaged, of another version."""
import contextlib
import os
import random
import shutil
import stat
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from kvtier import ROWS_ALL, Client, Error

from .rows import LANES, Rows
from .victims import leased, resume
from .world import E_NOENT, SEED, Failed, Skip, World, equal, expect, matches

UNIT, PREAMBLE, SUPER_B = 4096, 1 << 20, 512 << 10
CONTAINER = "kvtier-000.dat"
POLY = 0x82F63B78
TABLE = []
for _i in range(256):
    for _ in range(8):
        _i = _i >> 1 ^ (POLY if _i & 1 else 0)
    TABLE.append(_i)


def crc32c(data):
    crc = 0xFFFFFFFF
    for b in data:
        crc = crc >> 8 ^ TABLE[(crc ^ b) & 255]
    return crc ^ 0xFFFFFFFF


assert crc32c(b"123456789") == 0xE3069283


# ---- where it lies ---------------------------------------------------------------------


def missing():
    with tempfile.TemporaryDirectory(prefix="kvt.") as t:
        d = World(store=os.path.join(t, "not", "there"))
        d.refuses_to_start(rf"nvme path {t}/not/there: cannot be made: No such file or directory")
        Path(t, "file").write_text("a file")
        d.configure(nvme={"path": os.path.join(t, "file")})
        d.refuses_to_start(rf"nvme path {t}/file: Not a directory")
        equal(Path(t, "file").read_text(), "a file", "the file that lay there")
        discard(d)


def not_writable():
    if os.getuid():
        raise Skip("needs root to start a daemon as another user")
    with tempfile.TemporaryDirectory(prefix="kvt.") as t:
        os.chmod(t, 0o755)
        d = World(store=t)
        for p in (d.run, d.models, d.config):
            os.chown(p, 65534, 65534)
        binary = shutil.copy(d.binary, d.run)
        os.chmod(binary, 0o755)
        d.binary = binary
        d.refuses_to_start(rf"nvme path {t}: .*Permission denied", user=65534, group=65534, extra_groups=[])
        equal(os.listdir(t), [], "what was left there")
        discard(d)


def locked():
    with World() as d:
        other = World(store=d.store)
        other.refuses_to_start(rf"nvme path {d.store}: in use by another daemon")
        discard(other)
        twin = World(store=d.store)
        twin.config = d.config
        twin.refuses_to_start(r"another kvtierd listens there")
        discard(twin)
        with Client(d.socket) as c:
            r = Rows(c, "first")
            r.append(100)
            r.plan(device=10, nvme=ROWS_ALL)
            r.whole()


def discard(d):
    for p in (d.run, d.own_store):
        shutil.rmtree(p, ignore_errors=True)


# ---- a small disk -------------------------------------------------------------------------


def sh(*argv):
    p = subprocess.run(argv, capture_output=True, text=True, check=False)
    if p.returncode:
        raise Skip(f"{' '.join(argv[:2])}: {p.stderr.strip().splitlines()[-1] if p.stderr.strip() else p.returncode}")
    return p.stdout.strip()


def put_back(argv):
    """The kernel lets go of files that were registered with io_uring a little after their process."""
    end = time.monotonic() + 10
    while subprocess.run(argv, capture_output=True, check=False).returncode:
        if time.monotonic() > end:
            raise Failed(f"cannot put back: {' '.join(argv)}")
        time.sleep(0.05)


@contextlib.contextmanager
def small_disk(mib, host_mib=None):
    """An ext4 of this many MiB on a loop device; with host_mib its file lies on a tmpfs that is smaller."""
    if os.getuid() or not shutil.which("losetup") or not shutil.which("mkfs.ext4"):
        raise Skip("needs root, losetup and mkfs.ext4")
    top = tempfile.mkdtemp(prefix="kvt.")
    undo = [("rm", "-rf", top)]
    try:
        if host_mib:
            sh("mount", "-t", "tmpfs", "-o", f"size={host_mib}M", "tmpfs", top)
            undo.append(("umount", top))
        image, where = os.path.join(top, "image"), tempfile.mkdtemp(prefix="kvt.")
        undo.append(("rmdir", where))
        with open(image, "wb") as f:
            f.truncate(mib << 20)
        loop = sh("losetup", "--find", "--show", image)
        undo.append(("losetup", "--detach", loop))
        sh("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", "-E", "nodiscard", loop)
        sh("mount", "-o", "errors=continue", loop, where)
        undo.append(("umount", where))
        yield where
    finally:
        for argv in reversed(undo):
            put_back(argv)


def disk_too_small():
    with small_disk(24) as where:
        d = World(store=where, nvme={"size": "64M"})
        d.refuses_to_start(rf"nvme path {where}: size \d+ cannot be made there: No space left on device")
        equal([f for f in os.listdir(where) if f != "lost+found"], [], "what was left there")
        discard(d)


def disk_runs_full():
    """The file system has promised blocks that its device does not have: writes fail in the middle of life."""
    with small_disk(48, host_mib=12) as where:
        with World(store=where, nvme={"size": "24M", "preallocate": "no"}) as d, Client(d.socket, timeout_ms=10000) as c:
            seqs = []
            for i in range(8):
                r = Rows(c, f"disk{i}", cap=4096, stage=4096, equal_lanes=False)
                r.append(4000)
                seqs.append(r)
                try:
                    r.plan(device=50, nvme=ROWS_ALL, timeout_ms=4000)
                except Error:
                    break
            s = d.status()
            expect(s["misses"]["io"] + s["misses"]["nospace"] > 0 or d.tier("nvme")["errors"],
                   f"nothing failed: {s['misses']}")
            for r in seqs:
                info = r.seq.info()
                equal(sum(info["tier_rows"].values()) + info["dropped_rows"], r.rows * LANES, "rows accounted for")
                r.check()
            expect(d.alive(), "the daemon died")
            r = Rows(c, "dram")
            r.append(300)
            r.plan(device=20, dram=ROWS_ALL)
            r.whole()


# ---- damage -----------------------------------------------------------------------------------


def sequences(d, n=6, rows=700):
    """n leased sequences that are on NVMe alone, and the daemon stopped in order."""
    with Client(d.socket) as c:
        for i in range(n):
            r = Rows(c, f"kept{i}", ttl_s=60, **leased(f"kept{i}"))
            r.append(rows)
            r.plan(device=0, nvme=ROWS_ALL)
            r.close()
    d.stop()
    equal(d.proc.returncode, 0, "exit status")


def come_back(d, n=6, rows=700):
    """Rows that come back are right; returns how many of all do."""
    there = 0
    with Client(d.socket) as c:
        for i in range(n):
            try:
                r = resume(d, f"kept{i}", c)
            except Error as e:
                equal(e.code, E_NOENT, f"code ({e})")
                continue
            # Without rows there is nothing to decide; a plan that misses is made again without what it missed.
            for _ in range(8 if r.rows else 0):
                r.plan(ROWS_ALL, 0, ROWS_ALL)
                info = r.seq.info()
                if info["tier_rows"]["nvme"] == 0:
                    break
            there += r.check()
            info = r.seq.info()
            equal(sum(info["tier_rows"].values()) + info["dropped_rows"], r.rows * LANES, "rows accounted for")
            r.close(drop=True)
    return there


def damaged():
    rnd = random.Random(SEED)
    with World() as d:
        sequences(d)
        path = Path(d.store, CONTAINER)
        expect(stat.S_IMODE(path.stat().st_mode) == 0o600, "the container is readable by others")
        used = [at for at, unit in units(path) if at >= PREAMBLE and any(unit)]
        with open(path, "r+b") as f:
            for at in rnd.sample(used, len(used) // 8):
                f.seek(at + rnd.randrange(UNIT))
                f.write(bytes([rnd.randrange(256)]))
        d.start()
        there = come_back(d)
        expect(0 < there < 6 * 700 * LANES, f"{there} rows came back of {6 * 700 * LANES}")
        bad = d.status()["misses"]["corrupt"]
        print(f"# {there} of {6 * 700 * LANES} rows came back, all right; {bad} pages counted as corrupt")
        sequences_again(d)


def sequences_again(d):
    with Client(d.socket) as c:
        r = Rows(c, "afterwards")
        r.append(300)
        r.plan(device=10, nvme=ROWS_ALL)
        r.whole()


def units(path):
    with open(path, "rb") as f:
        at = 0
        while unit := f.read(UNIT):
            yield at, unit
            at += UNIT


def trampled():
    """Whole segments overwritten with noise, and one cut into zeros."""
    with World() as d:
        sequences(d)
        with open(Path(d.store, CONTAINER), "r+b") as f:
            f.seek(PREAMBLE)
            f.write(os.urandom(1 << 20))
            f.write(bytes(1 << 20))
        d.start()
        expect(come_back(d) < 6 * 700 * LANES, "nothing is missing")
        sequences_again(d)


def superblocks():
    with World() as d:
        sequences(d)
        path = Path(d.store, CONTAINER)
        with open(path, "r+b") as f:
            sound = [(at, read(f, at)) for at in (0, SUPER_B)]
            for at, unit in sound:
                put(f, at, sealed(unit, version=2))
            d.refuses_to_start(rf"{CONTAINER}: version 2, this daemon knows 1")
            equal(read(f, 0), sealed(sound[0][1], version=2), "a store of another version")
            for at, unit in sound:
                put(f, at, unit[:100] + b"\xff" * 8 + unit[108:])
            d.refuses_to_start(rf"{CONTAINER}: superblock: checksum wrong in both places")
            put(f, *sound[0])
            put(f, *sound[1])
            newer = max(sound, key=lambda s: struct.unpack_from("<Q", s[1], 32)[0])
            put(f, newer[0], os.urandom(UNIT))
        d.start()
        equal(come_back(d), 6 * 700 * LANES, "rows, with one superblock left")


def read(f, at):
    f.seek(at)
    return f.read(UNIT)


def put(f, at, unit):
    f.seek(at)
    f.write(unit)
    f.flush()
    os.fsync(f.fileno())


def sealed(unit, version):
    unit = bytearray(unit)
    struct.pack_into("<II", unit, 8, version, 0)
    struct.pack_into("<I", unit, 12, crc32c(unit))
    return bytes(unit)


def other_size():
    with World() as d:
        sequences(d, n=1)
        d.configure(nvme={"size": "32M"})
        d.refuses_to_start(rf"{CONTAINER}: size 6\d+, configured 3\d+")
        d.configure(nvme={"segment": "2M"})
        matches(d.refuses_to_start(rf"{CONTAINER}: segment 1048576, configured 2097152"), "segment", "the line")
        d.configure()
        os.truncate(Path(d.store, CONTAINER), 5 << 20)
        d.refuses_to_start(rf"{CONTAINER}: file size 5242880, superblock says \d+")


def cases(tap):
    tap.case("the store's directory is missing, or a file", missing)
    tap.case("the store's directory is not writable", not_writable)
    tap.case("the store is locked by another daemon", locked)
    tap.case("a disk that is too small for the store", disk_too_small)
    tap.case("a disk that runs out of blocks in the middle of life", disk_runs_full)
    tap.case("bytes flipped in the store: right rows or counted misses", damaged)
    tap.case("segments overwritten with noise", trampled)
    tap.case("superblocks: another version, both bad, one bad", superblocks)
    tap.case("a store of another size, and one that was cut", other_size)
