#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Clients that stop, that do not read, that ask without end, that come and go: what their neighbour notices of it.

torture 14: a stopped client, a slow client, a flooding client, 10,000 connects
pass: a neighbour's p99 at most 1.2 x that beside a process that only burns the same CPU; memory bounded; kvtierctl status < 1 s
quick: 0.8 s of each kind, ratios printed, status < 10 s
full: 60 s of each kind
plants: no-accept-limit client-queue-unbounded

The neighbour (pulse.c) has a tenant of its own, those who bother it (flood.c, stopped Victims) share another. Each kind
takes turns with burners of its CPU time. All the while descriptors and resident memory of the daemon are looked at: they may not
grow past what the limits of the tenant add up to. Kinds as arguments (stopped, hints, plans and so on): only these.
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from lib.neighbours import FULL, Pulse, compare, program, seconds  # noqa: E402
from lib.victims import Victim  # noqa: E402
from lib.world import Tap, World, expect, until  # noqa: E402

MAX_CLIENTS, MAX_SEQS, REGIONS = 64, 256, 256 << 20
DRAM = 64 << 20
KINDS = ("info", "admin", "hints", "plans", "deaf", "connects", "hellos")


class Trial:
    def __init__(self, d, pulse):
        self.d, self.pulse, self.pid = d, pulse, d.pid
        self.wild = os.path.join(d.run, "wild.sock")
        self.plans, self.plans_since, self.told = [], 0, False
        self.each = seconds(1.6 * len(KINDS), 2 * len(KINDS)) / len(KINDS)
        self.slowest, self.next_look, self.most_fds, self.most_rss = 0, 0, 0, 0
        self.fds, self.rss = d.fds(), self.resident()
        # a client: socket, process, control segment, plans, eventfd, stream; regions besides
        self.max_fds = self.fds + 6 * MAX_CLIENTS + 2 * MAX_SEQS + 64
        # the largest control segment has 12 MiB; plans, index and the rest: 2 MiB a client
        self.max_rss = self.rss + DRAM + REGIONS + MAX_CLIENTS * (14 << 20)

    def stand(self, what):
        """Where everything waits, in a few lines: for who reads why the neighbour's plan was late."""
        seqs, s = self.d.seqs(), self.d.status()
        print(f"# {what}: {s['worker_jobs']} jobs with workers, {s['page_requests']} pages with tiers, longest slice lately "
              f"{s['loop_recent_max_ns'] / 1e6:.1f} ms, throttle waits {s['throttle']['waits']}")
        for tenant, state in sorted({(q["tenant"], q["plan_state"]) for q in seqs}):
            n = sum((q["tenant"], q["plan_state"]) == (tenant, state) for q in seqs)
            print(f"# {what}: tenant {tenant}: {n} sequences {state}")
        for q in filter(lambda q: q["tenant"] == "default", seqs):
            print(f"# {what}: neighbour: plan {q['plan_id']} {q['plan_state']}")
            for x in self.d.ctl("trace", q["handle"])["plans"][-3:]:
                took = ", ".join(f"{k} {x[k + '_ns'] / 1e6:.2f} ms" for k in ("score", "decide", "move", "ack"))
                print(f"# {what}: neighbour: plan {x['plan']}: {x['outcome']}, out {x['out']}, in {x['in']}: {took}")

    def watch(self, name):
        """A plan takes a millisecond: one that has not come for a second is told of while it waits."""
        plans = [(q["handle"], q["plan_id"], q["plan_state"]) for q in self.d.seqs() if q["tenant"] == "default"]
        now = time.monotonic()
        if plans != self.plans:
            self.plans, self.plans_since, self.told = plans, now, False
        elif now - self.plans_since > 1 and not self.told:
            self.told = True
            self.stand(f"{name}: no plan of the neighbour's for {now - self.plans_since:.1f} s")

    def resident(self):
        """Its own memory, and all of the segments that it made, mapped or not."""
        n = 1024 * int(next(x.split()[1] for x in open(f"/proc/{self.pid}/status", encoding="ascii")
                            if x.startswith("RssAnon")))
        for fd in os.scandir(f"/proc/{self.pid}/fd"):
            try:
                n += 512 * fd.stat().st_blocks if "memfd:" in os.readlink(fd.path) else 0
            except OSError:
                pass  # closed meanwhile
        return n

    def look(self, name, busy):
        """Twice a second: status answers, and what the daemon takes is bounded."""
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + 0.5
        expect(self.d.alive() and self.d.pid == self.pid, "the daemon died")
        if not name.endswith(".burn"):
            expect(all(p.poll() is None for p in busy.procs), f"{name}: ended by itself: {self.d.log_lines()[-5:]}")
        t = time.monotonic()
        self.d.ctl("status")
        self.slowest = max(self.slowest, time.monotonic() - t)
        self.watch(name)
        self.most_fds, self.most_rss = max(self.most_fds, self.d.fds()), max(self.most_rss, self.resident())
        expect(self.most_fds <= self.max_fds, f"{name}: {self.most_fds} descriptors, at most {self.max_fds}")
        expect(self.most_rss <= self.max_rss, f"{name}: {self.most_rss >> 20} MiB, at most {self.max_rss >> 20}")

    def bother(self, kind):
        said = []
        bad, base, share = compare(self.pulse, lambda: [program("flood", self.wild, kind, stdout=subprocess.PIPE)], 1,
                                   self.each, rounds=4 if FULL else 1, during=self.look, said=said, name=kind)
        did = sum(map(int, said))
        expect(did > (10000 if kind == "connects" and FULL else 10), f"{kind}: only {did}")
        self.judge(f"{kind} x {did:,}", bad, base, share)

    def stopped(self):
        """Clients stopped in the middle of whatever they were doing, plans among it."""
        victims = [Victim(self.d, "busy", f"stopped{i}", socket=self.wild) for i in range(3)]
        try:
            time.sleep(0.3)
            for v in victims:
                os.kill(v.p.pid, signal.SIGSTOP)
            bad, base, share = compare(self.pulse, lambda: [], 1, self.each, rounds=4 if FULL else 1, during=self.look,
                                       name="stopped")
            self.judge("3 stopped", bad, base, share)
        finally:
            for v in victims:
                os.kill(v.p.pid, signal.SIGCONT)
                v.kill()

    def judge(self, what, bad, base, share):
        ratio = bad["p99_us"] / base["p99_us"]
        print(f"# figure: {what}: neighbour's p50 {bad['p50_us'] / 1000:.2f} ms ({base['p50_us'] / 1000:.2f}), p99 "
              f"{bad['p99_us'] / 1000:.2f} ms, {ratio:.2f} x beside a burner of {share:.2f} cores")
        expect(bad["n"] > 10, f"{what}: the neighbour hardly moved: {bad}")
        if FULL and ratio > 1.2:
            self.stand(f"{what}, just after")
        expect(not FULL or ratio <= 1.2, f"{what}: p99 {ratio:.2f} x, must be at most 1.2: {bad}, {base}")

    def bounded(self):
        print(f"# figure: descriptors {self.fds} to {self.most_fds} (bound {self.max_fds}), resident {self.rss >> 20} to "
              f"{self.most_rss >> 20} MiB (bound {self.max_rss >> 20}), slowest kvtierctl status {self.slowest:.2f} s")
        expect(self.slowest < (1 if FULL else 10), f"kvtierctl status took {self.slowest:.2f} s")
        until(lambda: f"{self.d.fds()} descriptors, {self.fds} before", lambda: self.d.fds() <= self.fds + 2, 10)


def main():
    tap, kinds = Tap(), sys.argv[1:] or ("stopped", *KINDS)
    wild = {"socket": "wild.sock", "max_clients_per_uid": MAX_CLIENTS, "max_seqs": MAX_SEQS, "max_region": REGIONS}
    with World(tenant_default={}, tenant_wild=wild) as d, Pulse(d.socket) as p:
        t = Trial(d, p)
        if "stopped" in kinds:
            tap.case("stopped in the middle of a plan", t.stopped)
        for kind in (k for k in KINDS if k in kinds):
            tap.case(kind, t.bother, kind)
        tap.case("memory, descriptors, and an answer to the operator", t.bounded)
    tap.done()


if __name__ == "__main__":
    main()
