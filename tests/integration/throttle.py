#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A slow disk, a demotion, and a runtime that reads: the demotion ends, every byte is right, the throttle acts."""
from kvtier import ROWS_ALL, Client

from lib.big import Big
from lib.slow_disk import compare
from lib.world import Tap, World, equal, expect, until


def both_ways():
    *_, counters = compare(48, 80, 30, lambda text: print(f"# {text}"))
    expect(counters["cuts"] > 0 and counters["waits"] > 0 and counters["delayed_bytes"] > 0,
           f"the throttle never acted: {counters}")


def cleaner():
    """Holes in every segment, and more to write than is free: what the cleaner copies is in the window."""
    with World(nvme={"size": "48M", "segment": "2M", "preallocate": "no"}) as d, Client(d.socket) as c:
        seqs = [Big(c, i) for i in range(10, 22)]
        for _ in range(12):
            for s in seqs:
                s.fill(s.seq.rows + 16, dram=0, nvme=ROWS_ALL, keep=8)
        for s in seqs[1::2]:
            s.close()
        kept, more = seqs[::2], []
        while not d.status()["throttle"]["cleaner_bytes"]:
            expect(len(more) < 40, f"the cleaner has nothing to do: {d.tier('nvme')}")
            s = Big(c, 30 + len(more))
            s.fill(96, dram=0, nvme=ROWS_ALL, keep=8)
            more.append(s)
            if len(more) > 6:
                more[len(more) - 7].close()
        until(lambda: f"{d.tier('nvme')}", lambda: d.tier("nvme")["cleaned_segments"] > 0, 10)
        print(f"# {d.status()['throttle']}, {d.tier('nvme')['cleaned_segments']} segments")
        for s in kept:
            equal(s.read_back(), 0, "rows that cannot be had")


def main():
    tap = Tap()
    tap.case("the cleaner's copies count among the writes, and every row stays", cleaner)
    tap.case("a demotion on a slow disk ends and loses nothing, throttled or not", both_ways)
    tap.done()


if __name__ == "__main__":
    main()
