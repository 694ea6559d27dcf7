#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""One tenant takes all that it can get, three want what is theirs.

torture 16: quotas, with one greedy tenant and three polite ones
pass: nobody is above its quota at any look; the polite ones get at least 90 % of their share
quick: 10 s
full: 5 minutes
io: both
plants: quota-unchecked region-quota-by-what-it-has one-sequence-too-many

The greedy one opens clients, regions and sequences until it is refused, and goes on asking; its sequences demote as many rows as
there are, all the time. Each polite one holds 75 % of its DRAM quota and runs cycles at a fixed pace (pulse.c). Looks at
what each holds are made all the while.
"""
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from kvtier import ROWS_ALL, Client, Error, Region  # noqa: E402
from lib.neighbours import FULL, Pulse, seconds  # noqa: E402
from lib.rows import LANES, WIDTH, Rows  # noqa: E402
from lib.world import E_LIMIT, E_NOSPC, Tap, World, equal, expect  # noqa: E402

MiB = 1 << 20
DRAM, NVME, REGION, SEQS, CLIENTS = 4 * MiB, 8 * MiB, 24 * MiB, 6, 5
TENANTS = ("greedy", "ann", "bob", "cyd")
ROW = LANES * 2 * WIDTH  # bytes of one position
KEEP = int(0.75 * DRAM / ROW) // 2  # positions that a polite one wants in DRAM, in each of two sequences


class Greedy(threading.Thread):
    """Whatever is refused is asked for again. Counts what it got."""

    def __init__(self, socket):
        super().__init__(daemon=True)
        self.socket, self.stopping, self.error = socket, False, None
        self.clients, self.regions, self.rows, self.refused = [], [], [], {}

    def want(self, what, fn, to):
        try:
            to.append(fn())
        except Error as e:
            expect(e.code in (E_LIMIT, E_NOSPC), f"{what}: {e}")
            self.refused[what] = self.refused.get(what, 0) + 1

    def run(self):
        try:
            n = 0
            while not self.stopping:
                n += 1
                if len(self.clients) <= CLIENTS + 2:
                    self.want("client", lambda: Client(self.socket, name="greedy", timeout_ms=5000), self.clients)
                c = self.clients[n % len(self.clients)]
                if len(self.rows) <= SEQS + 2:
                    self.want("sequence", lambda c=c, n=n: Rows(c, f"greedy{n}", cap=768, stage=64), self.rows)
                if len(self.regions) < 64:
                    self.want("region", lambda c=c: Region(c, MiB), self.regions)
                if self.rows:
                    self.grow(self.rows[n % len(self.rows)])
        except Exception as e:  # noqa: BLE001: told at the end
            self.error = e

    def grow(self, r):
        if r.rows + 600 > 4096:
            r.truncate(0)
        r.append(600 - max(0, max(r.held(lane) for lane in range(LANES)) - 100))
        try:
            r.plan(device=64, dram=ROWS_ALL, nvme=ROWS_ALL)
        except Error as e:
            self.refused["plan"] = self.refused.get("plan", 0) + 1
            expect(e.code in (E_LIMIT, E_NOSPC), f"plan: {e}")
        if max(r.held(lane) for lane in range(LANES)) > 160:
            r.plan(device=64, dram=0, nvme=0)  # what nobody takes is dropped

    def end(self):
        self.stopping = True
        self.join(60)
        expect(not self.error, f"greedy: {self.error!r}")


class Trial:
    def __init__(self, d):
        self.d = d
        self.socket = {t: os.path.join(d.run, t + ".sock") for t in TENANTS}
        self.most = {t: {"dram": 0, "nvme": 0, "sequences": 0} for t in TENANTS}

    def look(self):
        """What a tenant's rows take, padding of their pages aside; and all tenants together with it."""
        s = self.d.status()
        now = {t["name"]: {"dram": t["dram_bytes"], "nvme": t["nvme_bytes"], "sequences": t["sequences"]}
               for t in s["tenants"]}
        for t in TENANTS:
            for name, limit in (("dram", DRAM), ("nvme", NVME), ("sequences", SEQS)):
                self.most[t][name] = max(self.most[t][name], now[t][name])
                expect(now[t][name] <= limit, f"{t}: {name} {now[t][name]}, limit {limit}")
        used = {x["name"]: x.get("used_bytes", 0) for x in s["tiers"]}
        expect(used["dram"] <= len(TENANTS) * DRAM, f"dram: {used['dram']} used, quotas are {len(TENANTS) * DRAM}")

    def polite(self, t):
        """Two sequences whose rows stay where they were asked to be."""
        c = Client(self.socket[t], name=t, timeout_ms=20000)
        out = []
        for i in range(2):
            r = Rows(c, f"{t}{i}", cap=1200, stage=64, max_rows=KEEP + 200)
            while r.rows < KEEP + 64:
                r.append(min(900, KEEP + 64 - r.rows))
                r.plan(device=64, dram=KEEP, nvme=0)
            out.append(r)
        return c, out

    def all_at_once(self, total_s):
        greedy = Greedy(self.socket["greedy"])
        greedy.start()
        time.sleep(0.5)
        polite = {t: self.polite(t) for t in TENANTS[1:]}
        pulses = {t: Pulse(self.socket[t], 10000) for t in TENANTS[1:]}
        looks, end = 0, time.monotonic() + total_s
        for p in pulses.values():
            p.say("as measured")
        while time.monotonic() < end:
            self.look()
            looks += 1
            expect(not greedy.error, f"greedy: {greedy.error!r}")
        worst = 1.0
        for t, p in pulses.items():
            w = p.tell()["windows"]["measured"]
            worst = min(worst, w["n"] / w["due"])
            p.stop()
        greedy.end()
        least = 1.0
        for t, (c, rows) in polite.items():
            for r in rows:
                least = min(least, r.seq.info()["tier_rows"]["dram"] / (KEEP * LANES))
                r.check()
            c.close()
        g = self.most["greedy"]
        print(f"# figure: {looks} looks, greedy at most {g['dram'] / DRAM:.1%} of its DRAM, {g['nvme'] / NVME:.1%} of its NVMe, "
              f"{g['sequences']} of {SEQS} sequences; polite ones held at least {least:.1%} of the rows they asked for and had "
              f"{worst:.1%} of their cycles; refused: {greedy.refused}")
        expect(least >= 0.9, f"a polite one holds {least:.1%} of its rows")
        expect(not FULL or worst >= 0.9, f"a polite one had {worst:.1%} of its cycles")
        expect(g["dram"] > 0.5 * DRAM, f"the greedy one was not: {g}")
        self.limits(greedy)

    def limits(self, greedy):
        """What it may have, to the last one."""
        for what in ("client", "sequence", "region"):
            expect(greedy.refused.get(what), f"no {what} was refused: {greedy.refused}")
        equal(len(greedy.clients), CLIENTS, "clients of the greedy one")
        equal(len(greedy.rows), SEQS, "sequences of the greedy one")
        held = sum(r.region.nbytes for r in greedy.rows) + sum(r.nbytes for r in greedy.regions)
        expect(held <= REGION, f"regions: {held} bytes, limit {REGION}")


def main():
    tap = Tap()
    limits = {"max_dram": DRAM, "max_nvme": NVME, "max_region": REGION, "max_seqs": SEQS, "max_clients_per_uid": CLIENTS}
    tenants = {f"tenant_{t}": {"socket": f"{t}.sock", **limits} for t in TENANTS}
    with World(dram={"size": "32M", "segment": "4M"}, nvme={"size": "64M"}, tenant_default={}, **tenants) as d:
        tap.case("never above quota, polite ones have theirs", Trial(d).all_at_once, seconds(10, 5))
    tap.done()


if __name__ == "__main__":
    main()
