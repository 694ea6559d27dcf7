#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Which policy that needs no weights loses least: SmolLM2-135M-Instruct, perplexity of the true continuation.

usage: policies.py [TEXT...]        (make bench-policies; about six minutes on two cores)

Each text gives samples of 2,000 tokens of context and 400 of continuation. Every lane keeps 25 % and 10 % of the
context's rows, the rest is dropped; first 4 and last 16 rows stay whatever the policy. Printed is the rise of the
mean loss in nats, per sample and averaged.
"""
import importlib
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ipc" / "python"))

POLICIES = ("random", "streaming", "knorm", "vnorm", "vrange", "keydiff", "lagkv", "cur")
CONTEXT, CONT, KEEP = 2000, 400, (500, 200)


def default_texts():
    """Prose of our own, a licence, a manual page and source code that a Debian machine with Python has."""
    yield "story", (ROOT / "ipc/python/kvtier/data/harbour.txt").read_text()
    gpl = Path("/usr/share/common-licenses/GPL-3")
    if gpl.exists():
        yield "licence", gpl.read_text()
    man = subprocess.run("man -P cat bash | col -b", shell=True, text=True, capture_output=True).stdout
    if len(man) > 20000:
        yield "manual", man
    yield "code", "".join(inspect.getsource(importlib.import_module(m)) for m in ("tokenize", "smtplib", "heapq"))


def main():
    import torch
    from kvtier import Client, budget
    from kvtier.daemon import PrivateDaemon
    from kvtier.demo import perplexity
    from kvtier.hf import KvtierCache
    from kvtier.smollm2 import NAME, load

    torch.set_grad_enabled(False)
    texts = [(Path(f).name, Path(f).read_text(errors="replace")) for f in sys.argv[1:]] or list(default_texts())
    model, tok = load()
    rise = {}
    print(f"{'sample':<14}{'full':>8}  " + "".join(f"{p:>16}" for p in POLICIES))
    with PrivateDaemon(dram="1G", nvme="512M") as d, Client(d.socket) as c:
        def cache():
            return KvtierCache(model.config, c, CONTEXT + CONT + 8, name=NAME, budget=budget(manual=True))

        for name, text in texts:
            ids = tok(text, return_tensors="pt").input_ids
            for off in (0, 3000):
                if ids.shape[1] < off + CONTEXT + CONT:
                    continue
                context, target = ids[:, off : off + CONTEXT], ids[:, off + CONTEXT : off + CONTEXT + CONT]
                full = cache()
                for i in range(0, CONTEXT, 250):
                    first = model(context[:, i : i + 250], past_key_values=full).logits[:, -1]
                rows = [(layer.keys.clone(), layer.values.clone()) for layer in full.layers]
                base = perplexity(torch, model, full, first, target)
                full.close()
                for p in POLICIES:
                    for keep in KEEP:
                        one = cache()
                        for layer, (k, v) in zip(one.layers, rows):
                            layer.update(k, v)
                        one.compress(budget(keep, 0, 0, policy=p, manual=True))
                        loss = math.log(perplexity(torch, model, one, first, target) / base)
                        rise.setdefault((p, keep), []).append(loss)
                        one.close()
                print(f"{name + '+' + str(off):<14}{base:>8.2f}  " +
                      "".join(f"{rise[p, KEEP[0]][-1]:>9.3f}{rise[p, KEEP[1]][-1]:>7.3f}" for p in POLICIES), flush=True)
    mean = {k: sum(v) / len(v) for k, v in rise.items()}
    print(f"{'mean':<14}{'':>8}  " + "".join(f"{mean[p, KEEP[0]]:>9.3f}{mean[p, KEEP[1]]:>7.3f}" for p in POLICIES))


if __name__ == "__main__":
    main()
