#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Private memory given back, and steps of a runtime beside a demotion of 2 GiB on a slow disk, with the throttle and
without, one after the other on the same daemon. JSON lines; --quick: smaller sizes. Published memory: bench_revoke.c.

The disk is the fault tier over the real one: it carries 200 MiB/s in the order in which it was asked, as a device with a
queue does. So it is the same slow disk on every host, whatever lies below."""
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "integration"),
                str(Path(__file__).resolve().parents[2] / "ipc" / "python")]

from kvtier import ROWS_ALL, Client  # noqa: E402
from lib.big import Big  # noqa: E402
from lib.slow_disk import compare  # noqa: E402
from lib.world import World  # noqa: E402

MIB = 1 << 20


def say(name, value, unit, target, ok, **more):
    print(json.dumps({"name": name, "value": round(value, 4), "unit": unit, **more,
                      "target": target, "pass": ok}),
          flush=True)


def returned(mib):
    """Private DRAM: from the reload that raises the reserve until the kernel holds `mib` less."""
    def sections(reserve):
        return {"dram": {"size": f"{mib + mib // 4}M"}, "nvme": {"size": f"{2 * mib}M", "segment": "64M", "staging": "32M"},
                "pressure": {"psi": "no", "floor": "8M", "reserve": reserve}}

    with World(**sections("0")) as d, Client(d.socket) as c:
        seqs = [Big(c, i) for i in range(mib // 128)]
        for s in seqs:
            s.fill(128 * 64, dram=ROWS_ALL)
        before = d.dram_held()
        d.configure(**sections("16T"))
        t = time.monotonic()
        os.kill(d.pid, signal.SIGHUP)
        while d.dram_held() > 0.02 * before + 8 * MIB and time.monotonic() - t < 30:
            time.sleep(0.005)
        took = time.monotonic() - t
        p = d.status()["pressure"]
        say("pressure.private_returned", took, "s", "<=1", took <= 1 and d.dram_held() < 0.1 * before,
            rival="none: the limit", rival_value=1, ratio=round(took, 4),
            mib=mib, bytes=before - d.dram_held(), demoted_bytes=p["demoted_bytes"], dropped_rows=p["dropped_rows"],
            daemon_s=round(p["ns_max"] / 1e9, 4))


def main():
    quick = "--quick" in sys.argv
    returned(256 if quick else 1024)
    off, on, off_s, on_s, _ = compare(128 if quick else 2048, 200, 120,
                                      lambda text: print(text, file=sys.stderr, flush=True))
    say("throttle.p99_step", on * 1e3, "ms", "<=0.50", on / off <= 0.5, rival="the same without the throttle",
        rival_value=round(off * 1e3, 4), ratio=round(on / off, 4), demoted_s=round(on_s, 2), rival_demoted_s=round(off_s, 2))


if __name__ == "__main__":
    main()
