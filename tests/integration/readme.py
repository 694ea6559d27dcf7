#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What README.md promises: its program compiles and runs, its targets, verbs and files exist. TAP."""
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ipc" / "python"))

from kvtier.daemon import PrivateDaemon, build_dir  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def example_is_the_file_in_the_tree():
    programs = blocks("c")
    assert len(programs) == 1, f"{len(programs)} C programs in README.md"
    assert programs[0] == (ROOT / "tests/data/example.c").read_text(), "README.md and tests/data/example.c differ"
    assert programs[0].count("\n") <= 60, "longer than 60 lines"


def example_compiles_and_runs():
    with tempfile.TemporaryDirectory(prefix="kvt.") as tmp, PrivateDaemon(dram="64M", nvme="64M") as d:
        source, program = Path(tmp) / "example.c", Path(tmp) / "example"
        source.write_text(blocks("c")[0])
        subprocess.run([os.environ.get("CC", "gcc"), "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'ipc'}", "-o", program,
                        source, f"-L{build_dir()}", "-lkvtier", f"-Wl,-rpath,{build_dir()}"], check=True)
        out = subprocess.run([program], env=dict(os.environ, KVTIER_SOCKET=d.socket), check=True, text=True,
                             stdout=subprocess.PIPE, timeout=60).stdout
    assert out.strip() in README, f"README.md does not show what the program prints: {out!r}"


def make_targets_exist():
    known = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):(?!=)", (ROOT / "Makefile").read_text(), re.M))
    known = {t for group in known for t in group.split()}
    used = set(re.findall(r"(?:`|^)(?:sudo )?make ([a-z][a-z-]+)", README, re.M))
    assert {"demo", "test", "bench"} <= used, used
    assert used <= known, f"not in the Makefile: {used - known}"


def verbs_exist():
    usage = subprocess.run([build_dir() / "kvtierctl", "--help"], check=True, text=True, stdout=subprocess.PIPE).stdout
    used = {v for cell in re.findall(r"^\| `kvtierctl ([^|]*)\|", README, re.M)
            for v in re.findall(r"[a-z]+", cell.replace("`", " ").split(" SEQ")[0])} - {"list", "load", "set"}
    assert len(used) >= 10, used
    missing = {v for v in used if not re.search(rf"^\s+{v}\b", usage, re.M)}
    assert not missing, f"kvtierctl --help knows no {missing}"


def files_exist():
    named = set(re.findall(r"`((?:shm|ipc|tiers|policy|daemon|systemd|tests)/[\w./-]*)`", README))
    assert len(named) > 8, named
    missing = {n for n in named if not (ROOT / n).exists()}
    assert not missing, f"named in README.md and not there: {missing}"


def figures_are_a_table():
    rows = re.findall(r"^\| .*\| (?:≥|≤|–).*\|$", README, re.M)
    assert len(rows) >= 8, f"{len(rows)} rows of figures"
    assert "@" + "BENCH" not in README and "@" + "DEMO" not in README, "a placeholder was left"


TESTS = [example_is_the_file_in_the_tree, example_compiles_and_runs, make_targets_exist, verbs_exist, files_exist,
         figures_are_a_table]


def main():
    bad = 0
    print(f"1..{len(TESTS)}")
    for n, test in enumerate(TESTS, 1):
        try:
            test()
            print(f"ok {n} - {test.__name__}")
        except Exception:
            bad += 1
            print(f"not ok {n} - {test.__name__}\n# " + traceback.format_exc().replace("\n", "\n# "))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
