#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# torture 1: the daemon is killed at random times under busy clients
# pass: 0 wrong bytes; restart to serving p99 < 2 s
# quick: 50 kills, 4 clients
# full: 1,000 kills, 4 clients each
# io: both
# plants: restart-forgets-cut cut-not-in-ledger restart-revives-ended
"""Four riders append, demote to DRAM and NVMe, promote, cut, append again, fork, close and resume by name, drop and
begin anew, three leased sequences each. The daemon gets SIGKILL at a random moment, in a third of the cases before
the riders have come back from the last time. Each rider finds the new daemon, resumes what it leased and compares all
that is left; what is not left must be counted as dropped. Rows are told apart by sequence, lane, position and
generation (rider.c), so that a row from before a truncation, a drop or a restart is as wrong as a changed byte.
"""
import os
import random
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from lib.riders import Rider, added, full, percentile, total  # noqa: E402
from lib.world import SEED, Tap, World, expect  # noqa: E402

RIDERS = 4


def ride(kills, seed, took, counts):
    """One daemon after another under four riders; served times (s) are added to `took`."""
    rnd = random.Random(seed)
    with World(dram={"size": "8M", "segment": "4M"}, nvme={"size": "64M", "segment": "1M", "preallocate": "no"}) as d:
        riders = [Rider(d, seed * RIDERS + i).spawn() for i in range(RIDERS)]
        try:
            lost = [0] * RIDERS
            for r in riders:
                r.served(1)
            for _ in range(kills):
                hasty = rnd.random() < 0.33
                time.sleep(rnd.random() * (0.05 if hasty else 0.4))
                before = [r.count()["losses"] for r in riders]
                d.kill()
                killed = time.monotonic_ns()
                d.start()
                if hasty:
                    continue
                for i, r in enumerate(riders):
                    took.append((max(r.served(before[i] + 1), killed) - killed) / 1e9)
            for i, r in enumerate(riders):
                r.served(lost[i])
                r.stop()
            counts.append(total(riders))
            expect(d.alive(), "the daemon died by itself")
        finally:
            for r in riders:
                r.close()


def main():
    tap, took, counts, errors = Tap(), [], [], []
    kills = 1000 if full() else 50
    worlds = max(1, min(8, (os.cpu_count() or 1) // RIDERS)) if full() else 1

    def one(seed):
        try:
            ride(-(-kills // worlds), seed, took, counts)
        except BaseException as e:  # noqa: BLE001: told by the case
            errors.append(e)

    def all_of_them():
        threads = [threading.Thread(target=one, args=(SEED + i,)) for i in range(worlds)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if errors:
            raise errors[0]

    def meant_something():
        for what, least in (("compared", 10000), ("resumed", 50), ("cuts", 50), ("forks", 5)):
            n = sum(c[what] for c in counts)
            expect(n >= least, f"{what}: {n}, must be at least {least} or the test proves nothing")

    if tap.case(f"{kills} kills: no row is wrong, what is lost is counted", all_of_them):
        tap.case("rows were compared, sequences resumed, cut and forked", meant_something)
        c = added(counts)
        p99 = percentile(took, 99)
        print(f"# figure: {kills:,} kills of the daemon, 0 of {c['compared']:,} rows compared wrong, {c['resumed']:,} sequences "
              f"resumed, {c['gone']:,} gone, {c['cuts']:,} cuts; kill to serving again p50 {percentile(took, 50):.2f} s, p99 {p99:.2f} s")
        if full():
            tap.case("restart to serving p99 < 2 s", lambda: expect(p99 < 2, f"{p99:.2f} s"))
    tap.done()


if __name__ == "__main__":
    main()
