#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Compaction beside torch.gather: half of 32k rows of 256 bytes (K and V) of 112 lanes stay, in turns on the same GPU. torch gets the
indices for nothing and writes new tensors, in order. JSON lines. Exit status 77 without a GPU or PyTorch."""
import json
import os
import statistics
import subprocess
import sys

LANES, ROWS, DIM, TURNS, ROUNDS = 112, 32768, 128, 3, 9

try:
    import torch
except ImportError:
    print("no PyTorch", file=sys.stderr)
    sys.exit(77)
if not torch.cuda.is_available():
    print("PyTorch sees no GPU", file=sys.stderr)
    sys.exit(77)


def rival():
    """Milliseconds of two torch.gather calls (K, V), median."""
    k, v = (torch.randn(LANES, ROWS, DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    rows = torch.rand(LANES, ROWS, device="cuda").argsort(1)[:, : ROWS // 2].sort(1).values
    index = rows.unsqueeze(-1).expand(-1, -1, DIM)
    out, times = [torch.empty(LANES, ROWS // 2, DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv"], []
    for _ in range(ROUNDS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        torch.gather(k, 1, index, out=out[0])
        torch.gather(v, 1, index, out=out[1])
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def ours(which):
    build = os.environ.get("KVT_BUILD", "build")
    return float(subprocess.run([os.path.join(build, "tests/gpu/bench_move"), "--only", which], check=True, stdout=subprocess.PIPE, text=True).stdout)


def main():
    times = {"torch": [], "in-place": [], "ordered": []}
    for _ in range(TURNS):
        times["torch"].append(rival())
        torch.cuda.empty_cache()
        for which in ("in-place", "ordered"):
            times[which].append(ours(which))
    t = {k: statistics.median(v) for k, v in times.items()}
    for which in ("ordered", "in-place"):
        ratio = t["torch"] / t[which]
        print(json.dumps({"name": f"compact: half of 32k 256-byte rows stay, {which}", "value": round(t[which], 4), "unit": "ms", "rival": "torch.gather of K and V", "rival_value": round(t["torch"], 4), "ratio": round(ratio, 2), "target": ">=3", "pass": ratio >= 3}))


if __name__ == "__main__":
    main()
