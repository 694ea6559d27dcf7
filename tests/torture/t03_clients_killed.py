#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# torture 3: clients are killed in the middle of an operation
# pass: all back to baseline within 1 s; leased resume by key, tenant and secret, or end with their TTL
# quick: 60 kills
# full: 1,000 kills
# plants: client-death-leaks-region resume-ignores-secret lease-without-end session-ends-with-socket
"""Riders (t01_daemon_killed.py) are killed at random moments, six at a time, some while they still open their sequences.
Ephemeral ones and ones with a forked child that goes on holding the socket: rows, bytes, sequences, models, plan memory,
descriptors and mapped segments of the daemon are what they were before there was a client. Leased ones: another
process goes on from the dead one's state, finds every sequence that the client was told exists by key, tenant and
secret (a wrong secret is told what somebody who asks for nothing is told), and compares every row; nothing that a
living daemon was given is gone. In the end their leases run out, and all is as it was in the beginning.
"""
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from lib.riders import Rider, added, full, percentile, total  # noqa: E402
from lib.victims import usage  # noqa: E402
from lib.world import SEED, Tap, World, equal, expect, until  # noqa: E402

AT_ONCE = 6
TTL = 3


def maps(d):
    """Segments that the daemon has mapped, but for those of its DRAM tier."""
    with open(f"/proc/{d.pid}/maps", encoding="utf-8") as f:
        return sum("/memfd:kvtier-" in line and "kvtier-dram" not in line for line in f)


def in_shm(d):
    """Files in /dev/shm that it holds, or that have its name: it makes none. (Others' come and go beside us.)"""
    held = [os.path.realpath(f) for f in Path(f"/proc/{d.pid}/fd").iterdir()]
    return [f for f in held if f.startswith("/dev/shm/")] + [f for f in os.listdir("/dev/shm") if f.startswith("kvtier")]


def all_of(d):
    return {**usage(d), "maps": maps(d)}


def back(d, base, keys, took):
    """As before; the seconds that it took go to `took`."""
    t = time.monotonic()
    until(lambda: f"{all_of(d)}, was {base}", lambda: all(all_of(d)[k] == base[k] for k in keys), 10)
    took.append(time.monotonic() - t)


def has_peer_pidfd():
    return tuple(int(n) for n in os.uname().release.split("-")[0].split(".")[:2]) >= (6, 5)


def kill_all(riders, rnd, longest):
    time.sleep(rnd.random() * longest)
    for r in riders:
        os.kill(r.p.pid, signal.SIGKILL)
    for r in riders:
        r.p.wait()


def ephemeral(d, kills, rnd, took, counts):
    base = all_of(d)
    for i in range(kills // AT_ONCE):
        kinds = ["forked" if j % 2 and has_peer_pidfd() else "ephemeral" for j in range(AT_ONCE)]
        riders = [Rider(d, 1000 + i * AT_ONCE + j, 2, kind).spawn() for j, kind in enumerate(kinds)]
        try:
            if i % 3:
                for r in riders:
                    r.served(1)
            kill_all(riders, rnd, 0.15)
            back(d, base, base, took)  # children live, and hold the sockets
            for r, kind in zip(riders, kinds):
                r.well()
                if kind == "forked" and i % 3:
                    os.kill(r.child(), 0)
            counts.append(total(riders))
        finally:
            for r in riders:
                r.close()
        equal(in_shm(d), [], "files in /dev/shm")
    if not has_peer_pidfd():
        print(f"# no forked children: Linux {os.uname().release} has no SO_PEERPIDFD (6.5)")


def leases(d, kills, rnd, took, counts):
    base = all_of(d)
    riders = [Rider(d, 10 + j, 2, "stays", f"ttl={TTL if j % 2 else 60}") for j in range(AT_ONCE)]
    try:
        for i in range(kills // AT_ONCE):
            lives = [r.count()["losses"] for r in riders]
            for r in riders:
                r.spawn()
            if i % 4:
                for r, n in zip(riders, lives):
                    r.served(n + 1)
            kill_all(riders, rnd, 0.3)
            back(d, base, ("clients", "device", "plan_bytes", "fds", "maps"), took)
            for r in riders:
                r.well()
        before = total(riders)
        for r in riders:
            r.spawn("until-idle").p.wait(60)
            r.well()
        counts.append(total(riders))
        expect(before["resumed"] > kills / 4, f"{before['resumed']} sequences were resumed: the test proves little")
        equal(d.status()["orphans"], 2 * AT_ONCE, "sequences that wait for their clients")
        until(lambda: f"{d.status()['orphans']} left", lambda: d.status()["orphans"] == AT_ONCE, TTL + 8)  # the short ones
        for s in d.seqs():
            d.ctl("drop", str(s["handle"]))
        back(d, base, base, [])
    finally:
        for r in riders:
            r.close()


def main():
    tap, took, counts = Tap(), [], []
    kills, rnd = 1000 if full() else 60, random.Random(SEED)
    with World(dram={"size": "16M", "segment": "4M"}, nvme={"size": "96M", "segment": "1M", "preallocate": "no"}) as d:
        ok = tap.case("ephemeral clients, forked children: nothing is left", ephemeral, d, kills // 2, rnd, took, counts)
        ok = tap.case("leased clients: another process goes on with every row, or the lease ends", leases, d, kills // 2, rnd, took, counts) and ok
        tap.case("the daemon lives", lambda: expect(d.alive(), "it died"))
    if ok:
        c = added(counts)
        p99 = percentile(took, 99)
        print(f"# figure: {kills:,} kills of clients, 0 of {c['compared']:,} rows compared wrong, {c['resumed']:,} sequences resumed, 0 missed, "
              f"nothing left; six dead clients to baseline p50 {percentile(took, 50):.2f} s, p99 {p99:.2f} s")
        if full():
            tap.case("baseline within 1 s at p99", lambda: expect(p99 < 1, f"{p99:.2f} s"))
    tap.done()


if __name__ == "__main__":
    main()
