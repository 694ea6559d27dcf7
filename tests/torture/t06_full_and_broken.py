#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
torture 6: file systems that run full and a device that loses half of itself, below a running daemon
pass: no crash; nothing failed is ever visible; the status says why; space comes back
quick: ext4 and tmpfs full, a loop device cut short while the daemon runs and while it does not
full: the same, eight times
io: both
plants: failed-page-visible

Real errors of real file systems: the container's blocks are punched out and the rest of the file system is filled, so
that writes end with ENOSPC; the file behind an attached loop device is cut, so that reads end with EIO. Every
row names sequence, lane, position and epoch (lib/rows.py) and is compared. All of it happens in a mount namespace of
its own; loop devices are detached.
"""
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "integration"), str(ROOT / "ipc" / "python")]

from kvtier import ROWS_ALL, Client, Error  # noqa: E402
from lib import disk  # noqa: E402
from lib.rows import LANES, Rows  # noqa: E402
from lib.world import Skip, Tap, World, equal, expect, matches, until  # noqa: E402

STORE = {"size": "24M", "preallocate": "no"}
TOTAL = {"rows": 0, "failed": 0, "lost": 0}


@contextlib.contextmanager
def ext4(mib):
    with disk.small_disk(mib) as where:
        yield where


@contextlib.contextmanager
def tmpfs(mib):
    if os.getuid():
        raise Skip("needs root to mount")
    where = tempfile.mkdtemp(prefix="kvt.")
    try:
        disk.sh("mount", "-t", "tmpfs", "-o", f"size={mib}M", "tmpfs", where)
        try:
            yield where
        finally:
            disk.put_back(("umount", where))
    finally:
        os.rmdir(where)


def fill(where, spare):
    """A file that leaves this many bytes."""
    path = os.path.join(where, "filler")
    st = os.statvfs(where)
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        os.posix_fallocate(fd, 0, st.f_bavail * st.f_frsize - spare)
    finally:
        os.close(fd)
    return path


def punch(path):
    """Give back the blocks of all segments; what is written there later needs new ones."""
    disk.sh("fallocate", "--punch-hole", "--offset", str(disk.PREAMBLE), "--length",
            str(os.path.getsize(path) - disk.PREAMBLE), str(path))


def accounted(r):
    info = r.seq.info()
    equal(sum(info["tier_rows"].values()) + info["dropped_rows"], r.rows * LANES, "rows accounted for")
    TOTAL["rows"] += r.check()


def demote_until_full(d, c):
    seqs = []
    for i in range(8):
        r = Rows(c, f"full{i}", cap=4096, stage=4096, equal_lanes=False)
        r.append(3000)
        seqs.append(r)
        try:
            r.plan(device=50, nvme=ROWS_ALL, timeout_ms=4000)
        except Error:
            break
    for r in seqs:
        accounted(r)
        try:  # all of it back: what was said to be stored is served, and nothing else
            r.plan(device=ROWS_ALL, nvme=0, timeout_ms=4000)
        except Error:
            pass
        accounted(r)
    return seqs


def full(file_system):
    with file_system(40) as where, World(store=where, nvme=STORE) as d:
        d.stop()
        punch(Path(where, disk.CONTAINER))
        filler = fill(where, 3 << 20)
        d.start()
        with Client(d.socket, timeout_ms=10000) as c:
            seqs = demote_until_full(d, c)
            tier, misses = d.tier("nvme"), d.status()["misses"]
            TOTAL["failed"] += tier["errors"]
            expect(tier["errors"] and misses["io"] + misses["nospace"], f"nothing failed: {tier}, {misses}")
            matches(tier["note"], r"requests failed, last a \w+: No space left on device", "the tier's note")
            expect(d.alive(), "the daemon died")
            for r in seqs:
                r.close()
            until("space comes back", lambda: d.tier("nvme")["used_bytes"] == 0, 10)
            os.unlink(filler)
            time.sleep(1.1)  # the tier waits that long after a failed head
            before = d.tier("nvme")["errors"]
            r = Rows(c, "afterwards", cap=4096, stage=4096)
            r.append(3000)
            r.plan(device=50, nvme=ROWS_ALL)
            r.whole()
            TOTAL["rows"] += r.check()
        again = d.tier("nvme")["errors"]
        equal(again, before, "errors after there is room again")


def image_of(where):
    device = disk.sh("findmnt", "--noheadings", "--output", "SOURCE", where)
    return disk.sh("losetup", "--noheadings", "--output", "BACK-FILE", device)


def cut(where):
    """Everything past the middle of the second segment goes; the kernel answers reads there with EIO."""
    kept = (disk.PREAMBLE + (3 << 19)) // disk.UNIT
    for line in disk.sh("filefrag", "-v", f"-b{disk.UNIT}", os.path.join(where, disk.CONTAINER)).splitlines():
        m = re.match(r" *\d+: *(\d+)\.\. *(\d+): *(\d+)\.\.", line)
        if m and int(m[1]) <= kept <= int(m[2]):
            os.truncate(image_of(where), (int(m[3]) + kept - int(m[1])) * disk.UNIT)
            return
    raise Skip("filefrag does not say where the container lies")


def broken(running):
    with disk.small_disk(40) as where, World(store=where, nvme=STORE) as d:
        disk.sequences(d)
        if running:
            d.start()
        cut(where)
        if not running:
            d.start()
        there = disk.come_back(d)
        tier, status = d.tier("nvme"), d.status()
        everything = 6 * 700 * LANES
        print(f"# {there} of {everything} rows came back; {tier['note']}")
        expect(0 <= there < everything, f"{there} of {everything} rows came back: nothing was lost")
        if running:
            expect(status["misses"]["io"] > 0, f"no miss: {status['misses']}")
        matches(tier["note"], "Input/output error" if running else "Input/output error|unreadable at the restart",
                "the tier's note")
        TOTAL["rows"] += there
        TOTAL["lost"] += everything - there
        with Client(d.socket) as c:
            r = Rows(c, "dram")
            r.append(300)
            r.plan(device=20, dram=ROWS_ALL)
            r.whole()


def in_namespace():
    """Mounts are nobody else's business, and go with us."""
    if os.getuid() or os.environ.get("KVT_UNSHARED") or not shutil.which("unshare"):
        return
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0:
        os.environ["KVT_UNSHARED"] = "1"
        os.execvp("unshare", ["unshare", "-m", sys.executable, __file__])


def main():
    in_namespace()
    tap = Tap()
    for n in range(8 if os.environ.get("KVT_TORTURE") == "full" else 1):
        tap.case(f"an ext4 without blocks, run {n + 1}", lambda: full(ext4))
        tap.case(f"a tmpfs without pages, run {n + 1}", lambda: full(tmpfs))
        tap.case(f"a device cut short while the daemon runs, run {n + 1}", lambda: broken(True))
        tap.case(f"a device cut short while it does not, run {n + 1}", lambda: broken(False))
    print(f"# figure: {TOTAL['failed']:,} real ENOSPC, {TOTAL['lost']:,} rows lost to real EIO, "
          f"{TOTAL['rows']:,} rows checked, 0 wrong")
    tap.done()


if __name__ == "__main__":
    main()
