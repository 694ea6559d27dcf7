# SPDX-License-Identifier: MIT
"""Clients that speak correctly and mean nothing by it: any request in any order, and gone without a word."""
import os
import random
import struct
import time

from . import raw
from .attacks import Q, QII
from .raw import FETCH, PLAN_REQUEST, REGION, REGION_CLOSE, SEQ_CLOSE, SEQ_INFO, SEQ_OPEN, SEQ_TRUNCATE, HungUp, Raw
from .raw import message
from .world import SEED, expect

KEYS = [bytes([i]) * 16 for i in range(1, 6)]  # few, so that clients meet


class Wild:
    """One client. Replies are read late or never; what it knows of its sequences is what it was told."""

    def __init__(self, path, rnd):
        self.rnd, self.seqs, self.regions, self.pending = rnd, [], [], 0
        self.r = Raw(path, timeout=0.2).hello(max_seqs=rnd.choice((1, 4, 64)), plan_bytes=1 << 20)
        self.r.model()
        self.region()

    def region(self):
        self.regions.append(struct.unpack("<2Q", self.r.ask(REGION, Q.pack(1 << 20))[0])[0])

    def ask(self, kind, body):
        """Sent; read only sometimes, so that much is on its way at once."""
        self.r.send(message(kind, body))
        self.pending += 1
        if self.rnd.random() < 0.6 or self.pending > 6:
            self.read()

    def read(self):
        while self.pending:
            try:
                kind, status, _, payload, _ = self.r.recv()
            except TimeoutError:
                return  # it waits for another client
            self.pending -= 1
            if not status and kind == SEQ_OPEN | raw.REPLY:
                v = struct.unpack_from("<3Q3I", payload)
                self.seqs.append({"h": v[0], "plan": v[1], "slot": self.r.slots + v[3] * raw.SLOT, "epoch": v[4],
                                  "rows": v[5]})
            elif not status and kind == REGION | raw.REPLY:
                self.regions.append(struct.unpack("<2Q", payload)[0])

    def handle(self):
        return self.rnd.choice(self.seqs)["h"] if self.seqs else 0x100000001

    def open(self):
        op = self.rnd.choice((raw.OPEN, raw.OPEN, raw.RESUME, raw.FORK))
        self.ask(SEQ_OPEN, raw.seq_open(op=op, lifetime=self.rnd.randrange(2), ttl=1, key=self.rnd.choice(KEYS),
                                        region=self.rnd.choice(self.regions or [1]),
                                        parent=self.handle() if op == raw.FORK else 0, max_rows=1024,
                                        prefix=self.rnd.randrange(64) if op == raw.FORK else 0))

    def grow(self):
        if self.seqs:
            s = self.rnd.choice(self.seqs)
            s["rows"] = min(s["rows"] + self.rnd.randrange(100), 256)
            self.r.put64(s["slot"], s["epoch"] << 32 | s["rows"])
            self.r.push(handle=s["h"])

    def ack(self):
        """What the plan area shows, ready or not."""
        if self.seqs:
            s = self.rnd.choice(self.seqs)
            self.r.put64(s["slot"] + 8, struct.unpack("<Q", os.pread(self.r.plan_fd, 8, s["plan"]))[0])
            self.r.push(handle=s["h"])

    def step(self):
        rnd, h = self.rnd, self.handle()
        rnd.choice((
            self.open, self.open, self.grow, self.grow, self.ack, self.region if not self.pending else self.read,
            lambda: self.ask(PLAN_REQUEST, Q.pack(h) + raw.budget(
                device=rnd.choice((0, 10, 100, raw.ALL)), dram=rnd.choice((0, 50, raw.ALL)),
                nvme=rnd.choice((0, 50, raw.ALL)), manual=rnd.randrange(2))),
            lambda: self.ask(FETCH, QII.pack(h, 0, rnd.randrange(1, 64))),
            lambda: self.ask(SEQ_INFO, Q.pack(h)),
            lambda: self.ask(SEQ_TRUNCATE, QII.pack(h, rnd.randrange(64), 0)),
            lambda: self.ask(SEQ_CLOSE, QII.pack(h, rnd.randrange(2), 0)),
            lambda: self.ask(REGION_CLOSE, Q.pack(rnd.choice(self.regions))),
        ))()


def any_order(d, seconds=3):
    """Several at once, over the same keys; the daemon may hang up on them or refuse, and lives."""
    rnd = random.Random(SEED)
    wild, lives, steps = [], 0, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(wild) < 5:
            wild.append(Wild(d.socket, rnd))
            lives += 1
        w = rnd.choice(wild)
        try:
            steps += 1
            if rnd.random() < 0.02:
                raise HungUp
            w.step()
        except HungUp:
            w.r.close()
            wild.remove(w)
    for w in wild:
        w.r.close()
    expect(d.alive(), "the daemon died")
    expect(lives > 5 and steps > 100, f"{lives} lives, {steps} steps")
    print(f"# {steps} requests in {lives} lives")
