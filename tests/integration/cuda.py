#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The GPU tier where there is no GPU: what nvcc made is complete and spills nothing, and every check of the kernels and of
the library's CUDA side passes on the fake driver, which runs the kernels' sources thread by thread on the CPU. TAP.

The same programs run on a GPU by tests/gpu/run check.
"""
import os
import re
import struct
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("KVT_BUILD", ROOT / "build"))
FATBIN = BUILD / "kvtier-cuda.fatbin"
PTXAS = BUILD / "kvtier-cuda.ptxas.txt"
FAKE = BUILD / "fake/libcuda.so.1"
SMALL_S = 100  # of one program
# Bytes of local memory that a cap on registers (for occupancy, or the hardware's 255) leaves these with. Everybody else has
# none; more than this is a regression.
LOCAL = {"kvt_compact": 32, "kvt_compact_to": 32, "kvt_recall_mark": 16, "kvt_recall_select": 16}


class Skip(Exception):
    pass


def kernels():
    """Names in CUDA_KERNELS of ipc/cuda/kernels.h."""
    text = (ROOT / "ipc/cuda/kernels.h").read_text()
    found = re.search(r"#define CUDA_KERNELS\(X\)(.*?)\n\n", text, re.S)
    names = re.findall(r"X\((kvt_\w+)\)", found.group(1))
    assert len(names) == len(set(names)) >= 8, names
    return names


def made():
    if not FATBIN.exists():
        raise Skip("no nvcc, so no kvtier-cuda.fatbin (.ci/deps cuda gets one)")


def images(data):
    """(kind, architecture, bytes) of each image: kind 1 is PTX, 2 machine code. Not compressed, as the Makefile asks."""
    at = 0
    while at < len(data):
        magic, _, header, size = struct.unpack_from("<IHHQ", data, at)
        assert magic == 0xBA55ED50, f"no fatbin at {at}: {magic:#x}"
        at, end = at + header, at + header + size
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
            yield kind, struct.unpack_from("<I", data, at + 28)[0], data[at + header : at + header + size]
            at += header + size


def sections(elf):
    """Names of an ELF file's sections."""
    table, = struct.unpack_from("<Q", elf, 0x28)
    size, n, names = struct.unpack_from("<HHH", elf, 0x3A)
    start, = struct.unpack_from("<Q", elf, table + names * size + 0x18)
    out = []
    for i in range(n):
        at = start + struct.unpack_from("<I", elf, table + i * size)[0]
        out.append(elf[at : elf.index(b"\0", at)].decode())
    return out


def fatbin_holds_every_kernel():
    made()
    code, ptx = set(), set()
    for kind, arch, image in images(FATBIN.read_bytes()):
        if kind == 2 and arch == 90:
            code |= {s[len(".text.") :] for s in sections(image) if s.startswith(".text.")}
        elif kind == 1 and arch == 80:
            text = image.decode("ascii", "replace")
            assert ".target sm_80" in text
            ptx |= set(re.findall(r"\.entry (\w+)", text))
    want = set(kernels())
    assert want <= code, f"not there as code for sm_90: {sorted(want - code)}"
    assert want <= ptx, f"not there as PTX for compute_80: {sorted(want - ptx)}"
    assert code == ptx, f"in one form only: {sorted(code ^ ptx)}"


def kernels_stay_in_registers():
    made()
    if not PTXAS.exists():
        raise Skip("kvtier-cuda.fatbin comes without its ptxas report (it was not built here)")
    blocks = re.split(r"Compiling entry function '(\w+)' for 'sm_\d+a?'", PTXAS.read_text())
    seen = {}
    for name, text in zip(blocks[1::2], blocks[2::2]):
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        assert numbers, f"{name}: ptxas says nothing about its stack"
        seen[name] = tuple(map(int, numbers.groups()))
    missing = set(kernels()) - set(seen)
    assert not missing, f"ptxas says nothing about {sorted(missing)}"
    bad = {k: v for k, v in seen.items() if v[0] > LOCAL.get(k, 0) or (any(v) and k not in LOCAL)}
    assert not bad, f"(stack frame, spill stores, spill loads) in bytes: {bad}, allowed are stacks of {LOCAL}"


def run(program, **env):
    """Its number of checks, all of them passed."""
    kernels = FAKE.parent / "kernels"  # the fake driver holds them itself; the library wants a file
    kernels.write_text("kernels of the fake driver\n")
    env = dict(os.environ, KVTIER_LIBCUDA=str(FAKE), KVTIER_CUDA_KERNELS=str(kernels), **env)
    p = subprocess.run([program, "--small"], env=env, text=True, errors="replace", timeout=SMALL_S, cwd=ROOT,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    good = len(re.findall(r"^ok\b", p.stdout, re.M))
    plan = re.findall(r"^1\.\.(\d+)", p.stdout, re.M)
    tail = "\n".join(p.stdout.splitlines()[-40:])
    assert p.returncode == 0, f"exit status {p.returncode}\n{tail}"
    assert "not ok" not in p.stdout and good > 0, tail
    assert plan and int(plan[-1]) == good, f"{good} results, planned {plan}\n{tail}"
    return good


def small(program):
    """A program of tests/gpu on the fake driver: threads in rising order, work done at once; in falling order, work done
    by another thread at its own pace."""
    def test():
        if not program.exists():
            raise Skip(f"{program} is not built (make tests-bin does)")
        if not FAKE.exists():
            raise Skip(f"no {FAKE.name} for tests in {FAKE.parent}")
        n = run(program), run(program, KVT_HOST_ORDER="falling", KVT_FAKE_CUDA="async")
        return f"{n[0]} and {n[1]} checks"

    test.__name__ = f"{program.name}_on_the_fake_driver"
    return test


def main():
    sources = [*sorted((ROOT / "tests/gpu").glob("check_*.c")), ROOT / "tests/gpu/e2e.c"]
    programs = [BUILD / "tests/gpu" / p.stem for p in sources
                if p.stem != "check_train"]  # the trainer's has unit tests and tests/gpu/run host
    tests = [fatbin_holds_every_kernel, kernels_stay_in_registers, *map(small, programs)]
    bad = 0
    print(f"1..{len(tests)}")
    for n, test in enumerate(tests, 1):
        try:
            said = test()
            print(f"ok {n} - {test.__name__}" + (f": {said}" if said else ""), flush=True)
        except Skip as why:
            print(f"ok {n} - {test.__name__} # SKIP {why}", flush=True)
        except Exception:
            bad += 1
            print(f"not ok {n} - {test.__name__}\n# " + traceback.format_exc().replace("\n", "\n# "), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
