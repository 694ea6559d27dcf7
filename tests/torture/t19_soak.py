#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# torture 19: hours of clients that come, work, go and are killed leave nothing behind
# pass: descriptors flat, RSS slope < 1 MiB/h, nothing left in /dev/shm, /run or the run directory
# quick: 60 s
# full: 2 h
# io: both
# plants: soak-leaks-fd soak-leaks-memory
"""Rounds. In each, clients come and go as fast as they can (connection, model, region, a few rows, a plan, sometimes a
truncation; every fourth leased and dropped), neighbours work at length and compare every row, victims of all kinds are
killed, and an operator reloads, verifies, freezes and looks. Then all leave, and when the daemon holds nothing of
anybody's it is looked at: descriptors, mappings, heap (RssAnon; the DRAM tier and exchange memory are shared memory and
counted apart).

Descriptors and mappings of every quiet moment after the first rounds must be those of the first such moment, but for
segments of the DRAM tier that stay warm. The slope of the heap over the second half of the quiet moments is a least
squares fit with its 95 % interval. A short run has too few moments for MiB an hour to mean anything: what counts there is
growth for each client that came and went, over the whole of it, and growth as such. KVT_MINUTES is how long it takes.
"""
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

from kvtier import ROWS_ALL, Client, Error, Model, Region, Sequence, budget  # noqa: E402
from lib.riders import Rider  # noqa: E402
from lib.rows import Neighbour  # noqa: E402
from lib.victims import Victim  # noqa: E402
from lib.world import E_BUSY, SEED, Failed, Tap, World, equal, expect, until  # noqa: E402

FULL = os.environ.get("KVT_TORTURE") == "full"
SECONDS = 60 * float(os.environ.get("KVT_MINUTES") or (120 if FULL else 1))
ROUND = min(60.0, max(4.0, SECONDS / 10))
WARM = 2               # rounds before the first quiet moment that counts
MIB = 1 << 20
RESTING = ("busy", "idle", "torn")  # of lib.victims; the others are riders, which compare every row
KINDS = ("ephemeral", "busy", "forked", "idle", "leased", "torn")
RND = random.Random(SEED)


# ---- clients that come and go: this file as a program ---------------------------------------------


def visit(socket, rnd, i):
    """One client's life of some milliseconds."""
    with Client(socket, name=f"visitor{i}", timeout_ms=10000, max_seqs=rnd.choice((1, 4, 64))) as c:
        m = Model(c, "visitors", 2, 2, 16)
        layouts, nbytes = m.layout(96, 96)
        r = Region(c, nbytes)
        leased = i % 4 == 0
        s = Sequence(c, m, r, layouts, 2048, leased=leased, ttl_s=1)
        s.append(0, rnd.randrange(8, 90))
        try:
            s.apply(s.wait(s.request(budget(rnd.randrange(1, 8), 64, rnd.choice((0, ROWS_ALL)), manual=True))))
            if rnd.random() < 0.3:
                s.truncate(4)
        except Error as e:
            if e.code != E_BUSY:  # frozen
                raise
        if leased:
            s.drop()
        if rnd.random() < 0.5:
            s.close()
            r.close()


def visitors(socket, seed):
    """Until told to end; then says how many came."""
    rnd, n, going = random.Random(seed), 0, [True]
    signal.signal(signal.SIGTERM, lambda *_: going.clear())
    while going:
        visit(socket, rnd, n)
        n += 1
    print(n, flush=True)


# ---- one round ---------------------------------------------------------------------------------------


class Noise(threading.Thread):
    """Runs fn() again and again until stopped; what it raises fails the test."""

    def __init__(self, fn):
        super().__init__(daemon=True)
        self.fn, self.error, self.stopping = fn, None, False
        self.start()

    def run(self):
        try:
            while not self.stopping:
                self.fn()
        except Exception as e:  # noqa: BLE001: told by stop()
            self.error = e

    def stop(self):
        self.stopping = True
        self.join(60)
        if self.error:
            raise Failed(f"{self.error!r}")
        expect(not self.is_alive(), "does not end")


class Soak:
    def __init__(self, d):
        self.d, self.clients, self.kills, self.n, self.rows = d, 0, 0, 0, 0
        self.quiet = []  # (hours, heap bytes, fds, mappings, clients so far)
        self.begin = time.monotonic()

    def murder(self):
        self.n += 1
        kind = KINDS[self.n % len(KINDS)]
        if kind in RESTING:
            v = Victim(self.d, kind, f"{kind}{self.n}", ttl=1)
            time.sleep(RND.random() * 0.2)
            v.kill()
        else:
            r = Rider(self.d, 1000 + self.n, 2, kind, "ttl=1").spawn()
            try:
                r.served(1)
                time.sleep(RND.random() * 0.3)
                r.p.kill()
                r.p.wait()  # a child of it lives a little longer
                self.rows += r.well()["compared"]
            finally:
                r.close()
                r.path.unlink()
                os.unlink(r.out.name)
        self.kills += 1

    def operate(self):
        self.d.ctl(*RND.choice((("reload",), ("verify", "start"), ("status",), ("ls",), ("policy", "list"))))
        time.sleep(0.2)

    def round(self, seconds):
        come = [subprocess.Popen([sys.executable, __file__, "visitors", self.d.socket, str(SEED + self.n * 7 + i)],
                                 stdout=subprocess.PIPE, text=True) for i in range(2)]
        try:
            for way in ("on", "off"):  # visitors take BUSY for an answer, the others do not
                time.sleep(seconds / 20)
                self.d.ctl("freeze", way)
            others = [Noise(self.murder), Noise(self.operate)]
            neighbour = Neighbour(self.d.socket, "neighbour")
            time.sleep(seconds * 0.9)
            neighbour.stop()
            for o in others:
                o.stop()
        finally:
            for p in come:
                p.terminate()
            said = [p.communicate(timeout=60)[0] for p in come]
        for p, text in zip(come, said):
            equal(p.returncode, 0, "exit status of visitors")
            self.clients += int(text)
        expect(self.d.alive(), "the daemon died")
        self.rest()

    def rest(self):
        """Wait until nothing of anybody's is left, and look."""
        def empty():
            s = self.d.status()
            dram = next(t for t in s["tiers"] if t["name"] == "dram")
            device = next(t for t in s["tiers"] if t["name"] == "device")
            return not (s["clients"] or s["sequences"] or dram["used_bytes"] or device["bytes"])

        until(lambda: f"the daemon still has {self.d.status()}", empty, 30)
        look, last = self.look(), None
        for _ in range(50):  # sockets of the last clients, idle threads
            if look == last:
                break
            time.sleep(0.1)
            look, last = self.look(), look
        self.quiet.append(((time.monotonic() - self.begin) / 3600, *look, self.clients))
        print(f"# {60 * self.quiet[-1][0]:6.1f} min: {self.clients} clients, {self.kills} killed, heap "
              f"{look[0] / MIB:.2f} MiB, {look[1]} descriptors, {look[2]} mappings", flush=True)

    def look(self):
        status = Path(f"/proc/{self.d.pid}/status").read_text()
        self.rss = next(int(x.split()[1]) << 10 for x in status.splitlines() if x.startswith("VmRSS"))
        heap = next(int(x.split()[1]) << 10 for x in status.splitlines() if x.startswith("RssAnon"))
        maps = Path(f"/proc/{self.d.pid}/maps").read_text().splitlines()
        shared = sum(1 for m in maps if "memfd:" in m and "kvtier-dram" not in m)
        return heap, self.d.fds(), shared


# ---- what is said of it --------------------------------------------------------------------------------


def fit(points):
    """Slope of (x, y) and half its 95 % interval."""
    n = len(points)
    mx, my = sum(p[0] for p in points) / n, sum(p[1] for p in points) / n
    sxx = sum((x - mx) ** 2 for x, _ in points)
    slope = sum((x - mx) * (y - my) for x, y in points) / sxx
    rest = sum((y - my - slope * (x - mx)) ** 2 for x, y in points)
    return slope, 1.96 * math.sqrt(rest / max(1, n - 2) / sxx)


def flat(soak):
    """Descriptors and mappings."""
    first = soak.quiet[WARM]
    for q in soak.quiet[WARM:]:
        equal(q[2:4], first[2:4], f"descriptors and mappings after {q[0] * 60:.1f} min")
    print(f"# figure: {soak.clients:,} clients and {soak.kills:,} killed in {soak.quiet[-1][0] * 60:.0f} min, "
          f"{soak.rows:,} rows right: "
          f"{first[2]} descriptors and {first[3]} mappings in every quiet moment")


def slope(soak):
    later = soak.quiet[max(WARM, len(soak.quiet) // 2):]
    first, last = soak.quiet[WARM], soak.quiet[-1]
    grown, came = last[1] - first[1], last[4] - first[4]
    s, half = fit([(q[0], q[1]) for q in later]) if len(later) > 2 else (0.0, math.inf)
    print(f"# figure: RSS {soak.rss / MIB:.1f} MiB, of it heap {last[1] / MIB:.1f} MiB, {grown / MIB:+.2f} MiB over {came:,} clients; slope "
          f"{s / MIB:+.2f} ± {half / MIB:.2f} MiB/h (95 %)")
    expect(came > 20, f"only {came} clients came after the first rounds: nothing was tried")
    expect(grown < MIB + 128 * came and grown < 8 * MIB,
           f"the heap grew by {grown} bytes, {grown // came} for each client")
    if FULL and SECONDS >= 1800:
        expect(s < MIB, f"slope {s / MIB:.2f} ± {half / MIB:.2f} MiB/h, must be below 1")


def in_use(path):
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link).startswith(str(path)):
                return True
        except OSError:
            pass
    return False


def ours():
    return {p for d in ("/dev/shm", "/run") for p in Path(d).iterdir() if "kvt" in p.name}


def nothing_left(d, before):
    run = Path(d.run)
    d.stop()
    equal(d.proc.returncode, 0, "exit status")
    left = {p.name for p in run.iterdir()} - {"kvtierd.conf", "log", "models"}
    expect(not left, f"left in the run directory: {left}")
    new = {p for p in ours() - before if not in_use(p)}  # another test's, running beside this one
    expect(not new, f"left behind: {new}")


def main():
    if sys.argv[1:2] == ["visitors"]:
        visitors(sys.argv[2], int(sys.argv[3]))
        return
    tap, before = Tap(), ours()
    with World(dram={"size": "24M", "segment": "4M"}, tenant_default={"max_clients_per_uid": 64}) as d:
        soak = Soak(d)

        def live():
            while time.monotonic() - soak.begin < SECONDS or len(soak.quiet) < WARM + 3:
                soak.round(ROUND)

        tap.case("clients come, work, go and are killed", live)
        if tap.bad == 0:
            tap.case("descriptors and mappings are flat", flat, soak)
            tap.case("the heap does not grow", slope, soak)
        tap.case("nothing is left at the end", nothing_left, d, before)
    tap.done()


if __name__ == "__main__":
    main()
