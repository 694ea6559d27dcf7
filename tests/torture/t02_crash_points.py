#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# torture 2: the daemon dies at every step of the NVMe write path
# pass: all points hit, 0 wrong bytes
# quick: each point twice
# full: each point 20 times
# io: both
# plants: sealed-before-written source-freed-at-copy restart-forgets-cut source-freed-before-the-seal
# points: nvme.create.filled nvme.create.super nvme.create.rename nvme.create.renamed nvme.super.write nvme.super.written
# points: nvme.head.write nvme.head.written nvme.head.synced nvme.segment.take nvme.page.write nvme.page.submitted
# points: nvme.page.written page.indexed nvme.segment.close nvme.maps.written nvme.maps.synced nvme.foot.write
# points: nvme.foot.written nvme.foot.synced nvme.page.free nvme.map.write nvme.map.written nvme.segment.free
# points: nvme.clean.table nvme.clean.copy nvme.clean.copied nvme.clean.moved nvme.clean.done
# points: note.written restart.rebuilt ledger.begin ledger.begun ledger.cut ledger.was-cut ledger.ended ledger.return
"""The trial build kills itself where the environment says (shm/trial.h), at the first or a later time it comes there.
Riders (t01_daemon_killed.py) keep a small store busy, so that segments are sealed, freed, cleaned and used again; after
each death the next daemon, with the next point to die at, gives them back what is left, and they compare it.

Beside them lie sequences at rest, stored and flushed before the first death, among rows that come and go: whatever
happens, they come back whole, to the byte. So a page that was freed, or not moved, too early is missed at once. Others
lose rows between two deaths, so that NVMe rewrites their pages: what they had left must be there after the next one.
"""
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from kvtier import ROWS_ALL, Client, Error  # noqa: E402
from kvtier.daemon import build_dir  # noqa: E402
import about  # noqa: E402
from lib.riders import Rider, full, total  # noqa: E402
from lib.rows import LANES, Rows  # noqa: E402
from lib.victims import leased, resume  # noqa: E402
from lib.world import SEED, Failed, Tap, World, equal, expect, until  # noqa: E402

POINTS = about.read(Path(__file__)).points
CREATE = [p for p in POINTS if p.startswith(("nvme.create.", "nvme.super."))]
START = ["restart.rebuilt", "ledger.return"]  # come once with a start
SELDOM = ("nvme.clean.", "nvme.segment.", "nvme.maps.", "nvme.foot.", "nvme.head.", "ledger.end", "ledger.beg")
RIDERS, ANCHORS, ROWS = 3, 14, 600
THINNED, THIN_STEPS = 3, 5
STORE = {"size": "24M", "segment": "1M", "preallocate": "no"}


def trial():
    return build_dir() if (build_dir() / "kvtierd").exists() and "trial" in str(build_dir()) else build_dir() / "trial"


class Mortal(World):
    """A daemon that is to die at a point, or none."""

    def __init__(self, **sections):
        super().__init__(**sections)
        self.binary = str(trial() / "kvtierd")
        self.seen = Path(self.run) / "seen"

    def begin(self, point=None, nth=1):
        for k in ("KVT_CRASH", "KVT_CRASH_SEEN"):
            os.environ.pop(k, None)
        if point:
            os.environ["KVT_CRASH"] = f"{point}:{nth}"
        os.environ["KVT_CRASH_SEEN"] = str(self.seen)
        try:
            self.start()
        except RuntimeError:
            expect(point and self.proc.returncode == -9, f"it does not start: {self.log_lines()[-3:]}")
        finally:
            for k in ("KVT_CRASH", "KVT_CRASH_SEEN"):
                os.environ.pop(k, None)

    def has_died(self):
        if self.proc.poll() is None:
            return False
        expect(self.proc.returncode == -9, f"exit status {self.proc.returncode}, must be SIGKILL")
        return True


def creation(times):
    """Dead while it makes its store: the next one has a store."""
    for point in CREATE:
        for nth in range(times):
            d = Mortal(nvme=STORE)
            try:
                d.begin(point)
                expect(d.has_died(), f"{point}: not reached")
                d.begin()
                with Client(d.socket) as c:
                    r = Rows(c, "first")
                    r.append(300)
                    r.plan(device=20, dram=0, nvme=ROWS_ALL)
                    r.whole()
            finally:
                World.__exit__(d, *sys.exc_info())


class Anchors:
    """Leased sequences at rest."""

    def __init__(self, d):
        self.d, self.next = d, 0
        for i in range(ANCHORS):
            with Client(d.socket, name=f"anchor{i}") as c:
                r = Rows(c, f"anchor{i}", ttl_s=3600, **leased(f"anchor{i}"))
                r.append(ROWS)
                until(f"anchor{i} is stored", lambda: self.stored(r), 10)
                r.close()

    @staticmethod
    def stored(r):
        """The store is small and others fill it: what does not fit stays on the device."""
        r.plan(device=0, dram=0, nvme=ROWS_ALL)
        return r.seq.info()["tier_rows"]["nvme"] == ROWS * LANES

    def look(self, n=1):
        """The next n of them: whole. A daemon that dies meanwhile is asked again by the caller."""
        for _ in range(n):
            tag = f"anchor{self.next % ANCHORS}"
            with Client(self.d.socket, name=tag, timeout_ms=10000) as c:
                r = resume(self.d, tag, c, seconds=10, ttl_s=3600)
                equal(r.rows, ROWS, f"{tag}: rows")
                r.plan(ROWS_ALL, 0, ROWS_ALL)
                there = r.check()
                equal(there, ROWS * LANES, f"{tag}: rows that came back")
                r.plan(0, 0, ROWS_ALL)
                r.close()
            self.next += 1


class Thinned:
    """Leased sequences at rest that lose rows again and again, so that their pages are rewritten; the daemon is killed
    while what took the rest of the rows lies in a segment that is not sealed."""

    def __init__(self, d):
        self.d, self.rnd, self.turn, self.kept = d, random.Random(SEED), 0, {}
        for i in range(THINNED):
            with Client(d.socket, name=f"thin{i}") as c:
                r = Rows(c, f"thin{i}", ttl_s=3600, **leased(f"thin{i}"))
                r.append(ROWS)
                until(f"thin{i} is stored", lambda: Anchors.stored(r), 10)
                self.kept[i] = [set(range(ROWS)) for _ in range(LANES)]
                r.close()

    def step(self):
        """Look at one, and let it drop more than half of its rows. Returns how many were expected."""
        i = self.turn % THINNED
        self.turn += 1
        known = self.kept[i]
        with Client(self.d.socket, name=f"thin{i}", timeout_ms=10000) as c:
            r = resume(self.d, f"thin{i}", c, seconds=10, ttl_s=3600)
            r.plan(ROWS_ALL, 0, ROWS_ALL)
            for lane in range(LANES):
                gone = known[lane] - set(r.seq.resident(lane))
                expect(not gone, f"thin{i}: lane {lane}: {len(gone)} of {len(known[lane])} rows that were stored are gone")
            r.plan(0, 0, ROWS_ALL)
            if len(known[0]) > 20:
                r.plan(0, 0, int(len(known[0]) * 0.4), policy="random")
            r.plan(ROWS_ALL, 0, ROWS_ALL)
            self.kept[i] = [set(r.seq.resident(lane)) for lane in range(LANES)]
            r.plan(0, 0, ROWS_ALL)
            time.sleep(self.rnd.random() * 0.02)
            r.close()
        return sum(map(len, known))


def every_point(times, rounds):
    rnd = random.Random(SEED)
    reached = {}
    with Mortal(dram={"size": "8M", "segment": "4M"}, nvme=STORE) as d:
        riders = [Rider(d, SEED + i, 2).spawn() for i in range(RIDERS)]
        try:
            for r in riders:
                r.served(1)
            anchors, thinned, known = Anchors(d), Thinned(d), 0
            d.stop()  # a clean end: the anchors are on disk from here on
            deaths = [p for p in POINTS if p not in CREATE] * times
            rnd.shuffle(deaths)
            for point in deaths:
                nth = 1 if point in START else 1 + rnd.randrange(2 if point.startswith(SELDOM) else 10)
                before = [r.count()["losses"] for r in riders]
                d.begin(point, nth)
                until(f"{point} is reached the {nth}th time", d.has_died, 25)
                reached[point] = reached.get(point, 0) + 1
                d.begin()
                for r, n in zip(riders, before):
                    r.served(n + 1)
                try:
                    anchors.look()
                except (Error, Failed) as e:
                    raise Failed(f"after a death at {point}, the {nth}th time: anchor{anchors.next % ANCHORS}: {e}") from e
                if thinned.turn < THINNED * THIN_STEPS:
                    known += thinned.step()
                d.kill()
            d.begin()
            anchors.look(ANCHORS)
            before = total(riders)
            for r in riders:
                r.stop()
        finally:
            for r in riders:
                r.close()
    expect(known, "no sequence was thinned")
    rounds.append((reached, before, known))


def main():
    tap, rounds = Tap(), []
    times = 20 if full() else 2
    if not (trial() / "kvtierd").exists():
        print("1..0 # SKIP no trial build: make trial")
        return
    tap.case(f"killed while the store is made, {len(CREATE)} points", creation, 3 if full() else 1)
    if tap.case(f"killed at each of {len(POINTS) - len(CREATE)} points, {times} times: nothing wrong, nothing stored is missed",
                every_point, times, rounds):
        reached, c, known = rounds[0]
        print(f"# figure: {sum(reached.values()) + len(CREATE) * (3 if full() else 1):,} deaths at {len(POINTS)} points of the write path, all "
              f"reached; 0 of {c['compared']:,} rows compared wrong, 0 stored rows missing, "
              f"0 of {known:,} that were being rewritten, {c['resumed']:,} sequences resumed")
    tap.done()


if __name__ == "__main__":
    main()
