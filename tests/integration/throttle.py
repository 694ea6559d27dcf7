#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A slow disk, a demotion, and a runtime that reads: the demotion ends, every byte is right, the throttle acts."""
from lib.slow_disk import compare
from lib.world import Tap, expect


def both_ways():
    *_, counters = compare(48, 80, 30, lambda text: print(f"# {text}"))
    expect(counters["cuts"] > 0 and counters["waits"] > 0 and counters["delayed_bytes"] > 0,
           f"the throttle never acted: {counters}")


def main():
    tap = Tap()
    tap.case("a demotion on a slow disk ends and loses nothing, throttled or not", both_ways)
    tap.done()


if __name__ == "__main__":
    main()
