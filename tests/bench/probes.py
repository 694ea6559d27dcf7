#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the kernel's probes cost: a runtime's rows go down and come back as fast as they can, in turn with every program of
kvtierd-bpf loaded and with none; the median of ratios of neighbours. Then, because a disk and neighbours swing by more
than probes can cost, the time in the programs themselves by the kernel's count, as a share of the processors. Prints lines as the other benchmarks do (root).

usage: probes.py [PAIRS]
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "ipc" / "python"), str(ROOT / "tests" / "integration")]

from kvtier import ROWS_ALL, Client, Model, Region, Sequence, budget  # noqa: E402
from kvtier.daemon import build_dir  # noqa: E402
from lib.world import World, until  # noqa: E402

LAYERS, HEADS, DIM, ROWS, KEEP = 8, 8, 128, 1024, 64
SECONDS = 1.0


class Load:
    def __init__(self, d, client, **below):
        self.d, self.below = d, below
        self.model = Model(client, "load", LAYERS, HEADS, DIM)
        layouts, n = self.model.layout(ROWS, ROWS)
        self.region = Region(client, n)
        self.seq = Sequence(client, self.model, self.region, layouts, ROWS)
        self.moved = 0

    def plan(self, device, **below):
        plan = self.seq.wait(self.seq.request(budget(device, below.get("dram", 0), below.get("nvme", 0), manual=True)),
                             timeout_ms=30000)
        self.moved += plan.rows_out + plan.rows_in
        self.seq.apply(plan)

    def run(self, seconds):
        """Rows of one lane, moved in a second; and in a second of the two processes' time."""
        self.moved, begin, worked = 0, time.monotonic(), self.worked()
        while time.monotonic() - begin < seconds:
            self.seq.append(0, ROWS)
            self.plan(KEEP, **self.below)
            self.plan(ROWS_ALL, **self.below)
            self.seq.truncate(0)
        return self.moved / (time.monotonic() - begin), self.moved / (self.worked() - worked)

    def worked(self):
        """Processor time of the daemon and of this process, in seconds."""
        stat = Path(f"/proc/{self.d.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK") + time.process_time()


class Probes:
    def __init__(self, path, d):
        self.path, self.d, self.p = path, d, None

    def state(self, on):
        until(f"probes {on}", lambda: self.d.status()["probes"]["on"] == on, 10)

    def on(self):
        self.p = subprocess.Popen([str(build_dir() / "kvtierd-bpf"), "--socket", self.path], stderr=subprocess.DEVNULL)
        self.state(True)

    def off(self):
        self.p.terminate()
        self.p.wait()
        self.state(False)


def compare(name, pairs, d, probes, **below):
    with Client(d.socket) as c:
        load, on, off = Load(d, c, **below), [], []
        load.run(0.5)
        for i in range(pairs):
            if i % 2:
                off.append(load.run(SECONDS))
            probes.on()
            on.append(load.run(SECONDS))
            probes.off()
            if not i % 2:
                off.append(load.run(SECONDS))
        load.seq.close()
    for i, what in enumerate(("", ", in processor time")):
        ratios = [x[i] / y[i] for x, y in zip(on, off)]
        ratio, gb = statistics.median(ratios), DIM * 8 / 1e9
        print(f"# {name}{what}: ratios {' '.join(f'{r:.3f}' for r in sorted(ratios))}", file=sys.stderr)
        print(json.dumps({"name": f"probes on, rows through {name}{what}", "value": round(statistics.median(x[i] for x in on) * gb, 3),
                          "unit": "GB/s", "rival": "the same, probes off",
                          "rival_value": round(statistics.median(y[i] for y in off) * gb, 3), "ratio": round(ratio, 4),
                          "target": ">=0.99", "pass": ratio >= 0.99}), flush=True)


def time_in_programs(name, d, probes, **below):
    switch = Path("/proc/sys/kernel/bpf_stats_enabled")
    before = switch.read_text(encoding="ascii")
    with Client(d.socket) as c:
        load = Load(d, c, **below)
        probes.on()
        switch.write_text("1", encoding="ascii")
        begin = time.monotonic()
        load.run(2 * SECONDS)
        out = subprocess.run(["bpftool", "prog", "show", "-j"], capture_output=True, text=True, check=True).stdout
        took = time.monotonic() - begin
        switch.write_text(before, encoding="ascii")
        probes.off()
        load.seq.close()
    mine = {p["name"]: (p["run_time_ns"], p["run_cnt"]) for p in json.loads(out) if p.get("run_cnt")}
    for n, (ns, count) in sorted(mine.items(), key=lambda x: -x[1][0]):
        print(f"# {name}: {n} {count / took:.0f} a second, {ns / count:.0f} ns each", file=sys.stderr)
    share = sum(ns for ns, _ in mine.values()) / 1e9 / took / os.cpu_count()
    print(json.dumps({"name": f"time in probes, rows through {name}", "value": round(share * 100, 3), "unit": "%",
                      "rival": "all processors", "rival_value": 100, "ratio": round(share, 5), "target": "<=0.01",
                      "pass": share <= 0.01}), flush=True)


def main():
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    if os.getuid() or not (build_dir() / "kvtierd-bpf").exists():
        sys.exit("needs root and a built kvtierd-bpf")
    with tempfile.TemporaryDirectory() as t, World(kvtierd={"bpf_socket": t + "/s"}, dram={"size": "1G", "segment": "64M"},
                                                   nvme={"size": "2G", "segment": "64M", "staging": "32M"}) as d:
        probes = Probes(t + "/s", d)
        for name in ("dram", "nvme"):
            compare(name, pairs, d, probes, **{name: ROWS_ALL})
            time_in_programs(name, d, probes, **{name: ROWS_ALL})


if __name__ == "__main__":
    main()
