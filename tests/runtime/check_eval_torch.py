#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""kvtier-eval and the laboratory's scoring against PyTorch, on small made-up tensors.

Writes one trace without utilities (so that they are found from the queries), runs kvtier-eval on it, and compares
regret per lane, evicted utility and attention-output error of every deterministic policy with formulas in torch
(float64, from the same half-precision rows). Then scores the same rows through policy/lab/scores.py. Prints TAP;
skips, with the reason, where torch is missing.
"""
import csv
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..")
BUILD = os.environ.get("KVT_BUILD", os.path.join(ROOT, "build"))
sys.path.insert(0, os.path.join(ROOT, "policy", "lab"))

LAYERS, HEADS, GROUP, DIM, ROWS, PROMPT, FUTURE, THETA = 2, 2, 3, 16, 420, 360, 60, 500.0
LANES, FIRST, LAST = LAYERS * HEADS, 4, 16
SAMPLE = 16  # future queries of the output error, kvtier-eval's default


def make():
    """K, V, Q after RoPE, VNORM and W_o: heavy rows, sinks and queries that drift with the position."""
    g = torch.Generator().manual_seed(11)
    k = torch.randn(LANES, ROWS, DIM, generator=g)
    k[:, :, 0] += 5 * (torch.rand(LANES, ROWS, generator=g) < 0.1)
    q = torch.randn(LANES, GROUP, ROWS, DIM, generator=g)
    q[..., 0] += 2
    q[..., 3] += torch.linspace(-1, 1, ROWS)
    v = torch.randn(LANES, ROWS, DIM, generator=g) * (1 + torch.rand(LANES, ROWS, 1, generator=g))
    wo = torch.randn(LANES, 40, GROUP * DIM, generator=g)  # 40 outputs of the layer
    return k.half(), v.half(), q.half(), wo


def write(path, k, v, q, wo):
    shape = dict(model="made-up", layers=LAYERS, heads=HEADS, group=GROUP, k_dim=DIM, v_dim=DIM, dtype="float16",
                 rope="half", rope_theta=THETA, keys="cached", split="test")
    with kvtr.Writer(os.path.join(path, "one.kvtr"), kvtr.header(rows=ROWS, source="a", domain="b", **shape),
                     [kvtr.Cut(PROMPT, FUTURE, 0, 0)]) as w:
        w.lanes(kvtr.K, k)
        w.lanes(kvtr.V, v)
        w.lanes(kvtr.Q, q)
        w.lanes(kvtr.VNORM, value_norm(v, wo).float())
    with kvtr.Writer(os.path.join(path, "model.kvtr"), kvtr.header(rows=0, **shape)) as w:
        w.lanes(kvtr.GRAM, (wo.double().transpose(1, 2) @ wo.double()).float())


def value_norm(v, wo):
    per_head = wo.double().view(LANES, -1, GROUP, DIM)
    return torch.einsum("logd,lnd->lgon", per_head, v.double()).norm(dim=2).mean(1)


def attention(k, q):
    s = torch.einsum("lgtd,ljd->lgtj", q.double(), k.double()) / DIM ** 0.5
    return s.masked_fill(torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def window(a, n):
    """Attention of the last n queries of the prompt to the rows before them."""
    return a[:, :, PROMPT - n:PROMPT, :PROMPT - n]


def pool(x):
    flat = x.reshape(-1, 1, x.shape[-1])
    return torch.nn.functional.avg_pool1d(flat, 5, padding=2, stride=1).view(x.shape)


def keep_last(s):
    return torch.cat([s, torch.full((LANES, PROMPT - s.shape[1]), s.max().item() + 1)], 1)


def rotations(positions):
    f = THETA ** (-torch.arange(0, DIM, 2).double() / DIM)
    angle = positions.double()[:, None] * f
    c, s = angle.cos(), angle.sin()
    r = torch.zeros(len(positions), DIM, DIM, dtype=torch.float64)
    i = torch.arange(DIM // 2)
    r[:, i, i], r[:, i, i + DIM // 2], r[:, i + DIM // 2, i], r[:, i + DIM // 2, i + DIM // 2] = c, -s, s, c
    return r


def expected(k, v, q):
    plain = torch.einsum("tba,lgtb->lgta", rotations(torch.arange(4, PROMPT)), q[:, :, 4:PROMPT].double())
    mean = plain.mean(2)
    cov = torch.einsum("lgta,lgtb->lgab", plain - mean[:, :, None], plain - mean[:, :, None]) / plain.shape[2]
    r = rotations(torch.arange(PROMPT, PROMPT + 512)).mean(0)
    mean, cov, k = mean @ r.T, r @ cov @ r.T, k[:, 4:PROMPT].double()
    s = torch.einsum("lga,lja->lgj", mean, k) / DIM ** 0.5 + torch.einsum("lja,lgab,ljb->lgj", k, cov, k) / (2 * DIM)
    s = s.softmax(-1).mean(1) * v[:, 4:PROMPT].double().norm(dim=-1)
    return torch.cat([torch.full((LANES, 4), s.max().item() + 1), s], 1)


def keydiff(k):
    anchor = torch.nn.functional.normalize(k, dim=-1).mean(1, keepdim=True)
    return -torch.nn.functional.cosine_similarity(k, anchor, dim=-1)


def cur_local(k, v):
    def share(x):
        x = torch.nn.functional.pad(x.pow(2).sum(-1), (0, -PROMPT % 16)).view(LANES, -1, 16)
        return (x / x.sum(-1, keepdim=True)).view(LANES, -1)[:, :PROMPT]
    return share(k) * share(v)


def scores(k, v, q, a):
    """{policy: [lanes, prompt]}; a: [lanes, group, rows, rows]."""
    kp, vp = k[:, :PROMPT].double(), v[:, :PROMPT].double()
    seen = torch.arange(PROMPT, 0, -1)
    h2o = (a[:, :, :PROMPT, :PROMPT].sum(2) / seen).mean(1)[:, :PROMPT - 64]
    defensive = pool(window(a, 32)).amax(2).amax(1)
    defensive = defensive.clamp(min=defensive.mean(1, keepdim=True)) * vp[:, :PROMPT - 32].norm(dim=-1)
    last = a[:, :, PROMPT - 1, :PROMPT].view(LAYERS, HEADS, GROUP, PROMPT).mean((1, 2))
    return {
        "knorm": -kp.norm(dim=-1), "vnorm": vp.norm(dim=-1), "vrange": vp.amax(-1) - vp.amin(-1),
        "keydiff": keydiff(kp), "cur-local": cur_local(kp, vp), "tova": last.repeat_interleave(HEADS, 0),
        "h2o": keep_last(h2o), "snapkv": keep_last(pool(window(a, 64).mean(2)).mean(1)),
        "defensive": keep_last(defensive), "expected-attention": expected(k, v, q),
    }


def ranking(s):
    """Evictable rows by descending score, later rows first among equals."""
    s = s[FIRST:PROMPT - LAST]
    return torch.tensor(sorted(range(len(s)), key=lambda i: (-s[i].item(), -i)))


def regret(u, order):
    rank = torch.arange(1, len(u) + 1).double()
    best, any_order = (rank * u.sort(descending=True).values).sum(), (len(u) + 1) / 2 * u.sum()
    return (((rank * u[order]).sum() - best) / (any_order - best)).item()


def output_error(a, v, wo, order, budget):
    """Of one lane: rows kept are the protected ones, the best, and the future."""
    keep = torch.zeros(ROWS, dtype=torch.bool)
    keep[:FIRST] = keep[PROMPT - LAST:] = True
    keep[FIRST + order[:round(budget * len(order))]] = True
    t = torch.tensor([PROMPT + (2 * i + 1) * FUTURE // (2 * SAMPLE) for i in range(SAMPLE)])
    whole = a[:, t]
    part = whole * keep
    part = part / part.sum(-1, keepdim=True)
    o, less = (x @ v.double() for x in (whole, part))  # [group, t, d]
    project = lambda x: x.transpose(0, 1).reshape(SAMPLE, -1) @ wo.double().T  # noqa: E731
    return (project(o - less).pow(2).sum() / project(o).pow(2).sum()).sqrt().item()


def measured(out):
    """({(policy, lane): regret}, {(policy, metric): mean}) of the tables."""
    with open(os.path.join(out, "lanes.csv"), encoding="ascii") as f:
        lanes = {(r["policy"], int(r["lane"])): float(r["regret"]) for r in csv.DictReader(f)}
    with open(os.path.join(out, "policies.csv"), encoding="ascii") as f:
        means = {(r["policy"], r["metric"]): float(r["mean"]) for r in csv.DictReader(f) if r["slice"] == "all"}
    return lanes, means


def compare(k, v, q, wo, out):
    """One (name, failures, note) a policy."""
    lanes, means = measured(out)
    a = attention(k, q)
    future = a[:, :, PROMPT:PROMPT + FUTURE, :PROMPT]
    umax, umean = future.amax(1).sum(1), future.mean(1).sum(1)
    value = umean * value_norm(v, wo)[:, :PROMPT]
    every = scores(k, v, q, a)
    every["oracle"] = umax
    for name, s in every.items():
        bad, worst = [], 0.0
        orders = [ranking(s[lane]) for lane in range(LANES)]
        mid = slice(FIRST, PROMPT - LAST)
        want = {("regret", lane): regret(umax[lane, mid], orders[lane]) for lane in range(LANES)}
        for metric, u in (("max", umax), ("mean", umean), ("value", value)):
            for budget in (20, 30, 50):
                kept = [u[i, mid][o[:round(budget / 100 * len(o))]].sum() / u[i, mid].sum() for i, o in enumerate(orders)]
                want[f"evicted_{metric}_{budget}"] = 1 - sum(kept).item() / LANES
        for budget in (25, 50):
            want[f"error_{budget}"] = sum(output_error(a[i], v[i], wo[i], o, budget / 100)
                                          for i, o in enumerate(orders)) / LANES
        for what, value_wanted in want.items():
            got = lanes[(name, what[1])] if isinstance(what, tuple) else means[(name, what)]
            worst = max(worst, abs(got - value_wanted))
            if abs(got - value_wanted) > 1e-3:
                bad.append(f"{what}: {got}, torch says {value_wanted}")
        yield name, bad, f"{len(want)} figures within {worst:.1e}"


def lab(k, v):
    """scores.py: all lanes at once, positions with gaps, threads, errors."""
    shape = lab_scores.Shape(LAYERS, HEADS, DIM, DIM, k.dtype)
    bad = []
    with lab_scores.open("knorm", None, shape) as p:
        one, four = p.score(k, v, threads=1), p.score(k.view(LAYERS, HEADS, ROWS, DIM), v, threads=4)
        if abs(torch.from_numpy(one) + k.float().norm(dim=-1)).max() > 1e-4:
            bad.append("knorm differs from -|k|")
        if (one != four).any():
            bad.append("threads or leading shape change the scores")
    with lab_scores.open("streaming", None, shape) as p:
        s = torch.from_numpy(p.score(k, v, torch.arange(0, 2 * ROWS, 2), 2 * ROWS))
        if not (s[:, 2:].diff(dim=1) > 0).all() or not (s[:, :2] > s[:, 2:].max()).all():
            bad.append("streaming does not follow the positions")
    for args, word in ((("nobody", None, shape), "nobody"), ((None, None, shape), "policy"),
                       (("kvp", "/nonexistent.kvp", shape), "nonexistent")):
        try:
            lab_scores.open(*args)
            bad.append(f"{args[0]}, {args[1]}: accepted")
        except ValueError as e:
            if word not in str(e):
                bad.append(f"{e}: does not name {word}")
    return "scores.py scores every lane", bad, "knorm, streaming, three refusals"


def main():
    k, v, q, wo = make()
    with tempfile.TemporaryDirectory(prefix="kvtier-eval-") as path:
        write(path, k, v, q, wo)
        out = os.path.join(path, "out")
        p = subprocess.run([os.path.join(BUILD, "kvtier-eval"), "--quiet", "--resamples", "100", "--out", out, path],
                           stderr=subprocess.PIPE, text=True, check=False)
        if p.returncode:
            print(f"Bail out! {p.stderr.strip()}")
            return 1
        results = [*compare(k, v, q, wo, out), lab(k, v)]
    print(f"1..{len(results)}")
    for n, (name, bad, note) in enumerate(results, 1):
        for line in bad:
            print(f"# {name}: {line}")
        print(f"{'not ok' if bad else 'ok'} {n} - {name}: {note}")
    return 1 if any(bad for _, bad, _ in results) else 0


if __name__ == "__main__":
    try:
        import torch
    except ImportError as e:
        print(f"1..0 # SKIP cannot import {e.name}: .ci/deps model installs it")
        sys.exit(0)
    import kvtr
    import scores as lab_scores
    torch.set_num_threads(1)
    sys.exit(main())
