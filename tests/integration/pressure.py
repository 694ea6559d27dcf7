#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The host runs short of memory: DRAM is given back, before the OOM killer acts; what is left reads back byte for
byte, what is dropped is said to be; afterwards the tier grows again."""
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

from kvtier import ROWS_ALL, Client

from lib.big import LANES, POSITION, Big
from lib.group import Group, Within
from lib.world import SEED, Skip, Tap, World, equal, expect, matches, until

MIB = 1 << 20
BALLOON = """
import mmap, sys, time
m = mmap.mmap(-1, int(sys.argv[1]) << 20)
for i in range(0, len(m), 4096):
    m[i] = 1
    if i % (2 << 20) == 0:
        time.sleep(float(sys.argv[2]))
print("full", flush=True)
sys.stdin.readline()
"""


class Balloon:
    def __init__(self, group, mib, pause):
        self.p = subprocess.Popen([sys.executable, "-c", BALLOON, str(mib), str(pause)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True, preexec_fn=lambda: group.add(os.getpid()))

    def full(self):
        equal(self.p.stdout.readline().strip(), "full", "the balloon")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.p.kill()
        self.p.wait()
        self.p.stdin.close()
        self.p.stdout.close()


def pressure(d):
    return d.status()["pressure"]


def available():
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise Skip("no MemAvailable")


SECTIONS = {"dram": {"size": "192M", "segment": "64M"}, "nvme": {"size": "256M", "segment": "4M", "preallocate": "no"},
            "policy": {"default": "random", "protect_last": 16}}


def squeeze(d, g, mib, pause):
    """Another process of the same cgroup wants what the tier holds, 2 MiB after each pause, then there is room again.
    What was dropped."""
    equal(pressure(d)["squeezed"], False, "squeezed before anything happened")
    g.limit(g.used() + mib * MIB)
    with Balloon(g, 100, pause) as balloon:
        balloon.full()
        equal(g.killed(), 0, "processes that the OOM killer took")
        expect(d.alive(), "the daemon was killed")
        until(lambda: f"{pressure(d)}", lambda: not pressure(d)["missing_bytes"], 10)
        p = pressure(d)
        expect(p["squeezed"] and p["squeezes"] >= 1, f"the daemon saw no pressure: {p}")
        expect(d.dram_held() <= 90 * MIB, f"{d.dram_held() >> 20} MiB are still held: {p}")
    g.limit(1024 * MIB)
    until(lambda: f"{pressure(d)}", lambda: not pressure(d)["squeezed"], 30)
    equal(sum(s["rows_dropped"] for s in d.seqs()), pressure(d)["dropped_rows"], "rows that ls says are dropped")
    return pressure(d)["dropped_rows"]


def squeezed_in_a_cgroup():
    sections = SECTIONS | {"pressure": {"floor": "8M", "psi": "no", "deadline": 2000}}
    with Group() as g, Within(g, sections) as d, Client(d.socket) as c:
        a, b = Big(c, 1), Big(c, 2)
        for s in (a, b):
            s.fill(4096)
        before = pressure(d)
        expect(before["dram_resident_bytes"] >= 120 * MIB, f"128 MiB are in DRAM: {before}")
        equal(squeeze(d, g, 48, 0.15), 0, "rows dropped")
        expect(pressure(d)["demoted_bytes"] > 0, f"nothing moved to nvme: {pressure(d)}")
        equal(a.read_back() + b.read_back(), 0, "rows that cannot be had")
        expect(d.alive(), "the daemon died")


def half(bits):
    return struct.unpack("<e", struct.pack("<H", bits))[0]


PAGE, GROUPS = 128, 60  # rows of a page, and how many times so many rows there are, each with a score of its own


def lowest_scores_go():
    """Each page of 128 rows has one score, no two of all sequences and steps the same, in an order that has nothing to do
    with age. Without nvme the lowest are dropped, to the row, and counted; everything else is there and right."""
    sections = {"dram": SECTIONS["dram"], "nvme": {"enabled": "no"},
                "policy": {"default": "client", "protect_first": 0, "protect_last": 0},
                "pressure": {"floor": "8M", "psi": "no", "deadline": 0}}
    rank = list(range(GROUPS))
    random.Random(SEED).shuffle(rank)
    with Group() as g, Within(g, sections) as d, Client(d.socket) as c:
        seqs = [Big(c, 1, scored=True), Big(c, 2, scored=True)]
        for i, r in enumerate(rank):
            s = seqs[i % 2]
            s.score(s.seq.rows, PAGE, half(4 + r << 8))  # keys are halves, and are told apart by their upper bytes
            s.append(PAGE)
            s.plan(0, ROWS_ALL)
        equal(sum(s["tiers"]["dram"]["rows"] for s in d.seqs()), GROUPS * PAGE * LANES, "rows in DRAM")
        dropped = squeeze(d, g, 40, 0.05)
        expect(dropped > 0, "nothing was dropped")
        gone = {r: 0 for r in rank}  # lanes of which that page is gone
        for n, s in enumerate(seqs):
            for had in s.had():
                for i, r in enumerate(rank[n::2]):
                    there = sum(p in had for p in range(i * PAGE, (i + 1) * PAGE))
                    expect(there in (0, PAGE), f"page of rank {r}: {there} of its rows are there")
                    gone[r] += not there
        equal(sum(gone.values()) * PAGE, dropped, "rows that cannot be had, against those said to be dropped")
        lanes = [gone[r] for r in range(GROUPS)]
        print(f"# lanes gone by rank: {lanes}")
        whole = lanes.index(next(x for x in lanes if x < LANES))
        equal(sum(lanes[whole + 1:]), 0, f"pages dropped above the first that stayed in part (by rank: {lanes})")
        expect(sum(lanes) < GROUPS * LANES - 16, f"more went than had to: {lanes}")
        expect(d.alive(), "the daemon died")


def host_runs_short():
    """The reserve is set above what the host has left, and back again: no cgroup, no danger."""
    reserve = {"shrink": "yes", "psi": "no", "floor": "16M"}
    with World(**SECTIONS, pressure=reserve | {"reserve": "0"}) as d:
        with Client(d.socket) as c:
            a = Big(c, 3)
            a.fill(6144)
            held = d.dram_held()
            expect(held >= 88 * MIB, f"{held >> 20} MiB are in DRAM")
            d.configure(**SECTIONS, pressure=reserve | {"reserve": str(available() + 4096 * MIB)})
            os.kill(d.pid, signal.SIGHUP)
            until(lambda: f"{d.dram_held() >> 20} MiB held, {pressure(d)}", lambda: d.dram_held() <= 20 * MIB, 20)
            p = pressure(d)
            equal(p["dram_limit_bytes"], 16 * MIB, "the floor")
            matches("\n".join(d.log_lines()), r"memory pressure: \d+ MiB are missing", "the log")
            d.configure(**SECTIONS, pressure=reserve | {"reserve": "0"})
            os.kill(d.pid, signal.SIGHUP)
            until(lambda: f"{pressure(d)}", lambda: not pressure(d)["squeezed"], 30)
            missing = a.read_back()
            equal(missing, pressure(d)["dropped_rows"], "rows that cannot be had, against those said to be dropped")
            squeezes = pressure(d)["squeezes"]
            a.plan(64, 2**32 - 1, 2**32 - 1)
            equal(pressure(d)["squeezes"], squeezes, "squeezes after it is over")
            equal(pressure(d)["dram_limit_bytes"], 192 * MIB, "the tier's size")


def watched():
    """PSI is listened to where the kernel has it, and bad specifications are refused."""
    with World(**SECTIONS) as d:
        psi = pressure(d)["psi"]
        expect(psi.startswith(("some 150ms/2s of", "off: ")), psi)
        d.stop()
        d.configure(pressure={"psi": "some 150ms/3s"})
        d.refuses_to_start(r'psi: "some 150ms/3s", the window must be a multiple of 2 s')
        if psi.startswith("off: "):
            raise Skip(f"psi is {psi}")


def main():
    tap = Tap()
    expect(POSITION == 16384, "rows of another size")
    tap.case("a squeezed cgroup gets memory back before anybody is killed; nothing is lost", squeezed_in_a_cgroup)
    tap.case("without nvme the lowest scores are dropped, no others, and each is counted", lowest_scores_go)
    tap.case("short of its reserve the host gets all but the floor, and the tier recovers", host_runs_short)
    tap.case("psi", watched)
    tap.done()


if __name__ == "__main__":
    main()
