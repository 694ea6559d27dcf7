#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""
torture 12: models of the ring and plan protocols, every state of each visited
pass: 0 errors; all seeded mutants caught
quick: every model at small bounds, 33 mutants
full: the same at larger bounds, all kinds of events together
plants: MODEL_MUTANT=ring:2 MODEL_MUTANT=ring:3 MODEL_MUTANT=ring:5 MODEL_MUTANT=ring:6
plants: MODEL_MUTANT=ring_hostile:2 MODEL_MUTANT=peek:1 MODEL_MUTANT=peek:5 MODEL_MUTANT=window:1
plants: MODEL_MUTANT=plan:1 MODEL_MUTANT=plan:4 MODEL_MUTANT=plan:7 MODEL_MUTANT=plan:8 MODEL_MUTANT=plan:15

What a model stands for, what it checks, and its mutants are in its head: models/*.pml. Here are the bounds. spin
makes a program of each, which visits every reachable state: an assertion that fails, or a state in which somebody waits for
ever, is an error. A search that ran out of memory, depth or time proves nothing and fails. MODEL_MUTANT=MODEL:N makes
that mutant the model.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent / "models"
FULL = os.environ.get("KVT_TORTURE", "quick") == "full"
MEM_MB = 6000 if FULL else 1500

# Of each model: bounds of the runs without a mutant in quick, more of them in full, and what a mutant needs to show.
BOUNDS = {
    "ring": {
        "quick": ["ENTRIES=2 CURSORS=8 ITEMS=10"],
        "full": ["ENTRIES=2 CURSORS=8 ITEMS=26", "ENTRIES=4 CURSORS=16 ITEMS=36", "ENTRIES=8 CURSORS=16 ITEMS=36"],
    },
    "ring_hostile": {"quick": ["ENTRIES=2 CURSORS=8"], "full": ["ENTRIES=4 CURSORS=16"]},
    "peek": {"quick": ["PLANS=3"], "full": ["PLANS=6"]},
    "window": {"quick": ["PLACES=2 PAGES=3 RECORDS=3"], "full": ["PLACES=3 PAGES=4 RECORDS=4"]},
    "plan": {
        "quick": ["TRUNCATES=1", "TIMEOUTS=1 FORKS=1", "MISSES=1 NACKS=1", "CLIENT_DEATHS=1", "DAEMON_DEATHS=1"],
        "full": ["TRUNCATES=1 TIMEOUTS=1", "TIMEOUTS=1 FORKS=1 MISSES=1", "MISSES=2 NACKS=1 REQUESTS=2",
                 "TRUNCATES=1 MISSES=1 CLIENT_DEATHS=1", "TRUNCATES=1 DAEMON_DEATHS=1", "NACKS=1 MISSES=1 CLIENT_DEATHS=2",
                 "CLIENT_DEATHS=1 DAEMON_DEATHS=1", "TRUNCATES=1 FORKS=1 TIMEOUTS=1"],
        "mutant": {2: "MISSES=1", 3: "TIMEOUTS=1", 4: "FORKS=1 TIMEOUTS=1", 5: "TRUNCATES=1", 6: "TRUNCATES=1 TIMEOUTS=1",
                   7: "NACKS=1", 8: "CLIENT_DEATHS=1", 9: "PLANS=2", 10: "TRUNCATES=1", 11: "MISSES=1", 13: "CLIENT_DEATHS=1",
                   14: "TRUNCATES=1", 15: "TRUNCATES=1"},
    },
}


def mutants(model):
    """{n: what it is}, as the model's head lists them."""
    head = (HERE / f"{model}.pml").read_text().split("*/")[1]
    found = re.findall(r"^ \* (?:MUTANT|      ) +(\d+)  (.*)$", head, re.M)
    return {int(n): text for n, text in found}


def check(model, mutant, bounds):
    """(errors, states, why the search proves nothing or "", what was wrong)"""
    defs = [f"-D{d}" for d in bounds.split()] + [f"-DMUTANT={mutant}"]
    with tempfile.TemporaryDirectory(prefix="kvt-model.") as d:
        r = subprocess.run(["spin", "-a", *defs, str(HERE / f"{model}.pml")], cwd=d, capture_output=True, text=True)
        if not Path(d, "pan.c").exists():
            return 0, 0, "spin: " + r.stdout.strip()[:200], ""
        opt = "-O2" if FULL and not mutant else "-O0"  # what is found soon is not worth the compiler's time
        subprocess.run(["gcc", opt, "-w", "-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={MEM_MB}", "-o", "pan", "pan.c"], cwd=d,
                       check=True)
        try:
            out = subprocess.run(["./pan", f"-m{10000000 if FULL else 1000000}"], cwd=d, capture_output=True, text=True,
                                 timeout=1800 if FULL else 120).stdout
        except subprocess.TimeoutExpired:
            return 0, 0, "out of time", ""
    errors = re.search(r"errors: (\d+)", out)
    states = re.search(r"(\d+) states, stored", out)
    wrong = re.search(r"^pan:\d+: (.*?) \(at depth", out, re.M)
    holes = [w for w in ("max search depth too small", "-DMEMLIM bound", "out of memory", "hash-table full") if w in out]
    if not errors or not states:
        holes.append("no result")
    return int(errors.group(1)) if errors else 0, int(states.group(1)) if states else 0, ", ".join(holes), \
        wrong.group(1)[:80] if wrong else ""


def jobs():
    """(model, mutant, bounds, is an error wanted), long ones first."""
    planted = os.environ.get("MODEL_MUTANT")
    if planted:
        model, _, n = planted.partition(":")
        b = BOUNDS[model]
        return [(model, int(n), b.get("mutant", {}).get(int(n), b["quick"][0]), False)]
    out = []
    for model, b in BOUNDS.items():
        out += [(model, 0, bounds, False) for bounds in b["quick"] + (b["full"] if FULL else [])]
    out.reverse()
    for model, b in BOUNDS.items():
        for n in mutants(model):
            out.append((model, n, b.get("mutant", {}).get(n, b["quick"][0]), True))
    return out


def main():
    if not shutil.which("spin") or not shutil.which("gcc"):
        print("ok 1 - models # SKIP no spin or no gcc here\n1..1")
        return 0
    start, todo, bad, caught, visited = time.time(), jobs(), 0, 0, 0
    # In full each search may take gigabytes.
    width = max(1, min(os.cpu_count() or 1, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (MEM_MB << 20)))
    with ThreadPoolExecutor(width) as pool:
        results = pool.map(lambda j: check(*j[:3]), todo)
        for i, ((model, n, bounds, want), (errors, states, hole, wrong)) in enumerate(zip(todo, results), 1):
            good = bool(errors) if want else not errors and not hole
            bad += not good
            if want:
                caught += bool(errors)
                name = f"{model}.pml, mutant {n} is caught: {mutants(model)[n]} ({wrong})"
            else:
                visited += states
                name = f"{model}.pml{f', mutant {n}' if n else ''}, {bounds}: {states:,} states"
            print(f"{'ok' if good else 'not ok'} {i} - {name.replace('#', '')}", flush=True)
            if hole and not want:
                print(f"# the search proves nothing: {hole}")
            if not good and wrong:
                print(f"# {wrong}")
    print(f"1..{len(todo)}")
    n_mutants = sum(1 for j in todo if j[3])
    print(f"# figure: {len(BOUNDS)} models, {visited:,} states, {sum(1 for j in todo if not j[3])} searches without an error; "
          f"{caught} of {n_mutants} mutants caught; {time.time() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
