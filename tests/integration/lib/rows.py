# SPDX-License-Identifier: MIT
"""Sequences whose every row can be told from every other, and a neighbour that checks them all the time."""
import hashlib
import threading

from kvtier import ROWS_ALL, Client, Error, Model, Region, Sequence, budget
from kvtier._lib import lib

from .world import E_BUSY, Failed, expect, until

LAYERS, HEADS, DIM = 2, 2, 16
WIDTH = DIM * 4
LANES = LAYERS * HEADS


def row(tag, gen, lane, plane, pos):
    """64 bytes: 16 finite float32 that name (tag, generation, lane, K or V, position)."""
    d = hashlib.blake2b(b"%b/%d/%d/%d/%d" % (tag, gen, lane, plane, pos), digest_size=48).digest()
    b = bytearray(b"\x3f" * WIDTH)
    b[0::4], b[1::4], b[2::4] = d[:16], d[16:32], d[32:]
    return bytes(b)


def place(layouts, heads, lane, plane, slot):
    """Where in the region a slot of a lane's K (0) or V (1) plane begins."""
    lay = layouts[lane // heads]
    off, head, stride = ((lay.k_off, lay.k_head_stride, lay.k_row_stride) if plane == 0 else
                         (lay.v_off, lay.v_head_stride, lay.v_row_stride))
    return off + (lane % heads) * head + slot * stride


class Rows:
    """One sequence of patterned rows. `gen` counts truncates, so that a stale row never looks right."""

    def __init__(self, client, tag, cap=768, stage=768, max_rows=4096, model="pattern", region=Region, **seq_args):
        self.client, self.tag, self.cap = client, tag.encode(), cap
        self.model = Model(client, model, LAYERS, HEADS, DIM)
        self.layouts, nbytes = self.model.layout(cap, stage)
        self.region = region(client, nbytes)
        self.buf = memoryview(self.region.buffer()).cast("B")
        self.seq = Sequence(client, self.model, self.region, self.layouts, max_rows, **seq_args)
        self.gens = [0] * self.seq.rows  # generation of each position
        self.gen = 0

    @property
    def rows(self):
        return len(self.gens)

    def place(self, lane, plane, slot):
        return place(self.layouts, HEADS, lane, plane, slot)

    def held(self, lane):
        n = lib.seq_resident(self.seq.ptr, lane, None, 0)
        expect(n >= 0, f"seq_resident: {n}")
        return n

    def expected(self, lane, plane, positions):
        return b"".join(row(self.tag, self.gens[p], lane, plane, p) for p in positions)

    def append(self, n):
        first = self.rows
        self.gens += [self.gen] * n
        for lane in range(LANES):
            at = self.held(lane)
            for plane in (0, 1):
                off = self.place(lane, plane, at)
                self.buf[off:off + n * WIDTH] = self.expected(lane, plane, range(first, first + n))
        try:
            self.seq.append(first, n)
        except Exception:
            del self.gens[first:]
            raise

    def truncate(self, n):
        self.seq.truncate(n)
        del self.gens[n:]
        self.gen += 1

    def check(self):
        """Compare every resident row; returns how many there are."""
        total = 0
        for lane in range(LANES):
            positions = self.seq.resident(lane)
            for plane in (0, 1):
                off = self.place(lane, plane, 0)
                got = bytes(self.buf[off:off + len(positions) * WIDTH])
                if got != self.expected(lane, plane, positions):
                    bad = [p for i, p in enumerate(positions) if got[i * WIDTH:(i + 1) * WIDTH] !=
                           row(self.tag, self.gens[p], lane, plane, p)]
                    raise Failed(f"lane {lane} {'KV'[plane]}: {len(bad)} of {len(positions)} rows wrong, "
                                 f"first at position {bad[0]}")
            total += len(positions)
        return total

    def wait(self, ident, timeout_ms=20000):
        """The plan that was asked for. One that an earlier, unanswered request left behind is applied first."""
        try:
            return self.seq.wait(ident, timeout_ms=timeout_ms)
        except Error as e:
            if e.code != E_BUSY:
                raise
        self.seq.apply(self.seq.peek())
        return self.seq.wait(ident, timeout_ms=timeout_ms)

    def plan(self, device=ROWS_ALL, dram=0, nvme=0, policy=None, timeout_ms=20000):
        """Ask, wait, apply, compare. Returns (rows out, in, dropped)."""
        plan = self.wait(self.seq.request(budget(device, dram, nvme, policy=policy, manual=True)), timeout_ms)
        moved = plan.rows_out, plan.rows_in, plan.rows_drop
        self.seq.apply(plan)
        self.check()
        return moved

    def fetch(self, pos, n):
        plan = self.wait(self.seq.fetch(pos, n))
        self.seq.apply(plan)
        self.check()

    def whole(self):
        """Bring everything back: every row of every lane must be there and right."""
        self.plan(ROWS_ALL, 0, ROWS_ALL)
        n = self.check()
        expect(n == self.rows * LANES, f"{n} rows came back of {self.rows * LANES}: {self.seq.info()}")

    def close(self, drop=False):
        self.buf.release()
        if drop:
            self.seq.drop()
        self.seq.close()
        self.region.close()


def cycle(r):
    """Append, demote, append, promote, fetch; now and then everything back and a cut."""
    r.append(64)
    r.plan(device=48, dram=64, nvme=ROWS_ALL)
    r.append(32)
    r.plan(device=96, dram=48, nvme=ROWS_ALL)
    r.fetch(0, 24)
    if r.rows > 500:
        r.whole()
        r.truncate(100)


class Neighbour(threading.Thread):
    """A well-behaved client in a thread: cycle after cycle."""

    def __init__(self, socket, tag="neighbour"):
        super().__init__(daemon=True)
        self.client = Client(socket, name=tag, timeout_ms=10000)
        self.rows = Rows(self.client, tag)
        self.cycles, self.error, self.stopping = 0, None, False
        self.start()

    def run(self):
        try:
            while not self.stopping:
                cycle(self.rows)
                self.cycles += 1
        except Exception as e:  # noqa: BLE001: told by well()
            self.error = e

    def well(self, cycles=2):
        """At least one whole cycle began after this call, and every byte of it was right."""
        goal = self.cycles + cycles
        until(lambda: f"neighbour: {self.cycles} of {goal} cycles", lambda: self.error or self.cycles >= goal, 30)
        if self.error:
            raise Failed(f"neighbour: {self.error!r}")

    def stop(self):
        self.stopping = True
        self.join(30)
        expect(not self.error, f"neighbour: {self.error!r}")
        expect(not self.is_alive(), "neighbour: does not end")
        self.rows.close()
        self.client.close()
