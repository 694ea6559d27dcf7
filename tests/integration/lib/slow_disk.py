# SPDX-License-Identifier: MIT
"""A runtime that needs a few rows from NVMe at each step, while another sequence moves from DRAM to a slow NVMe."""
import os
import signal
import time

from kvtier import ROWS_ALL, Client

from .big import Big
from .world import Failed, World

MIB = 1 << 20


def sections(mib, mib_s, throttle):
    size = f"{max(256, 4 * mib)}M"
    return {"dram": {"size": f"{mib * 2 + 64}M", "segment": "64M", "free_min": 0, "free_low": 0, "free_high": 0},
            "nvme": {"size": size, "segment": "4M", "preallocate": "no", "fault": f"mib_s={mib_s}", "staging": "32M",
                     "deadline": 60000, "throttle": throttle, "throttle_target": 10},
            "pressure": {"shrink": "no"}}


class Slow(World):
    """mib: bytes of one demotion; mib_s: what the disk carries."""

    def __init__(self, mib, mib_s):
        super().__init__(**sections(mib, mib_s, "no"))
        self.mib, self.mib_s = mib, mib_s

    def throttle(self, on):
        self.configure(**sections(self.mib, self.mib_s, on))
        os.kill(self.pid, signal.SIGHUP)
        end = time.monotonic() + 5
        while self.status()["throttle"]["on"] != (on == "yes"):
            if time.monotonic() > end:
                raise Failed("the reload did not reach the throttle")
            time.sleep(0.02)


def quantile(v, q):
    return sorted(v)[min(len(v) - 1, int(len(v) * q))]


def steps_during(d, reader, mover, seconds):
    """Latencies of steps, each of 8 rows from NVMe, until the mover's rows are all there; and how long that took."""
    mover.plan(64, 0, ROWS_ALL)
    begin, took, pos = time.monotonic(), [], 0
    while True:
        t = time.monotonic()
        if t - begin > seconds:
            raise Failed(f"the demotion does not end: {mover.seq.info()}")
        reader.fetch(pos, 8)
        took.append(time.monotonic() - t)
        pos = (pos + 96) % (reader.seq.rows - 32)
        if len(took) % 4 == 0 and not mover.seq.info()["tier_rows"]["dram"]:
            return took, time.monotonic() - begin


def compare(mib, mib_s, seconds, tell=lambda text: None):
    """(p99 without, p99 with, seconds without, seconds with, the throttle's counters)."""
    with Slow(mib, mib_s) as d, Client(d.socket) as c, Client(d.socket) as e:
        reader = Big(c, 1)
        reader.fill(1024, dram=0, nvme=ROWS_ALL)
        out = {}
        for tag, on in enumerate(("no", "yes"), 2):
            d.throttle(on)
            part = [Big(e, tag * 10 + i) for i in range(-(-mib // 128))]
            for p in part:
                p.fill(min(mib, 128) * MIB // 16384)
            took, took_s = steps_during(d, reader, part[0], seconds)
            for p in part[1:]:
                more, s = steps_during(d, reader, p, seconds)
                took += more
                took_s += s
            out[on] = quantile(took, 0.99), took_s
            tell(f"throttle {on}: {len(took)} steps, p50 {quantile(took, 0.5) * 1e3:.1f} ms, "
                 f"p99 {out[on][0] * 1e3:.1f} ms, demoted in {took_s:.1f} s")
            for p in part:
                if p.read_back() if mib <= 64 else 0:
                    raise Failed("rows are missing")
                p.close()
        return *[out[o][0] for o in ("no", "yes")], *[out[o][1] for o in ("no", "yes")], d.status()["throttle"]
