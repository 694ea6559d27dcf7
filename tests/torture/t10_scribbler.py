#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A client scribbles over all memory that it shares, beside one that must not notice.

torture 10: a client scribbling over all its shared memory
pass: daemon up; no byte of a neighbour wrong; its p99 at most 2 x that beside a process that only burns the same CPU
quick: 20 s, latencies printed
full: 30 minutes
plants: ring-cursor-trusted handle-unchecked log-unlimited

The scribbler (scribbler.c) is in a tenant of its own. The neighbour (pulse.c) compares all its rows in every cycle. Spells
of scribbling and of burning take turns, so that a slower minute of the host makes both slower. What is said about the
scribbler in the log must stay readable: 100 lines at once, then two a second, the rest counted.
"""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from lib.neighbours import FULL, Pulse, compare, program, seconds  # noqa: E402
from lib.world import SEED, Tap, World, equal, expect, until  # noqa: E402

SCRIBBLERS = 2 if FULL and os.cpu_count() > 4 else 1


class Trial:
    def __init__(self, d):
        self.d, self.pid, self.seed, self.said, self.began = d, d.pid, SEED, [], time.monotonic()

    def attack(self):
        self.seed += 1
        return [program("scribbler", os.path.join(self.d.run, "wild.sock"), self.seed * 16 + i, stdout=subprocess.PIPE)
                for i in range(SCRIBBLERS)]

    def alive(self, name, busy):
        expect(self.d.alive() and self.d.pid == self.pid, "the daemon died")
        if name != "attack.burn":
            expect(all(p.poll() is None for p in busy.procs), "a scribbler ended by itself")

    def scribble(self, total_s):
        with Pulse(self.d.socket) as p:
            self.bad, self.base, self.share = compare(p, self.attack, SCRIBBLERS, total_s, during=self.alive,
                                                      said=self.said)
        self.end, self.total_s = p.end, total_s
        self.lives = {k: sum(json.loads(s)[k] for s in self.said) for k in ("lives", "hangups", "writes", "requests")}
        expect(self.lives["hangups"] > 10 and self.lives["writes"] > 10000, f"too little harm: {self.lives}")
        expect(self.end["rows"] > 10000, f"the neighbour did too little: {self.end}")

    def latency(self):
        ratio = self.bad["p99_us"] / self.base["p99_us"]
        print(f"# figure: {self.total_s / 60:.1f} min, {self.lives['writes']:,} writes and {self.lives['hangups']:,} hang-ups in "
              f"{self.lives['lives']:,} lives, {self.end['wrong']} of {self.end['rows']:,} neighbour's rows wrong, its p99 "
              f"{self.bad['p99_us'] / 1000:.2f} ms, {ratio:.2f} x beside a burner of {self.share:.2f} cores")
        expect(not FULL or ratio <= 2, f"p99 {ratio:.2f} x, must be at most 2: {self.bad}, {self.base}")

    def log(self):
        lines = self.d.log_lines()
        told = sum(" ended: " in x for x in lines)
        left = sum(int(m[1]) for x in lines if (m := re.search(r"tenant wild: its clients: (\d+) more lines left out", x)))
        print(f"# {told} lines about ended clients, {left} counted")
        expect(told, "none was told why")
        may = 105 + 2 * (time.monotonic() - self.began)
        expect(told <= may, f"{told} lines about ended clients, at most {may:.0f}")
        expect(len(lines) < 2 * may, f"{len(lines)} lines of log")
        expect(told + left > 100 or self.lives["hangups"] < 100, f"{told} told, {left} counted, {self.lives} ended")
        expect(not [x for x in lines if "corrupt" in x or "checksum" in x], "a page was damaged")

    def after(self):
        """Everything that was the scribbler's goes, leases too; a new neighbour is served."""
        with Pulse(self.d.socket, ident=2):
            pass
        def left():
            s = self.d.status()
            return s["clients"], s["sequences"]

        until(lambda: f"clients, sequences: {left()}", lambda: left() == (0, 0), 10)
        equal(self.d.status()["misses"]["corrupt"], 0, "corrupt pages")


def main():
    tap = Tap()
    with World(tenant_default={}, tenant_wild={"socket": "wild.sock"}, kvtierd={"log_level": "info"}) as d:
        t = Trial(d)
        if tap.case("the daemon and the neighbour live through it, every row right", t.scribble, seconds(20, 30)):
            tap.case("the neighbour's p99", t.latency)
            tap.case("the log can be read", t.log)
            tap.case("nothing is left of it", t.after)
    tap.done()


if __name__ == "__main__":
    main()
