#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""torture 9: any bytes for every parser, any messages and any shared memory for a whole core

pass: 10^6 executions of each target, address and undefined behaviour sanitizers silent
quick: a few thousand to a few hundred thousand of each, by their cost (printed)
full: 10^6 of each, corpora kept in build/fuzz/corpus
plants: wire-count-unchecked table-overlap-unchecked handle-owner-unchecked

Targets are tests/fuzz/fuzz_*.c, built by `make fuzz-bin` into build/fuzz. Their seeds are made here. fuzz_session and
fuzz_window hold a real core in their process and also assert that it comes to rest after each step, answers in well-formed
messages, and keeps nothing of clients that went.

KVT_TORTURE=long (make fuzz-long): 10^8 of each, in slices on all cores; what is done is kept in build/fuzz/long.json, so
that it goes on where it stopped; KVT_MINUTES=N stops after N minutes. An input that fails is kept beside the binaries.
"""
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

from lib import raw  # noqa: E402
from lib.world import SEED, Failed, Skip, Tap, expect  # noqa: E402

BIN = ROOT / "build" / "fuzz"
MODE = os.environ.get("KVT_TORTURE", "quick")
MINUTES = float(os.environ.get("KVT_MINUTES", "0"))
# target: (executions in quick, longest input, executions of one slice)
TARGETS = {
    "session": (4000, 512, 60000), "window": (3000, 512, 60000), "wire": (200000, 8192, 1000000),
    "ring": (100000, 1024, 1000000), "nvme_format": (100000, 8192, 1000000), "store": (1500, 1024, 60000),
    "dram_dir": (1000, 512, 40000), "ledger": (4000, 4096, 125000),
    "trace": (12000, 4096, 250000), "snapshot": (8000, 4096, 250000), "config": (8000, 8192, 250000),
    "weights": (4000, 4096, 125000), "calibration": (10000, 4096, 250000), "recall": (1200, 4096, 60000),
}
ENV = dict(os.environ, UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
           ASAN_OPTIONS="quarantine_size_mb=32:malloc_context_size=8:detect_leaks=1")


# ---- seeds ---------------------------------------------------------------------------

def wire_seeds():
    """One of each request; byte 0 asks the target to mend the frame after a mutation."""
    table = struct.pack("<4I", 1, 2, 3, 4)
    bodies = [
        (raw.HELLO, raw.hello()), (raw.MODEL, raw.model()), (raw.REGION, struct.pack("<Q", 4096)),
        (raw.SEQ_OPEN, raw.seq_open(region=1)), (raw.SEQ_TRUNCATE, struct.pack("<QII", 1, 2, 0)),
        (raw.SEQ_CLOSE, struct.pack("<QII", 1, 1, 0)), (raw.SEQ_INFO, struct.pack("<Q", 1)),
        (raw.PLAN_REQUEST, struct.pack("<Q", 1) + raw.budget(kind=2, table_n=4) + table),
        (raw.FETCH, struct.pack("<QII", 1, 0, 8)), (raw.ADMIN, struct.pack("<II", 2, 8) + b"show\0ab\0"),
        (12, struct.pack("<Q10If2H", 1, 0, 0, 0, 4, 2, 1, 4, 1, 100, 0, 0.5, 8, 24) + raw.layout(cap=8, stage=0) +
         struct.pack("<8f", *range(8))),
        (13, struct.pack("<Q32s", 1, b"kvp")), (14, struct.pack("<Q", 1)), (15, struct.pack("<II", 1, 0)),
    ]
    return [b"\2" + raw.message(kind, body) for kind, body in bodies]


APPEND, ACK, PLAN, HANDLE, GATHER, DRAIN, TIME, OPEN, PEER, CURSOR, RECALL = 0, 2, 3, 4, 7, 9, 11, 12, 13, 16, 17


def session_seeds(window):
    """Operations of tests/fuzz/session_ops.h: rows, plans that demote and promote them, and what interrupts those."""
    def start(shape, how=0x02):
        # peer 0; a first sequence with that way of opening and a budget that is all the device
        first = shape | (0x10 if not window else 0)
        return bytes([first, 0, how, 0x01 | 0x04 | 0x08, 0, 0, 0, 0])

    def plan(device, dram, how=0x04):
        return bytes([PLAN, how | 0x08, device, dram // 2, 0])

    move = bytes([GATHER, 7, 0, DRAIN, 15, TIME, 1]) * 3 if window else bytes([TIME, 1])
    rows = bytes([APPEND, 99, APPEND, 50])
    seeds = []
    for shape in range(4):
        for how in (0x00, 0x10, 0x20):
            s = start(shape, how)
            down, up = plan(40, 400) + move + bytes([ACK, 0]), plan(150, 400) + move + bytes([ACK, 0])
            seeds += [s + rows + down + up, s + rows + down + rows + down + up,
                      s + rows + bytes([TIME, 0]) + plan(40, 400) + bytes([HANDLE, 0, 200, 0]) + move,
                      s + rows + down + bytes([HANDLE, 1, 0]) + bytes([OPEN, 1, 0x0c | how, 0, 0, 0, 0]),
                      s + rows + down + bytes([PEER, 0x40]) + bytes([OPEN, 1, 0x08 | how, 0, 0, 0, 0]),
                      s + rows + down + bytes([RECALL, 1, 1, 0, 30, 255, 0, 8, 24, 0])]
    return seeds


def store_seeds():
    """A word changed in each kind of unit, with checksums made right: superblock, head, map, table, foot."""
    def put(unit, at, value):
        return bytes([unit, 0x80]) + struct.pack("<HI", at, value)

    words = [(0, 32, 9), (0, 48, 1), (2, 32, 7), (3, 56, 0), (5, 248, 4), (5, 152, 3), (5, 52, 1 << 20), (5, 60, 99), (5, 72, 1 << 30),
             (5, 80, 1), (6, 48, 1), (6, 56, 60), (6, 64, 0), (6, 76, 63)]
    return [b"\1\0" + put(*w) for w in words] + [b"\0\0" + put(*w) for w in words[:3]] + [b"\2\xff", b"\x21\0"]


def seeds(target):
    if target == "store":
        return store_seeds()
    if target == "wire":
        return wire_seeds()
    if target in ("session", "window"):
        return session_seeds(target == "window")
    if target == "config":
        return [(ROOT / "systemd" / "kvtierd.conf").read_bytes(), b"[dram]\nsize=64M\n", b"[tenant a]\nsocket=a\n"]
    if target == "calibration":  # knots so far apart that their distance is no float
        wide = b"".join(struct.pack("<Bf", i, v) for i, v in ((9, -3e38), (10, 3e38), (11, 3e38), (12, 3e38)))
        return [b"\1\0" + wide, b"\1\0" + bytes(30), b"\0\0" + bytes(120)]
    if target == "dram_dir":
        return [struct.pack("<BBBBIB", seal, 0, where, off, 7, 2) for seal in (0, 1) for where, off in
                ((3, 16), (3, 24), (4, 28), (5, 32), (6, 36), (7, 44), (8, 46), (9, 48), (10, 50), (200, 0), (203, 64), (250, 24))]
    if target == "ledger":  # a word of the head or of an entry: magic, version, boot, marks' count, name, floor, epoch, born, a mark
        return [struct.pack("<BBBBI", how, slot, at, 4, 0x7fffffff)[:8] for how in (1, 3, 7) for slot, at in
                ((0, 4), (0, 8), (0, 16), (1, 4), (1, 8), (2, 16), (2, 32), (3, 40), (3, 44), (4, 48), (5, 104), (6, 255))] + [b"\0" + bytes(600), b"\2" + bytes(1100)]
    if target in ("weights", "trace", "nvme_format"):
        return [bytes([k]) + bytes(32) for k in range(8)]
    return [bytes(64)]


# ---- one run of one target -----------------------------------------------------------------


def words():
    """A dictionary: names of configuration keys and values that sit at limits."""
    text = (ROOT / "systemd" / "kvtierd.conf").read_text()
    keys = sorted(set(re.findall(r"^#?([a-z_]+) *=", text, re.M)))
    return "".join(f'"{k}="\n' for k in keys) + '"4K"\n"1T"\n"yes"\n"no"\n"%"\n"[tenant "\n'


class Stat:
    def __init__(self):
        self.runs, self.secs, self.edges = 0, 0.0, 0


def fuzz(target, runs, corpus, seed, stat, lock):
    """Failed with the sanitizer's report, and where the input is."""
    exe = BIN / f"fuzz_{target}"
    argv = [str(exe), f"-runs={runs}", f"-seed={seed}", f"-max_len={TARGETS[target][1]}", "-entropic=0", "-timeout=60",
            "-rss_limit_mb=3072", "-print_final_stats=1", "-reload=0", f"-artifact_prefix={BIN}/{target}-"]
    if target == "config":
        argv.append(f"-dict={BIN}/config.dict")
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        p = subprocess.Popen(argv + [str(corpus)], env=ENV, stdout=log, stderr=log)
        _, status, used = os.wait4(p.pid, 0)
        p.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        out = log.read()
    done = re.search(r"number_of_executed_units: *(\d+)", out)
    cov = re.findall(r"cov: (\d+)", out)
    with lock:
        stat.runs += int(done.group(1)) if done else 0
        stat.secs += used.ru_utime + used.ru_stime
        stat.edges = max([stat.edges] + [int(c) for c in cov[-1:]])
    if p.returncode:
        lines = [x for x in out.splitlines() if re.search(r"ERROR|must hold|runtime error|SUMMARY|Test unit|^ +#[0-9] ", x)]
        for line in lines[:24]:
            print(f"#   {line}", flush=True)
        raise Failed(f"fuzz_{target}: exit status {p.returncode}: {(lines or out.splitlines()[-1:])[0]}")


def fill(corpus, target):
    corpus.mkdir(parents=True, exist_ok=True)
    for i, s in enumerate(seeds(target)):
        (corpus / f"seed-{i:03}").write_bytes(s)


class Round:
    """Slices of all targets, as many at once as there are cores."""

    def __init__(self, want, keep):
        self.want, self.keep = want, keep
        self.stats = {t: Stat() for t in TARGETS}
        self.errors, self.lock = {}, Lock()
        self.end = time.monotonic() + MINUTES * 60 if MINUTES else None

    def slice(self, target, runs, corpus, seed):
        if target in self.errors or (self.end and time.monotonic() > self.end):
            return
        try:
            fuzz(target, runs, corpus, seed, self.stats[target], self.lock)
        except Failed as e:
            with self.lock:
                self.errors[target] = e
        self.keep(self)

    def run(self, corpora, done):
        """done: executions that count already."""
        jobs, at = [], dict(done)
        while any(at[t] < self.want(t) for t in TARGETS):
            for t in TARGETS:
                if at[t] < self.want(t):
                    n = min(TARGETS[t][2], self.want(t) - at[t])
                    jobs.append((t, n, corpora / t, (SEED * 1000003 + at[t]) % 2**31 + 1))
                    at[t] += n
        for t in TARGETS:
            fill(corpora / t, t)
        with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
            list(pool.map(lambda j: self.slice(*j), jobs))

    def result(self, target, want):
        if target in self.errors:
            raise self.errors[target]
        s = self.stats[target]
        print(f"# {target}: {s.runs:,} executions, {s.runs / max(s.secs, 0.01):,.0f}/s a core, {s.edges:,} edges", flush=True)
        expect(self.end or s.runs >= want, f"{target}: {s.runs} executions, asked for {want}")


def figure(r):
    total, least = sum(s.runs for s in r.stats.values()), min(s.runs for s in r.stats.values())
    print(f"# figure: {len(TARGETS)} fuzz targets, {total:,} executions (at least {least:,} of each), "
          f"{len(r.errors)} findings; whole sessions at {r.stats['session'].runs / max(r.stats['session'].secs, 0.01):,.0f}/s "
          f"a core over {r.stats['session'].edges:,} edges", flush=True)


def short(tap):
    want = (lambda t: TARGETS[t][0]) if MODE == "quick" else (lambda t: 10**6)
    r = Round(want, lambda _: None)
    with tempfile.TemporaryDirectory(prefix="kvt-fuzz-") as tmp:
        r.run(Path(tmp) if MODE == "quick" else BIN / "corpus", {t: 0 for t in TARGETS})
    for t in TARGETS:
        tap.case(f"fuzz_{t}: {want(t):,} executions", r.result, t, want(t))
    figure(r)


def long(tap):
    state = BIN / "long.json"
    before = json.loads(state.read_text()) if state.exists() else {}
    before = {t: before.get(t, 0) for t in TARGETS}

    def keep(r):
        with r.lock:
            now = {t: before[t] + r.stats[t].runs for t in TARGETS}
            tmp = state.with_suffix(".tmp")
            tmp.write_text(json.dumps(now))
            tmp.rename(state)

    r = Round(lambda t: 10**8, keep)
    r.run(BIN / "corpus", before)
    for t in TARGETS:
        tap.case(f"fuzz_{t}: {before[t] + r.stats[t].runs:,} of 100,000,000 executions so far", r.result, t, 0)
    figure(r)


def missing():
    raise Skip(f"not built: {', '.join(t for t in TARGETS if not (BIN / ('fuzz_' + t)).exists())}; make fuzz-bin needs clang "
               "and its libFuzzer")


def main():
    tap = Tap()
    if not all((BIN / f"fuzz_{t}").exists() for t in TARGETS):
        tap.case("fuzz targets", missing)
        tap.done()
    (BIN / "config.dict").write_text(words())
    (long if MODE == "long" else short)(tap)
    tap.done()


if __name__ == "__main__":
    main()
