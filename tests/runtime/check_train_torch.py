#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The trainer's gradients against PyTorch autograd.

Builds each kind of network in torch (fp64), from the definition in policy/weights.h and not from the trainer's
code, runs every objective on three units, and compares loss, scores and the gradient of every tensor with what
`kvtier-train --probe` computes in fp32 on the same inputs: on the CPU, and on CUDA where both sides have it.
The sampled objectives draw from the same counter-based noise, so they are compared like the others.

Prints TAP; skips, with the reason, where torch is missing.
"""
import math
import os
import struct
import subprocess
import sys
import tempfile

BUILD = os.environ.get("KVT_BUILD", os.path.join(os.path.dirname(__file__), "..", "..", "build"))
KVP, POSITION = 1, 2
TABLE, LOG2 = 1, 2
EXACT, RLOO, RLOO_BATCH, MSE = range(4)
REGRET, RATIO = range(2)
UNIFORM, LOG_UNIFORM = range(2)
LOW = 0.02

NETS = {
    "narrow": dict(kind=KVP, k_dim=64, v_dim=64, proj=128, hidden=128, rank=2, pos_kind=LOG2, pos_rows=33,
                   pos_dim=16, dist_rows=33, octave=2),
    "published": dict(kind=KVP, k_dim=64, v_dim=64, proj=256, hidden=256, rank=1, pos_kind=TABLE, pos_rows=6000,
                      pos_dim=32, dist_rows=0, octave=0),
    "odd widths": dict(kind=KVP, k_dim=48, v_dim=16, proj=32, hidden=96, rank=1, pos_kind=LOG2, pos_rows=9,
                       pos_dim=48, dist_rows=5, octave=3),
    "position": dict(kind=POSITION, k_dim=32, v_dim=32, proj=0, hidden=0, rank=1, pos_kind=LOG2, pos_rows=40,
                     pos_dim=4, dist_rows=0, octave=0),
}
OBJECTIVES = {
    "exact": (EXACT, REGRET, UNIFORM),
    "exact, log budgets": (EXACT, REGRET, LOG_UNIFORM),
    "exact, ratio": (EXACT, RATIO, UNIFORM),
    "rloo": (RLOO, REGRET, UNIFORM),
    "rloo-batch, ratio": (RLOO_BATCH, RATIO, UNIFORM),
    "mse": (MSE, REGRET, UNIFORM),
}
PERMS, SEED, STEP = 4, 77, 5
UNITS = ((400, 150), (1000, 333), (3000, 500))  # prompt, rows
MASK = (1 << 64) - 1


def mix(x):
    """splitmix64, as policy/train/noise.h defines it."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def noise(unit, perm, n):
    """Uniforms of lane 0's rows."""
    h = mix(mix(SEED ^ mix(STEP)) ^ unit)
    return torch.tensor([((mix(h ^ (perm << 32 | i)) >> 40) + 0.5) * 2.0**-24 for i in range(n)], dtype=torch.float64)


def tensors(net):
    """Names and shapes of a lane, in the order of the weight file."""
    if net["kind"] == POSITION:
        return [("dist", (net["pos_rows"],)), ("index", (net["pos_rows"],))]
    p, h, e, r = net["proj"], net["hidden"], net["pos_dim"], net["rank"]
    width = 2 * p + e
    return [
        ("wk", (p, net["k_dim"])), ("bk", (p,)), ("gk", (p,)), ("ok", (p,)),
        ("wv", (p, net["v_dim"])), ("bv", (p,)), ("gv", (p,)), ("ov", (p,)),
        ("pos", (net["pos_rows"], e)), ("gp", (e,)), ("op", (e,)),
        ("w1", (h, width)), ("b1", (h,)), ("g1", (h,)), ("o1", (h,)),
        ("w2", (h, h)), ("b2", (h,)), ("g2", (h,)), ("o2", (h,)),
        ("w3", (r, h)), ("b3", (r,)), ("dist", (2 * r, net["dist_rows"])),
    ]  # yapf: disable


def start(net, generator):
    params = {}
    for name, shape in tensors(net):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name[0] == "w":
            x *= 1.5 / math.sqrt(shape[-1])
        elif name[0] == "g":
            x = 1 + 0.2 * x
        elif name not in ("pos", "dist", "index"):
            x *= 0.2
        params[name] = x.float().double().requires_grad_()
    return params


def knots(table, x, per_octave):
    """Linear between knots at log2(1 + x), along the last axis but the table's own width."""
    t = (per_octave * torch.log2(1 + x.float())).clamp(max=table.shape[0] - 1).double()
    low = t.floor().long()
    high = (low + 1).clamp(max=table.shape[0] - 1)
    part = (t - low).reshape(-1, *[1] * (table.dim() - 1))
    return table[low] + part * (table[high] - table[low])


def forward(net, p, k, v, pos, prompt):
    left = prompt - 1 - pos
    if net["kind"] == POSITION:
        return knots(p["dist"], left, net["pos_dim"]) + knots(p["index"], pos, net["pos_dim"])
    norm = functional.layer_norm
    a = norm(functional.linear(k, p["wk"], p["bk"]), (net["proj"],), p["gk"], p["ok"])
    c = norm(functional.linear(v, p["wv"], p["bv"]), (net["proj"],), p["gv"], p["ov"])
    if net["pos_kind"] == TABLE:
        e = p["pos"][pos.clamp(max=net["pos_rows"] - 1)]
    else:
        e = knots(p["pos"], pos, net["octave"])
    x = torch.cat([a, c, norm(e, (net["pos_dim"],), p["gp"], p["op"])], -1)
    for i in "12":
        x = norm(functional.linear(x, p["w" + i], p["b" + i]), (net["hidden"],), p["g" + i], p["o" + i])
        x = functional.silu(x)
    f = functional.linear(x, p["w3"], p["b3"])
    if not net["dist_rows"]:
        return f[:, 0]
    scale = min(max(math.log2(prompt), 8), 14) - 11
    d = [knots(row, left, net["octave"]) for row in p["dist"]]
    s = f[:, 0] + d[0] + scale * d[1]
    return s + f[:, 1] * (d[2] + scale * d[3]) if net["rank"] == 2 else s


def weight(rank, n, weighting):
    if weighting == UNIFORM:
        return rank
    return torch.log1p(rank / (LOW * n)) / math.log1p(1 / LOW)


class Costs:
    def __init__(self, u, reward, weighting):
        n = len(u)
        ranks = weight(torch.arange(1, n + 1, dtype=torch.float64), n, weighting)
        self.n, self.u, self.reward, self.weighting = n, u, reward, weighting
        self.by_rank = ranks
        self.best = (ranks * u.sort(descending=True).values).sum()
        self.random = ranks.mean() * u.sum()

    def loss(self, cost):
        if self.reward == REGRET:
            return (cost - self.best) / (self.random - self.best)
        return (cost / self.best.clamp(min=1e-8)).clamp(max=200)

    def expected(self, s):
        rank = 0.5 + torch.sigmoid(s[:, None] - s[None, :]).sum(0)
        return (weight(rank, self.n, self.weighting) * self.u).sum()


def surrogate(scores, costs, objective):
    """The sampled objectives' loss: -advantage times the mean log probability of the ranking's steps."""
    rewards, logs = [], []
    for unit, (s, c) in enumerate(zip(scores, costs)):
        for perm in range(PERMS if objective == RLOO else 1):
            order = (s.detach() - torch.log(-torch.log(noise(unit, perm, c.n)))).argsort(descending=True)
            rewards.append(-c.loss((c.by_rank * c.u[order]).sum()))
            z = torch.logcumsumexp(s[order].flip(0), 0).flip(0)
            logs.append((s[order] - z).mean())
    r = torch.stack(rewards).reshape(len(scores), -1)
    axis = 1 if objective == RLOO else 0
    count = r.shape[axis]
    advantage = (count * r - r.sum(axis, keepdim=True)) / (count - 1)
    advantage = advantage / ((advantage**2).sum() / (advantage.numel() - 1)).sqrt().add(1e-8)
    advantage = advantage.clamp(-2, 2)
    return -(advantage.detach() * torch.stack(logs).reshape(r.shape)).mean()


def reference(net, params, units, objective):
    kind, reward, weighting = objective
    for p in params.values():
        p.grad = None
    scores = [forward(net, params, k.double(), v.double(), pos, prompt) for prompt, pos, k, v, _ in units]
    costs = [Costs(u.double(), reward, weighting) for *_, u in units]
    if kind == EXACT:
        loss = sum(c.loss(c.expected(s)) for s, c in zip(scores, costs)) / len(units)
    elif kind == MSE:
        loss = sum(((s - torch.log(c.u / c.u.mean() + 1e-4))**2).mean() for s, c in zip(scores, costs)) / len(units)
    else:
        loss = surrogate(scores, costs, kind)
    loss.backward()
    return loss.item(), [s.detach() for s in scores], [params[name].grad if params[name].grad is not None else
                                                     torch.zeros_like(params[name]) for name, _ in tensors(net)]


def write_probe(path, net, params, units, objective):
    fields = [net[x] for x in ("kind", "k_dim", "v_dim", "proj", "hidden", "rank", "pos_kind", "pos_rows", "pos_dim",
                               "dist_rows", "octave")]
    with open(path, "wb") as f:
        f.write(b"KVTPROBE" + struct.pack("<16I", *fields, *objective, PERMS, len(units)))
        f.write(struct.pack("<QQ", SEED, STEP))
        for prompt, pos, k, v, u in units:
            f.write(struct.pack("<II", prompt, len(pos)) + pos.int().numpy().tobytes())
            f.write(k.numpy().tobytes() + v.numpy().tobytes() + u.numpy().tobytes())
        for name, _ in tensors(net):
            f.write(params[name].detach().float().numpy().tobytes())


def probe(device, path, net, units):
    """Loss, scores and gradients of the trainer."""
    subprocess.run([os.path.join(BUILD, "kvtier-train"), "--probe", path, "--out", path + ".out", "--device", device],
                   check=True)
    with open(path + ".out", "rb") as f:
        flat = torch.frombuffer(bytearray(f.read()), dtype=torch.float32).double()
    loss, flat = flat[0].item(), flat[1:]
    scores, grads = [], []
    for _, pos, *_ in units:
        scores.append(flat[:len(pos)])
        flat = flat[len(pos):]
    for _, shape in tensors(net):
        grads.append(flat[:math.prod(shape)].reshape(shape))
        flat = flat[math.prod(shape):]
    assert len(flat) == 0
    return loss, scores, grads


def make_units(net, generator):
    units = []
    for prompt, n in UNITS:
        pos = (torch.randperm(prompt - 20, generator=generator)[:n] + 4).sort().values
        k = torch.randn(n, net["k_dim"], generator=generator).half()
        v = torch.randn(n, net["v_dim"], generator=generator).half()
        u = 0.01 * torch.exp(2 * torch.randn(n, generator=generator))
        units.append((prompt, pos, k, v, u))
    return units


def compare(want, got, net):
    """Worst relative differences of loss, scores and gradient, and the tensor that the last is in."""
    loss = abs(want[0] - got[0]) / (1e-3 + abs(want[0]))
    score = max((a - b).abs().max().item() / (1 + a.abs().max().item()) for a, b in zip(want[1], got[1]))
    largest = max(g.abs().max().item() for g in want[2] if g.numel())
    worst, where = 0, ""
    for (name, _), a, b in zip(tensors(net), want[2], got[2]):
        if a.numel():
            # A tensor's own size counts, but not below a hundredth of the largest: rounding is of that.
            off = (a - b).abs().max().item() / max(a.abs().max().item(), 0.01 * largest)
            worst, where = max((worst, where), (off, name))
    return loss, score, worst, where


def main(devices):
    cases = [(d, n, o) for d in devices for n in NETS for o in OBJECTIVES]
    print(f"1..{len(cases)}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="kvtier-") as tmp:
        path = os.path.join(tmp, "probe")
        for i, (device, name, objective) in enumerate(cases, 1):
            net = NETS[name]
            generator = torch.Generator().manual_seed(i % (len(cases) // len(devices)))
            units, params = make_units(net, generator), start(net, generator)
            write_probe(path, net, params, units, OBJECTIVES[objective])
            want = reference(net, params, units, OBJECTIVES[objective])
            loss, score, grad, where = compare(want, probe(device, path, net, units), net)
            good = loss < 1e-4 and score < 1e-4 and grad < 2e-3
            failed += not good
            print(f"{'ok' if good else 'not ok'} {i} - {device}, {name}, {objective}: loss {loss:.1e}, "
                  f"scores {score:.1e}, gradient {grad:.1e} ({where})", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        import torch
        from torch.nn import functional
    except ImportError:
        print("1..0 # SKIP cannot import torch: .ci/deps model installs it")
        sys.exit(0)
    if not os.access(os.path.join(BUILD, "kvtier-train"), os.X_OK):
        print("Bail out! kvtier-train is not built: make")
        sys.exit(1)
    torch.set_num_threads(2)
    cuda = torch.cuda.is_available() and os.path.exists(os.path.join(BUILD, "kvtier-train-cuda.so"))
    sys.exit(main(["cpu", "cuda"] if cuda else ["cpu"]))
