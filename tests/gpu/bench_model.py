#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What kvtier costs and gains a model of 7B shape on a GPU. JSON lines as tests/bench/run reads them.

    tests/gpu/bench_model.py [decode] [prefill] [throughput] [--steps N] [--batch N]

The model is Qwen2.5-7B's shape (28 layers, 28 heads on 4 KV heads of 128, hidden 3584, intermediate 18944) with random
weights in bf16 and a vocabulary of 32,000; its network of the policy is random too. Neither changes what is computed.
Each figure stands beside the same attention over the same kind of cache without kvtier (LaneCache), in one run, in
turns.

    decode      one sequence of 4,096 rows on the device, step by step with a wait for each: eager and as a CUDA graph;
                nothing pending; then append, scoring and a plan every 256 tokens
    prefill     10,000 tokens in chunks of 2,048, written through to DRAM and scored
    throughput  32,768 rows of context, 10 % of them on the device, against all of them: the same batch, and the most
                that fits. A few sequences come to that point through kvtierd: they give the memory of one and what
                kvtier costs; the large batches' rows are written straight in
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "ipc", "python"))

import torch  # noqa: E402
from kvtier import Client, attention_cuda, budget  # noqa: E402
from kvtier.client import Model  # noqa: E402
from kvtier.cuda import Gpu, Scorer, Window  # noqa: E402
from kvtier.daemon import PrivateDaemon, build_dir  # noqa: E402
from kvtier.hf_cuda import DecodeGraph, KvtierCudaCache, LaneCache  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

NAME, LAYERS, KV, DIM = "bench-7b", 28, 4, 128
ROW_BYTES = LAYERS * KV * DIM * 2 * 2  # of one position, all lanes
DEV = torch.device("cuda")


def say(line):
    print(line, file=sys.stderr, flush=True)


def report(name, value, unit, rival, rival_value, target, higher=False):
    """target: of the ratio value / rival."""
    ratio = value / rival_value if rival_value else None
    met = None if target is None or ratio is None else ratio >= target if higher else ratio <= target
    print(json.dumps({"name": name, "value": round(value, 4), "unit": unit, "rival": rival,
                      "rival_value": rival_value and round(rival_value, 4), "ratio": ratio and round(ratio, 4),
                      "target": "-" if target is None else f"{'>=' if higher else '<='}{target}",
                      "pass": True if met is None else met}), flush=True)


def make_model():
    start = time.monotonic()
    cfg = Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=LAYERS, num_attention_heads=28,
                      num_key_value_heads=KV, vocab_size=32000, max_position_embeddings=65536, rope_theta=1e6,
                      attn_implementation=attention_cuda.NAME)
    torch.set_default_dtype(torch.bfloat16)
    with DEV:
        model = Qwen2ForCausalLM(cfg).eval()
    torch.set_default_dtype(torch.float32)
    say(f"# {sum(p.numel() for p in model.parameters()) / 1e9:.2f} G parameters, {time.monotonic() - start:.1f} s")
    return model


class Setting:
    """The model, a daemon, and what caches share."""

    def __init__(self, model, client):
        self.model, self.client, self.gpu = model, client, Gpu()
        self.desc = Model(client, NAME, LAYERS, KV, DIM, "bfloat16", rope_theta=1e6)
        self.scorer = Scorer(client, self.gpu, self.desc, "kvp")
        say(f"# {self.gpu.info()['name']}, policy {self.scorer.policy}, {self.scorer.coefs} coefficients")

    def plain(self, cap, batch=1):
        return LaneCache(self.model.config, cap, batch)

    def kvtier(self, max_rows, b, **kw):
        return KvtierCudaCache(self.model.config, self.client, max_rows, model=self.desc, gpu=self.gpu,
                               scorer=self.scorer, budget=b, **kw)


def fill(cache, rows, step=256):
    """Random rows, `step` at a time through the cache's own way in. Returns it."""
    k, v = (torch.randn(cache.batch, KV, step, DIM, device=DEV, dtype=torch.bfloat16) for _ in "kv")
    while cache.seen < rows:
        n = min(step, rows - cache.seen)
        for layer in cache.layers:
            layer.update(k[:, :, :n].roll(layer.index, 2), v[:, :, :n].roll(layer.index, 2))
    return cache


def fill_plain(cache, rows):
    """The same rows at once: nobody is told."""
    cache.rows.normal_()
    cache.counts.fill_(rows)
    cache.seen = cache.most = rows
    return cache


def clock(step, n):
    """Wall time of each of n steps, the GPU waited for after each; ms."""
    out = []
    for _ in range(n):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        out.append((time.perf_counter() - start) * 1e3)
    return out


def stepper(model, cache, ids, way):
    """A function that decodes one token."""
    if way == "eager":
        return lambda: model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    graph = DecodeGraph(model, cache)
    return lambda: graph(ids)


# ---- decode --------------------------------------------------------------------------------------------


def decode(s, args):
    rows, every = 4096, 256
    ids = torch.randint(0, 32000, (1, 1), device=DEV)
    for way, steps in (("graph", args.steps), ("eager", args.steps // 4)):
        ours = fill(s.kvtier(rows + 8192, budget(manual=True), cap=rows + 2048, push_every=1 << 30), rows)
        ours.settle()
        plain = fill_plain(s.plain(rows + 2048), rows)
        a, b = (stepper(s.model, cache, ids, way) for cache in (ours, plain))
        clock(a, 3), clock(b, 3)
        mine, theirs = [], []
        for i in range(steps):  # in turns, the first one changing
            for step, to in ((a, mine), (b, theirs)) if i % 2 else ((b, theirs), (a, mine)):
                to += clock(step, 1)
        halves = [statistics.median(theirs[i::2]) for i in (0, 1)]
        say(f"# {way}: without kvtier, every other step {halves[0]:.3f} and {halves[1]:.3f} ms: the noise")
        report(f"decode step, {way}, nothing pending", statistics.median(mine), "ms", "without kvtier",
               statistics.median(theirs), 1.01)
        ours.close(), plain.close()
    for way, blocks in (("graph", max(2, args.steps // every)), ("eager", 1)):
        auto = budget(rows, 1 << 20, policy="kvp", slack=every - 56)
        ours = fill(s.kvtier(rows + 16384, auto, cap=rows + 2048, push_every=every), rows)
        ours.settle()
        plain = fill_plain(s.plain(rows + 2048), rows)
        a, b = (stepper(s.model, cache, ids, way) for cache in (ours, plain))
        clock(a, 3), clock(b, 3)
        mine, theirs, plans = [], [], ours.seq.info()["plans"]
        for _ in range(blocks):
            mine += clock(a, every)
            theirs += clock(b, every)
            plain.truncate(rows)
        plans = ours.seq.info()["plans"] - plans
        say(f"# {way}: {plans} plans in {len(mine)} steps, medians {statistics.median(mine):.3f} and "
            f"{statistics.median(theirs):.3f} ms, slowest {max(mine):.2f} and {max(theirs):.2f}")
        if plans < blocks - 1:
            raise RuntimeError(f"plans: {plans} in {blocks} blocks of {every} steps, one each was meant")
        report(f"decode step, {way}, a plan every {every} tokens (mean)", statistics.mean(mine), "ms", "without kvtier",
               statistics.mean(theirs), 1.03)
        ours.close(), plain.close()


# ---- prefill ---------------------------------------------------------------------------------------------


def prefill(s, args, rows=10000, chunk=2048):
    ids = torch.randint(0, 32000, (1, rows), device=DEV)

    def run(cache):
        for i in range(0, rows, chunk):
            s.model(ids[:, i : i + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)

    through = budget(rows, rows, policy="kvp", write_through=True)
    window = Window(s.client, s.gpu, Window.needed(s.desc, rows, s.scorer.coefs, 256 << 20, 0))
    mine, theirs, stored, alone = [], [], [], None
    for i in range(args.rounds + 1):
        ours = s.kvtier(rows, through, push_every=chunk, window=window, out_bytes=256 << 20)
        plain = s.plain(rows)
        for cache, to in ((ours, mine), (plain, theirs)) if i % 2 else ((plain, theirs), (ours, mine)):
            to += clock(lambda: run(cache), 1)
            if cache is ours:
                start = time.perf_counter()
                ours.settle()
                end = time.monotonic() + 10
                while (held := ours.info()["tier_bytes"]["dram"]) < rows * ROW_BYTES and time.monotonic() < end:
                    ours.poll()
                stored.append((time.perf_counter() - start) * 1e3)
                if held < rows * ROW_BYTES:
                    raise RuntimeError(f"write-through: {held} bytes in dram, {rows * ROW_BYTES} were meant")
        ours.close(), plain.close()
    mine, theirs, stored = mine[1:], theirs[1:], stored[1:]
    report(f"prefill of {rows} rows, chunks of {chunk}, write-through and scoring", statistics.median(mine), "ms",
           "without kvtier", statistics.median(theirs), 1.03)
    say(f"# everything below {statistics.median(stored):.1f} ms after the model was done")


# ---- throughput ---------------------------------------------------------------------------------------------


def held_bytes():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def tokens_per_second(model, cache, steps):
    ids = torch.randint(0, 32000, (cache.batch, 1), device=DEV)
    graph = DecodeGraph(model, cache)
    clock(lambda: graph(ids), 3)
    start = time.perf_counter()
    for _ in range(steps):
        graph(ids)
    torch.cuda.synchronize()
    return cache.batch * steps / (time.perf_counter() - start)


def small_cache(s, args, context, keep, every):
    """Sequences of kvtierd that have come to `context` rows with `keep` on the device: (tokens per second, bytes of GPU
    memory each)."""
    batch = args.batch
    below = int(args.dram * 0.8 * 2**30 / (batch * ROW_BYTES))  # the rest is dropped; attention does not see which
    before, start = held_bytes(), time.monotonic()
    cache = s.kvtier(context + 512, budget(keep, below, policy="kvp", slack=16), cap=keep + every + 96, stage=16,
                     batch=batch, push_every=every, out_bytes=2 << 20, in_bytes=1 << 20)
    for part in range(1, 5):
        fill(cache, context * part // 4, every + 64)
        say(f"# {cache.seen} rows of each of {batch} sequences after {time.monotonic() - start:.1f} s")
    cache.settle()
    each = (held_bytes() - before) / batch
    info = cache.seq.info()
    say(f"# {info['plans']} plans of the first, fullest lane {cache.most}, {info['tier_rows']}, {info['dropped_rows']} "
        f"dropped, policy {info['policy']}")
    rate = tokens_per_second(s.model, cache, args.tokens)
    cache.close()
    return rate, each


def plain_cache(s, args, rows, batch, cap):
    """The same without kvtierd, random rows written straight in."""
    before = held_bytes()
    cache = fill_plain(s.plain(cap, batch), rows)
    each = (held_bytes() - before) / batch
    rate = tokens_per_second(s.model, cache, args.tokens)
    cache.close()
    return rate, each


def throughput(s, args, context=32768, share=0.10, every=128):
    keep = int(context * share)
    cap, rows = keep + every + 96, keep + every // 2  # a lane's rows between two plans
    at = f"decode at {context} rows, {share:.0%} on the device"
    rate, each = small_cache(s, args, context, keep, every)
    report(f"{at}, {args.batch} sequences, append, scoring and plans", rate, "tokens/s", "without kvtier, as many rows",
           plain_cache(s, args, rows, args.batch, cap)[0], None)
    small = plain_cache(s, args, rows, args.same, cap)[0]
    full, full_each = plain_cache(s, args, context, args.same, context + 512)
    report(f"GPU memory of a sequence of {context} rows, everything allocated", each / 2**20, "MiB", "full cache",
           full_each / 2**20, 0.12)
    report(f"{at}, {args.same} sequences (rows written straight in)", small, "tokens/s", "full cache, same batch", full,
           None)
    room = torch.cuda.get_device_properties(DEV).total_memory - held_bytes() - (4 << 30)  # for activations
    most, fits = int(room // each), int(room // full_each)
    small, full = plain_cache(s, args, rows, most, cap)[0], plain_cache(s, args, context, fits, context + 512)[0]
    report(f"{at}, {most} sequences: the most that fit (rows written straight in)", small, "tokens/s",
           f"full cache, {fits} sequences", full, None)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", nargs="*", default=["decode", "prefill", "throughput"])
    p.add_argument("--steps", type=int, default=1024, help="decode steps of each kind")
    p.add_argument("--rounds", type=int, default=5, help="prefills of each kind")
    p.add_argument("--batch", type=int, default=4, help="sequences of kvtierd in throughput")
    p.add_argument("--same", type=int, default=32, help="sequences compared at the same batch")
    p.add_argument("--tokens", type=int, default=64, help="tokens of each sequence in throughput")
    p.add_argument("--dram", type=int, default=24, help="size of the DRAM tier, GiB")
    args = p.parse_args()
    if not torch.cuda.is_available():
        say("no GPU")
        return 77
    torch.set_grad_enabled(False)
    attention_cuda.register()
    model = make_model()
    with tempfile.TemporaryDirectory(prefix="kvt.models.") as folder:
        network = os.path.join(folder, NAME + ".kvp")
        subprocess.run([str(build_dir() / "kvtier-weights"), "random", "--layers", str(LAYERS), "--heads", str(KV),
                        "--dim", str(DIM), "--model", NAME, "--theta", "1e6", "-o", network],
                       check=True, stdout=sys.stderr)
        with PrivateDaemon(dram=f"{args.dram}G", nvme="1G", model_dir=folder) as d, \
                Client(d.socket, name="bench_model", max_seqs=2048, plan_bytes=4 << 30) as client:
            s = Setting(model, client)
            for what in args.what:
                {"decode": decode, "prefill": prefill, "throughput": throughput}[what](s, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
