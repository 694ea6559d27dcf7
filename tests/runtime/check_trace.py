#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Recording a Hugging Face model: what is in the files is what its attention saw. TAP."""
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ipc" / "python"))
BUILD = Path(os.environ.get("KVT_BUILD", ROOT / "build"))

try:
    import numpy as np
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
except ImportError as e:
    print(f"1..0 # SKIP {e.name} is not installed (make deps)")
    sys.exit(0)

import kvtier.trace  # noqa: E402

torch.set_grad_enabled(False)
LAYERS, HEADS, KV, DIM = 3, 6, 2, 16
LANES, GROUP = LAYERS * KV, HEADS // KV
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("kvtier").addHandler(handler)


def make_model(attn="sdpa"):
    cfg = LlamaConfig(hidden_size=96, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                      num_key_value_heads=KV, head_dim=DIM, vocab_size=300, max_position_embeddings=512,
                      attn_implementation=attn)
    torch.manual_seed(3)
    return LlamaForCausalLM(cfg).eval()


MODEL = make_model()
IDS = torch.randint(0, 300, (1, 90), generator=torch.Generator().manual_seed(1))


def tool(*args):
    run = subprocess.run([str(BUILD / "kvtier-trace"), *map(str, args)], capture_output=True, check=True)
    return run.stdout


def chunk(path, kind, lane=0, cut=0, dtype=np.float32):
    return np.frombuffer(tool("cat", path, kind, "--lane", lane, "--cut", cut, "--raw"), dtype)


def only(folder, n=1):
    files = sorted(Path(folder).iterdir())
    assert len(files) == n, files
    for f in files:
        assert not tool("verify", f)
    return files if n > 1 else files[0]


def kv_of(path, kind, rows):
    return np.stack([chunk(path, kind, lane).reshape(rows, DIM) for lane in range(LANES)]).reshape(
        LAYERS, KV, rows, DIM)


def reference(model, ids):
    """K and V as a full cache holds them, and each layer's queries after RoPE, from the modules themselves."""
    cache, seen = DynamicCache(config=model.config), {}
    hooks = [layer.self_attn.q_proj.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out))
             for i, layer in enumerate(model.model.layers)]
    model(ids, past_key_values=cache, use_cache=True)
    for h in hooks:
        h.remove()
    n = ids.shape[1]
    cos, sin = model.model.rotary_emb(seen[0], torch.arange(n)[None])
    none = torch.zeros(1, KV, n, DIM)
    q = [apply_rotary_pos_emb(seen[i].view(1, n, HEADS, DIM).transpose(1, 2), none, cos, sin)[0][0]
         for i in range(LAYERS)]
    return (torch.stack([x.keys[0] for x in cache.layers]), torch.stack([x.values[0] for x in cache.layers]),
            torch.stack(q))


def check_file(path, ids, tol=1e-5):
    n = ids.shape[1]
    k, v, q = reference(MODEL, ids)
    assert np.abs(kv_of(path, "k", n) - k.numpy()).max() < tol
    assert np.abs(kv_of(path, "v", n) - v.numpy()).max() < tol
    got = np.stack([chunk(path, "q", lane) for lane in range(LANES)]).reshape(LAYERS, HEADS, n, DIM)
    assert np.abs(got - q.numpy()).max() < tol
    assert (chunk(path, "tokens", dtype=np.uint32) == ids[0].numpy()).all()


def generate(model, ids, n=20):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                          pad_token_id=0)


def check_generate(folder):
    plain = generate(MODEL, IDS)
    with kvtier.trace.record(MODEL, folder, source="page one", domain="chat", name="tiny") as rec:
        said = generate(MODEL, IDS)
    assert torch.equal(plain, said)
    f = only(folder)
    rows = said.shape[1] - 1  # the last token is never fed
    check_file(f, said[:, :rows])
    info = tool("info", f).decode()
    assert "model        tiny" in info and "source       page one" in info and "domain       chat" in info
    assert "group 3, k_dim 16, v_dim 16, f32" in info and "rope         half, theta 10000" in info
    assert tool("cat", f, "cuts").split() == [b"90", b"19", b"0", b"0"]
    assert rec.stats()["recorded"] == 1 and rec.stats()["dropped"] == 0 and rec.stats()["bytes"] == f.stat().st_size


def check_utilities(folder):
    """From the model to the trainer's input: utilities by the tool against attention in float64."""
    with kvtier.trace.record(MODEL, folder):
        said = generate(MODEL, IDS)
    out = Path(folder) / "cut.kvtr"
    f = only(folder)
    tool("cut", f, "-o", out, "--at", "40:30:before", "--no-queries")
    k, _, q = (x.double() for x in reference(MODEL, said[:, :-1]))
    for cut, (p, n) in enumerate([(90, 19), (40, 30)]):
        for lane in range(LANES):
            layer, head = divmod(lane, KV)
            s = q[layer, head * GROUP : (head + 1) * GROUP, p : p + n] @ k[layer, head].T / DIM ** 0.5
            future = torch.arange(s.shape[-1])[None] > torch.arange(p, p + n)[:, None]
            a = s.masked_fill(future, float("-inf")).softmax(-1)[..., :p]
            for kind, want in (("umax", a.amax(0).sum(0)), ("umean", a.mean(0).sum(0))):
                assert np.abs(chunk(out, kind, lane, cut) - want.numpy()).max() < 1e-4, (kind, lane, cut)


def check_eager(folder):
    model = make_model("eager")
    with kvtier.trace.record(model, folder):
        said = generate(model, IDS, 5)
    check_file(only(folder), said[:, :-1], 1e-4)


def check_restores(folder):
    before, names = ALL_ATTENTION_FUNCTIONS["sdpa"], set(ALL_ATTENTION_FUNCTIONS)
    other, eager = make_model(), make_model("eager")
    try:
        with kvtier.trace.record(MODEL, folder), kvtier.trace.record(eager, folder):
            generate(other, IDS, 3)  # another model of the same kind is not recorded
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before and set(ALL_ATTENTION_FUNCTIONS) == names
    assert not MODEL._forward_pre_hooks and not MODEL._forward_hooks
    assert not os.listdir(folder)
    with kvtier.trace.record(MODEL, folder):
        try:
            with kvtier.trace.record(MODEL, folder):
                raise AssertionError("recorded twice")
        except ValueError as e:
            assert "already" in str(e)


def check_switch(folder):
    os.environ.pop("KVTIER_TRACE_DIR", None)
    with kvtier.trace.record(MODEL) as rec:
        assert not MODEL._forward_pre_hooks
        generate(MODEL, IDS, 3)
    assert rec.stats()["seen"] == 0
    os.environ["KVTIER_TRACE_DIR"] = folder
    try:
        with kvtier.trace.record(MODEL, every=3) as rec:
            for i in range(6):
                generate(MODEL, IDS[:, : 20 + i], 3)
    finally:
        del os.environ["KVTIER_TRACE_DIR"]
    assert rec.stats()["seen"] == 6 and rec.stats()["recorded"] == 2
    only(folder, 2)


def check_turns(folder):
    """Several passes into one cache, a static cache, float16, and a roll-back, after which nothing is recorded."""
    with kvtier.trace.record(MODEL, folder) as rec:
        cache = StaticCache(config=MODEL.config, max_cache_len=128)
        for a, b in ((0, 50), (50, 51), (51, 80)):
            MODEL(IDS[:, a:b], past_key_values=cache, use_cache=True)
    f = only(folder)
    check_file(f, IDS[:, :80])
    assert tool("cat", f, "cuts").split()[:2] == [b"50", b"30"]
    f.unlink()
    with kvtier.trace.record(MODEL, folder, dtype="float16") as rec:
        cache = DynamicCache(config=MODEL.config)
        MODEL(IDS[:, :50], past_key_values=cache, use_cache=True)
        cache.crop(-20)
        MODEL(IDS[:, 30:60], past_key_values=cache, use_cache=True)
        MODEL(IDS[:, 60:61], past_key_values=cache, use_cache=True)
        MODEL(IDS[:, :40])  # no cache: one pass, no cut
    assert rec.stats()["dropped"] == 1 and rec.stats()["skipped"] == 1
    f = only(folder)
    k = chunk(f, "k", 3, dtype=np.float16).reshape(40, DIM)
    assert np.abs(k - reference(MODEL, IDS[:, :40])[0][1, 1].numpy()).max() < 2e-3
    assert b"cut 0" not in tool("info", f)


def check_skips(folder):
    with kvtier.trace.record(MODEL, folder) as rec:
        MODEL(torch.cat([IDS, IDS]))
        MODEL(IDS, attention_mask=(torch.arange(90) > 4).long()[None])
    assert rec.stats()["skipped"] == 2 and not os.listdir(folder)


def check_full(folder):
    lines.clear()
    with kvtier.trace.record(MODEL, folder, max_bytes=400_000) as rec:
        for _ in range(6):
            said = generate(MODEL, IDS)  # 109 rows need 209 KB
            rec.recorder.flush() if not rec.stats()["ended"] else None
            assert said.shape[1] == 110
    only(folder)
    s = rec.stats()
    assert s["recorded"] == 1 and s["recorded"] + s["dropped"] == s["picked"] == 6 and s["ended"] == -2007, s
    assert sum("max_bytes is 400000" in line for line in lines) == 1, lines


def check_evicting(folder):
    """Through a cache that evicts, every row is recorded once, as its attention saw it."""
    from kvtier import Client, budget
    from kvtier.daemon import PrivateDaemon
    from kvtier.hf import KvtierCache
    with PrivateDaemon() as d, Client(d.socket) as client:
        cache = KvtierCache(MODEL.config, client, 200, name="tiny", budget=budget(device=32, dram=200, manual=True))
        with kvtier.trace.record(MODEL, folder):
            MODEL(IDS[:, :60], past_key_values=cache, use_cache=True)
            cache.compress()
            MODEL(IDS[:, 60:90], past_key_values=cache, use_cache=True)
        assert len(cache.positions(0, 0)) < 90
        cache.close()
    f = only(folder)
    assert (chunk(f, "tokens", dtype=np.uint32) == IDS[0].numpy()).all()
    k, v, _ = reference(MODEL, IDS)
    assert np.abs(kv_of(f, "k", 90)[0] - k[0].numpy()).max() < 1e-5  # layer 0 does not depend on what was evicted
    assert np.abs(kv_of(f, "v", 90)[0] - v[0].numpy()).max() < 1e-5
    assert np.abs(kv_of(f, "k", 90)[:, :, :60] - k[:, :, :60].numpy()).max() < 1e-5
    assert np.abs(kv_of(f, "k", 90)[2, :, 60:] - k[2, :, 60:].numpy()).max() > 1e-4  # and deeper layers do


def main():
    checks = [f for name, f in globals().items() if name.startswith("check_") and name != "check_file"]
    print(f"1..{len(checks)}")
    failed = 0
    for i, f in enumerate(checks, 1):
        folder = tempfile.mkdtemp(prefix="kvtr.", dir="/tmp")
        try:
            f(folder)
            print(f"ok {i} - {f.__name__[6:]}", flush=True)
        except Exception:
            failed = 1
            print(f"not ok {i} - {f.__name__[6:]}")
            print("\n".join("# " + line for line in traceback.format_exc().splitlines()), flush=True)
        finally:
            shutil.rmtree(folder)
    return failed


if __name__ == "__main__":
    sys.exit(main())
