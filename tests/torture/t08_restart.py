#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
torture 8: restarts and upgrades of the daemon under 16 live clients, DRAM in the service manager's fd store
pass: all back < 5 s, rows below the device still there, stale handles 100 % refused
quick: 10 restarts
full: 200 restarts
io: both
plants: dram-record-late restart-skips-epoch-cut restart-frees-the-empty handles-start-over source-freed-before-the-seal

The test plays systemd (lib/manager.py): it holds the listening sockets and the fd store, kills the daemon or asks it
to end, and starts it again, every third time from a copy of the program in another file. Half of the restarts are done
without an NVMe tier, half with one.

Each client has a leased sequence of patterned rows (lib/rows.py: every row names sequence, truncation, lane, K or V and
position). Eight clients are at rest when the daemon goes, after rounds of appends, truncations and plans; what their
last plan demoted to DRAM, and what a drain took to NVMe before, is known to the row, and must be there again, and right,
to the byte, also where a plan has just begun to move it from DRAM to NVMe. Eight are in the middle of anything; what comes back of theirs must be right to the byte. After a kill, rows that were only on the device
are gone; after a drain every row of every client must be back.

A sequence that was dropped, on disk and in DRAM, and whose key was used anew before a kill must not lend the new one its
rows.

A sequence of which nothing was below the device is resumed without rows, with its secret only.

A client of raw messages keeps all the handles it ever had, of every life, and offers them on its next connection, beside
live ones of the same numbers.
"""
import os
import random
import shutil
import struct
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from kvtier import ROWS_ALL, Client, Error  # noqa: E402
from lib import raw  # noqa: E402
from lib.manager import Managed  # noqa: E402
from lib.rows import LANES, Rows  # noqa: E402
from lib.victims import leased, refused, resume  # noqa: E402
from lib.world import E_NOENT, E_STALE, SEED, Failed, Tap, equal, expect, until  # noqa: E402

FULL = os.environ.get("KVT_TORTURE") == "full"
RESTARTS = int(os.environ.get("KVT_RESTARTS", 200 if FULL else 10))
CLIENTS, RESTING = 16, 8
CAP = 512
WAYS = ("kill", "term", "kill", "upgrade")


class Seat:
    """A client, its sequence, and what is known to be below the device."""

    def __init__(self, d, i):
        self.d, self.tag, self.rnd = d, f"seat{i}", random.Random(SEED * 100 + i)
        self.client = Client(d.socket, name=self.tag, timeout_ms=10000)
        self.rows = Rows(self.client, self.tag, cap=CAP, stage=CAP, ttl_s=600, **leased(self.tag))
        self.below = [set() for _ in range(LANES)]  # known to be there, per lane
        self.all = self.below                       # known to be anywhere
        self.thread, self.error, self.turns, self.reconnects = None, None, 0, 0

    def turn(self):
        """Appends, a truncation now and then, and a plan that demotes to DRAM."""
        r, rnd = self.rows, self.rnd
        if r.rows > 300 or (r.rows > 60 and rnd.random() < 0.4):
            r.truncate(rnd.randrange(20, min(r.rows, 220)))
        r.append(rnd.randrange(8, 60))
        r.plan(device=rnd.randrange(10, 40), dram=ROWS_ALL)
        self.turns += 1

    def rest(self, nvme):
        """At rest, in the know: every row is below the device, as far as it has not been dropped."""
        self.turn()
        self.rows.append(40)
        self.rows.plan(device=10, dram=ROWS_ALL)
        info = self.rows.seq.info()
        self.rows.plan(device=ROWS_ALL, dram=ROWS_ALL)
        self.all = [set(self.rows.seq.resident(lane)) for lane in range(LANES)]
        self.rows.plan(device=10, dram=ROWS_ALL)
        up = [set(self.rows.seq.resident(lane)) for lane in range(LANES)]
        self.below = [t - u for t, u in zip(self.all, up)]
        equal(sum(map(len, self.all)) + info["dropped_rows"], self.rows.rows * LANES, f"{self.tag}: rows")
        expect(all(self.below), f"{self.tag}: nothing below the device")
        if nvme and self.rnd.random() < 0.7:  # and on its way from DRAM to NVMe, all or in part, when the daemon goes
            self.rows.plan(device=10, dram=self.rnd.choice((0, 20, 100)), nvme=ROWS_ALL)

    def busy(self):
        def run():
            try:
                while True:
                    self.turn()
            except Exception as e:  # noqa: BLE001: looked at after the restart
                self.error = e

        self.error, goal = None, self.turns + 1
        self.below = self.all = [set() for _ in range(LANES)]
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        return goal

    def back(self):
        """On the new connection: the old sequence is stale, the rows come by key and secret."""
        if self.thread:
            self.thread.join(20)
            expect(not self.thread.is_alive() and isinstance(self.error, Error), f"{self.tag}: {self.error!r}")
            self.thread = None
        old = self.rows

        def up():
            self.client.process()
            return self.client.stats()["reconnects"] > self.reconnects

        until(f"{self.tag}: connected again", up, 5)
        self.reconnects = self.client.stats()["reconnects"]
        refused(E_STALE, old.seq.info, f"{self.tag}: the old sequence on a new connection")
        gens, gen = old.gens, old.gen
        old.close()
        self.rows = Rows(self.client, self.tag, cap=CAP, stage=CAP, ttl_s=600, resume=True, **leased(self.tag))
        expect(self.rows.rows <= len(gens), f"{self.tag}: {self.rows.rows} rows came back of {len(gens)}")
        self.rows.gens, self.rows.gen = gens[:self.rows.rows], gen

    def compare(self, whole):
        """Everything that is left comes up and is compared. Returns the rows that were there."""
        r, was = self.rows, len(self.rows.gens)
        r.plan(device=ROWS_ALL, dram=ROWS_ALL)
        for lane in range(LANES):
            there = set(r.seq.resident(lane))
            known = self.all[lane] if whole else self.below[lane]
            gone = known - there
            expect(not gone, f"{self.tag}: lane {lane}: {len(gone)} of {len(known)} {'' if whole else 'known '}rows did "
                             f"not come back, first at {min(gone, default=0)} of {was}")
        return r.check()


class Handles:
    """A raw client that remembers every handle of every life."""

    def __init__(self, d):
        self.d, self.seqs, self.regions, self.offered = d, set(), set(), 0

    def life(self):
        """Live handles of this life, among them the numbers that the others had; then offers all the others."""
        with raw.Raw(self.d.socket) as c:
            c.hello(max_seqs=64, plan_bytes=16 << 20)
            model = c.model()[0]
            live = {c.region()[0] for _ in range(3)}
            region = min(live)
            mine = {c.seq(region=region, model=model, max_rows=256)[0] for _ in range(40)}
            for h in self.seqs:
                expect(h not in mine, f"handle {h:016x} was given out in two lives")
                q = struct.pack("<Q", h)
                for kind, body in ((raw.SEQ_INFO, q), (raw.SEQ_TRUNCATE, q + struct.pack("<2I", 0, 0)),
                                   (raw.SEQ_CLOSE, q + struct.pack("<2I", 1, 0)), (raw.PLAN_REQUEST, q + raw.budget()),
                                   (raw.FETCH, q + struct.pack("<2I", 0, 1)),
                                   (raw.SEQ_OPEN, raw.seq_open(op=raw.FORK, region=region, parent=h, model=model))):
                    self.stale(c, kind, body, h)
            for h in self.regions:
                expect(h not in live, f"region {h:016x} was given out in two lives")
                self.stale(c, raw.REGION_CLOSE, struct.pack("<Q", h), h)
                self.stale(c, raw.SEQ_OPEN, raw.seq_open(region=h, model=model), h)
            expect(c.well(), "the raw client was ended")
            keep = 12 if FULL else 40
            self.seqs |= set(sorted(mine)[:keep])
            self.regions |= live

    def stale(self, c, kind, body, handle):
        self.offered += 1
        try:
            c.ask(kind, body)
        except raw.Refused as e:
            equal(e.status, E_STALE, f"message {kind} with handle {handle:016x} of an earlier life ({e})")
            return
        raise Failed(f"message {kind} with handle {handle:016x} of an earlier life was accepted")


class Tally:
    def __init__(self):
        self.restarts = self.rows = self.known = 0
        self.back, self.ready = [], []


def passer_by(d, rnd):
    """An ephemeral sequence in the places that others just gave up: what lay there before must not be found."""
    c = Client(d.socket, name="passer-by", timeout_ms=10000)
    r = Rows(c, "passer-by", cap=CAP, stage=CAP)
    for _ in range(8):
        r.append(rnd.randrange(4, 60))
        r.plan(device=0, dram=ROWS_ALL)
    return c


def one(d, nvme, seats, handles, way, programs, tally):
    """One restart."""
    for s in seats:
        if s.rnd.random() < 0.7:
            s.turn()
    for s in seats[:RESTING]:
        s.rest(nvme)
    goals = [(s, s.busy()) for s in seats[RESTING:]]
    for s, goal in goals:
        until(f"{s.tag}: {s.turns} turns", lambda s=s, goal=goal: s.error or s.turns >= goal, 30)
    gone = passer_by(d, seats[0].rnd)
    t = time.monotonic()
    if way == "kill":
        d.kill()
    else:
        d.term()
    ended = time.monotonic()
    gone.close()
    d.start(binary=programs[tally.restarts % 2 if way == "upgrade" else 0])
    tally.ready.append(time.monotonic() - ended)
    for s in seats:
        s.back()
    tally.back.append(time.monotonic() - (t if way == "kill" else ended))
    misses = d.status()["misses"]
    for s in seats:
        tally.rows += s.compare(way != "kill")
        tally.known += sum(map(len, s.below))
    after = d.status()["misses"]
    equal({k: after[k] for k in ("corrupt", "client_mutated", "io")}, {"corrupt": 0, "client_mutated": 0, "io": 0},
          f"misses ({misses} before)")
    handles.life()
    tally.restarts += 1


def rounds(nvme, n, tally, offered):
    with Managed(dram={"size": "64M", "segment": "4M"}, nvme={"enabled": nvme},
                 kvtierd={"orphan_ttl": 60}) as d:
        copy = Path(d.run) / "kvtierd.next"
        shutil.copy(d.binary, copy)
        handles = Handles(d)
        handles.life()
        seats = [Seat(d, i) for i in range(CLIENTS)]
        for s in seats:
            s.turn()
        for i in range(n):
            one(d, nvme == "yes", seats, handles, WAYS[i % len(WAYS)], (str(d.binary), str(copy)), tally)
            if i % 20 == 19:
                print(f"# nvme={nvme}: {i + 1} of {n} restarts", flush=True)
        expect(any("returned_bytes" in t and t["returned_bytes"] for t in d.status()["tiers"]), "nothing came back")
        for s in seats:
            s.rows.close(drop=True)
            s.client.close()
        until("sequences to end", lambda: d.status()["sequences"] == 0, 5)
        expect(len(d.settled()) <= 1, f"the fd store keeps {d.settled()}")
        offered.append(handles.offered)


def used_anew(n):
    """The disk is told of a dropped page later than its owner: a kill in between leaves both lives of the key there."""
    with Managed(nvme={"enabled": "yes"}) as d:
        for i in range(n):
            tag = f"anew{i}"
            with Client(d.socket, name=tag) as c:
                r = Rows(c, tag, ttl_s=60, **leased(tag))
                r.append(400)
                r.truncate(390)  # its epoch will be the higher one
                r.plan(device=0, dram=100, nvme=ROWS_ALL)
                r.close()
            d.term()
            d.start()
            c = Client(d.socket, name=tag)
            r = resume(d, tag, c)
            equal(r.rows, 390, "rows of the first life")
            r.close(drop=True)
            r = Rows(c, tag, ttl_s=60, **leased(tag))
            r.gen = 1
            r.append(100)
            r.plan(device=0, dram=ROWS_ALL)
            d.kill()
            c.close()
            d.start()
            with Client(d.socket, name=tag) as c:
                r = resume(d, tag, c)
                equal(r.rows, 100, "rows of the second life")
                r.gens = [1] * r.rows
                r.plan(device=ROWS_ALL, dram=ROWS_ALL, nvme=ROWS_ALL)
                equal(r.check(), 100 * LANES, "rows that came up")
                r.close(drop=True)


def nothing_below():
    """Rows on the device only: they end with it, the sequence does not."""
    with Managed(nvme={"enabled": "yes"}) as d:
        for end in (d.kill, d.term):
            c = Client(d.socket, name="bare")
            r = Rows(c, "bare", ttl_s=60, **leased("bare"))
            r.append(12)
            end()
            c.close()
            d.start()
            with Client(d.socket, name="heir") as h:
                s = resume(d, "bare", h)
                expect(s.rows in (0, 12), f"{s.rows} rows came back of 12")
                s.gens = s.gens[:s.rows] if s.rows else []
                s.close(drop=True)


def stopped_for_good():
    """The store is emptied: what a drain took to disk is there, what had no disk to go to is not, nothing is half there."""
    for nvme in ("yes", "no"):
        with Managed(nvme={"enabled": nvme}) as d:
            c = Client(d.socket, name="last")
            r = Rows(c, "last", ttl_s=60, **leased("last"))
            r.append(500)
            r.plan(device=100, dram=ROWS_ALL)
            d.term()
            d.forget()
            c.close()
            d.start()
            with Client(d.socket, name="heir") as h:
                if nvme == "no":
                    refused(E_NOENT, lambda h=h, d=d: resume(d, "last", h), "resume after a stop without a disk")
                    continue
                s = resume(d, "last", h)
                equal(s.rows, 500, "rows")
                s.whole()
                s.close(drop=True)


def main():
    tap, tally, offered = Tap(), Tally(), []
    tap.case("restarts, kills and upgrades without an NVMe tier", rounds, "no", RESTARTS // 2, tally, offered)
    tap.case("the same with one", rounds, "yes", RESTARTS - RESTARTS // 2, tally, offered)

    tap.case("a key that was dropped and used anew before a kill", used_anew, 20 if FULL else 2)

    tap.case("a sequence of which nothing was below the device", nothing_below)

    tap.case("a stop for good, which empties the store", stopped_for_good)

    def in_time():
        expect(len(tally.back) == RESTARTS, f"{len(tally.back)} of {RESTARTS} restarts")
        if FULL:
            expect(max(tally.back) < 5, f"all back after {max(tally.back):.2f} s")

    tap.case(f"all {CLIENTS} clients are back in time", in_time)
    if not tap.bad:
        print(f"# figure: {tally.restarts:,} restarts, 0 of {tally.known:,} known rows below the device missing, 0 of {tally.rows:,} "
              f"rows wrong, all {CLIENTS} clients back in at most {max(tally.back):.2f} s "
              f"(median {sorted(tally.back)[len(tally.back) // 2]:.2f} s), ready again in at most {max(tally.ready):.2f} s, {sum(offered):,} stale handles refused")
    tap.done()


if __name__ == "__main__":
    main()
