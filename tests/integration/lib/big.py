# SPDX-License-Identifier: MIT
"""A sequence of large rows, quick to fill and to compare: 16 KiB for each position over its four lanes."""
import struct

from kvtier import ROWS_ALL, Model, Region, Sequence, budget
from kvtier._lib import lib

from .rows import place
from .world import Failed

LAYERS, HEADS, DIM = 2, 2, 512
WIDTH = DIM * 4
LANES = LAYERS * HEADS
POSITION = LANES * 2 * WIDTH


def row(tag, lane, plane, pos):
    return (b"%2d%1d%1d%4d" % (tag, lane, plane, pos % 10000)) * (WIDTH // 8)


class Big:
    """cap: device rows of a lane. Positions stay below 10000, so that each row is one of a kind. scored: what rows
    are worth is what score() says."""

    def __init__(self, client, tag, cap=512, stage=512, max_rows=9984, scored=False, **seq_args):
        self.client, self.tag, self.cap = client, tag, cap
        self.model = Model(client, "big", LAYERS, HEADS, DIM)
        self.policy = "client" if scored else None
        self.layouts, nbytes = self.model.layout(cap, stage, max_rows if scored else 0)
        self.region = Region(client, nbytes)
        self.buf = memoryview(self.region.buffer()).cast("B")
        self.seq = Sequence(client, self.model, self.region, self.layouts, max_rows, **seq_args)

    def place(self, lane, plane, slot):
        return place(self.layouts, HEADS, lane, plane, slot)

    def score(self, pos, n, value):
        """Of rows to come, on all lanes."""
        for lane in range(LANES):
            lay = self.layouts[lane // HEADS]
            off = lay.score_off + lane % HEADS * lay.score_head_stride + pos * 4
            self.buf[off:off + n * 4] = struct.pack("<f", value) * n

    def append(self, n):
        first = self.seq.rows
        for lane in range(LANES):
            at = lib.seq_resident(self.seq.ptr, lane, None, 0)
            for plane in (0, 1):
                off = self.place(lane, plane, at)
                self.buf[off:off + n * WIDTH] = b"".join(row(self.tag, lane, plane, p)
                                                         for p in range(first, first + n))
        self.seq.append(first, n)

    def plan(self, device=ROWS_ALL, dram=0, nvme=0, timeout_ms=30000):
        plan = self.seq.wait(self.seq.request(budget(device, dram, nvme, policy=self.policy, manual=True)), timeout_ms=timeout_ms)
        self.seq.apply(plan)
        return plan

    def fill(self, rows, dram=ROWS_ALL, nvme=0, keep=64, step=448):
        """Append and move down until the sequence has so many rows, all but `keep` of them below the device."""
        while self.seq.rows < rows:
            self.append(min(step, rows - self.seq.rows))
            self.plan(keep, dram, nvme)

    def check(self):
        """Every resident row of every lane, byte for byte; how many."""
        total = 0
        for lane in range(LANES):
            positions = self.seq.resident(lane)
            for plane in (0, 1):
                off = self.place(lane, plane, 0)
                for i, p in enumerate(positions):
                    if self.buf[off + i * WIDTH:off + (i + 1) * WIDTH] != row(self.tag, lane, plane, p):
                        raise Failed(f"tag {self.tag} lane {lane} {'KV'[plane]}: row {p} in slot {i} is wrong")
            total += len(positions)
        return total

    def fetch(self, pos, n, timeout_ms=30000):
        """Bring these back; True: all of them are resident now, and right."""
        self.seq.apply(self.seq.wait(self.seq.fetch(pos, n), timeout_ms=timeout_ms))
        self.check()
        return all(set(range(pos, pos + n)) <= set(self.seq.resident(lane)) for lane in range(LANES))

    def had(self, step=256):
        """Fetch everything, piece by piece, comparing each; by lane, the rows that could be had."""
        seen = [set() for _ in range(LANES)]
        self.plan(step + 64, ROWS_ALL, ROWS_ALL)
        for pos in range(0, self.seq.rows, step):
            self.fetch(pos, min(step, self.seq.rows - pos))
            for lane in range(LANES):
                seen[lane] |= set(self.seq.resident(lane))
        return seen

    def read_back(self, step=256):
        """The same; rows over all lanes that could not be had."""
        return sum(self.seq.rows - len(s) for s in self.had(step))

    def close(self):
        self.buf.release()
        self.seq.close()
        self.region.close()
