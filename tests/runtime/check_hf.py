#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The Hugging Face cache against references, over a real private kvtierd. TAP.

Reference for eviction: a full DynamicCache with, per layer and KV head, minus infinity on exactly the rows
that the kvtier cache does not hold.
"""
import os
import sys
import time
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "ipc", "python"))

try:
    import torch
    from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
except ImportError as e:
    print(f"1..0 # SKIP {e.name} is not installed (make deps)")
    sys.exit(0)

from kvtier import Client, Error, budget  # noqa: E402
from kvtier.daemon import PrivateDaemon  # noqa: E402
from kvtier.hf import KvtierCache  # noqa: E402

torch.manual_seed(7)
torch.set_grad_enabled(False)
LAYERS, HEADS, KV, DIM, ROWS = 4, 4, 2, 64, 1024
KEPT = {}  # layer -> bool [KV, positions]: what the reference may see


def reference_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ k.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    nq, nk = scores.shape[-2:]
    causal = torch.arange(nk)[None] <= torch.arange(nk - nq, nk)[:, None]
    see = causal[None].expand(query.shape[1], nq, nk).clone()
    kept = KEPT.get(module.layer_idx)
    if kept is not None:
        n = kept.shape[1]
        see[:, :, :n] &= kept.repeat_interleave(groups, 0)[:, None, :]
    out = scores.masked_fill(~see[None], float("-inf")).softmax(-1) @ v
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("kvtier_reference", reference_attention)


def make_model(attn):
    cfg = LlamaConfig(hidden_size=HEADS * DIM, intermediate_size=256, num_hidden_layers=LAYERS,
                      num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=DIM, vocab_size=512,
                      max_position_embeddings=2048, attn_implementation=attn)
    torch.manual_seed(3)
    return LlamaForCausalLM(cfg).eval()


MODEL, REF = make_model("sdpa"), make_model("kvtier_reference")
IDS = torch.randint(0, 512, (1, ROWS))


def fresh(client, b=None, **kw):
    return KvtierCache(MODEL.config, client, ROWS, name="tiny", budget=b or budget(manual=True), **kw)


def run(model, cache, ids, chunk=96):
    out = [model(ids[:, i : i + chunk], past_key_values=cache, use_cache=True).logits
           for i in range(0, ids.shape[1], chunk)]
    return torch.cat(out, 1)


def remember(cache):
    """What the kvtier cache holds, as masks for the reference."""
    KEPT.clear()
    for layer in range(LAYERS):
        kept = torch.zeros(KV, cache.get_seq_length(), dtype=torch.bool)
        for h in range(KV):
            kept[h, cache.positions(layer, h)] = True
        KEPT[layer] = kept


def close(a, b, tol=1e-4):
    diff = (a - b).abs().max().item()
    assert diff <= tol, f"logits differ by {diff}, limit {tol}"


def no_eviction_equals_dynamic_cache(d, c):
    ours, theirs = fresh(c), DynamicCache()
    close(run(MODEL, ours, IDS[:, :300]), run(MODEL, theirs, IDS[:, :300]), 1e-5)
    for i in range(300, 310):
        close(MODEL(IDS[:, i : i + 1], past_key_values=ours).logits,
              MODEL(IDS[:, i : i + 1], past_key_values=theirs).logits, 1e-5)
    assert ours.get_seq_length() == 310


def evicted(c, policy, b=(100, 100, 50), rows=400):
    ours, ref = fresh(c), DynamicCache()
    run(MODEL, ours, IDS[:, :rows])
    run(REF, ref, IDS[:, :rows])
    ours.compress(budget(*b, policy=policy, manual=True))
    return ours, ref


def eviction_equals_masked_full_cache(d, c):
    for policy in ("random", "knorm", "keydiff"):
        KEPT.clear()
        ours, ref = evicted(c, policy)
        assert ours.layers[0].slots == 100, ours.layers[0].slots
        sets = {tuple(ours.positions(layer, h)) for layer in range(LAYERS) for h in range(KV)}
        assert len(sets) > 1, "every head kept the same rows: nothing per-head was tested"
        remember(ours)
        # one token, then several tokens, then one again
        for lo, hi in ((400, 401), (401, 433), (433, 434)):
            close(MODEL(IDS[:, lo:hi], past_key_values=ours).logits, REF(IDS[:, lo:hi], past_key_values=ref).logits)
        ours.close()


def second_plan_after_eviction(d, c):
    KEPT.clear()
    ours, ref = evicted(c, "knorm")
    remember(ours)
    close(MODEL(IDS[:, 400:460], past_key_values=ours).logits, REF(IDS[:, 400:460], past_key_values=ref).logits)
    ours.compress(budget(80, 60, 60, policy="knorm", manual=True))
    assert ours.layers[0].slots == 80
    # the reference's own rows 400..459 were computed under the first mask, as ours were
    remember(ours)
    close(MODEL(IDS[:, 460:470], past_key_values=ours).logits, REF(IDS[:, 460:470], past_key_values=ref).logits)


def roll_back(d, c):
    KEPT.clear()
    ours, _ = evicted(c, "random")
    first = run(MODEL, ours, IDS[:, 400:440])
    ours.crop(-40)
    assert ours.get_seq_length() == 400 and ours.layers[0].slots == 100
    close(run(MODEL, ours, IDS[:, 400:440]), first, 0)
    # below the watermark heads are left with different counts; a plan levels them
    ours.crop(-140)
    assert ours.get_seq_length() == 300
    counts = {len(ours.positions(layer, h)) for layer in range(LAYERS) for h in range(KV)}
    assert counts == {ours.layers[0].slots}, counts
    remember(ours)
    ref = DynamicCache()
    kept = dict(KEPT)
    KEPT.clear()
    run(REF, ref, IDS[:, :300])
    KEPT.update(kept)
    close(MODEL(IDS[:, 300:320], past_key_values=ours).logits, REF(IDS[:, 300:320], past_key_values=ref).logits)


def memory_goes_back_to_the_kernel(d, c):
    ours = fresh(c)
    run(MODEL, ours, IDS[:, :1000])
    before = ours.region.resident()
    plan = ours.compress(budget(64, 64, 64, policy="random", manual=True))
    after = ours.region.resident()
    lanes = LAYERS * KV
    assert before >= lanes * 1000 * 512, before
    # 64 rows of 256 bytes are 4 whole pages per plane
    assert after <= lanes * 2 * (64 * 256 + 4096), (before, after)
    info = ours.info()
    assert info["tier_rows"] == {"device": 64 * lanes, "dram": 64 * lanes, "nvme": 64 * lanes}, info
    assert info["dropped_rows"] == (1000 - 192) * lanes and plan.rows_drop == info["dropped_rows"], info


def rows_come_back_bit_for_bit(d, c):
    ours = fresh(c)
    run(MODEL, ours, IDS[:, :600])
    keys = [layer.keys[0].clone() for layer in ours.layers]
    values = [layer.values[0].clone() for layer in ours.layers]
    ours.compress(budget(50, 200, 350, policy="random", manual=True))
    plan = ours.compress(budget(600, policy="random", manual=True))
    assert plan.rows_in == 550 * LAYERS * KV, plan.rows_in
    for i, layer in enumerate(ours.layers):
        assert layer.slots == 600
        assert torch.equal(layer.keys[0], keys[i]) and torch.equal(layer.values[0], values[i]), f"layer {i}"
    # a clean demotion copies nothing: the copies below are still valid
    plan = ours.compress(budget(50, 200, 350, policy="random", manual=True))
    assert plan.rows_out == 0, plan.rows_out


def another_policy_ranks_anew(d, c):
    def kept(first, then):
        ours = fresh(c)
        run(MODEL, ours, IDS[:, :400])
        if first:  # everything stays; only the keys are made
            ours.compress(budget(400, policy=first, manual=True))
        ours.compress(budget(100, 300, policy=then, manual=True))
        rows = [ours.positions(layer, h) for layer in range(LAYERS) for h in range(KV)]
        ours.close()
        return rows

    for then in ("knorm", "keydiff", "streaming"):
        assert kept("random", then) == kept(None, then), then
    assert kept("knorm", "random") != kept(None, "knorm")


def fetch_by_hand(d, c):
    ours = fresh(c)
    run(MODEL, ours, IDS[:, :500])
    original = ours.layers[1].keys[0].clone()
    ours.compress(budget(100, 400, policy="streaming", manual=True))
    assert not set(range(150, 170)) & set(ours.positions(1, 0))
    ours.recall_rows(150, 20)
    pos = ours.positions(1, 1)
    assert set(range(150, 170)) <= set(pos) and len(pos) == 100, pos
    assert torch.equal(ours.layers[1].keys[0, 1], original[1][pos])


def swap_out_and_resume(d, c):
    key, secret = os.urandom(16), os.urandom(32)
    ours = fresh(c, key=key, secret=secret, leased=True, ttl_s=60)
    run(MODEL, ours, IDS[:, :500])
    original = [layer.values[0].clone() for layer in ours.layers]
    ours.compress(budget(0, 0, 500, policy="random", manual=True))
    assert ours.layers[0].slots == 0 and ours.region.resident() == 0, ours.region.resident()
    assert ours.info()["tier_rows"]["nvme"] == 500 * LAYERS * KV
    ours.close()
    with Client(d.socket) as other:
        try:
            fresh(other, key=key, secret=os.urandom(32), leased=True, resume=True)
            raise AssertionError("a wrong secret resumed the sequence")
        except Error as e:
            assert e.code == -2009, e
        back = fresh(other, key=key, secret=secret, leased=True, ttl_s=60, resume=True)
        assert back.get_seq_length() == 500
        back.compress(budget(500, manual=True))
        for i, layer in enumerate(back.layers):
            assert torch.equal(layer.values[0], original[i]), f"layer {i}"
        back.seq.drop()


def generate_accepts_the_cache(d, c):
    args = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
    plain = MODEL.generate(IDS[:, :200], **args)
    ours = fresh(c)
    assert torch.equal(MODEL.generate(IDS[:, :200], past_key_values=ours, **args), plain)
    # with a budget that plans by itself while it generates
    auto = fresh(c, b=budget(96, 400, policy="keydiff", slack=16))
    out = MODEL.generate(IDS[:, :400], past_key_values=auto, **args)
    assert out.shape[1] == 424
    end = time.monotonic() + 5
    while auto.layers[0].slots > 200 and time.monotonic() < end:
        auto.poll()
        time.sleep(0.01)
    assert auto.layers[0].slots < 200, "no plan was ever applied"


def bfloat16_rows(d, c):
    model = make_model("sdpa").to(torch.bfloat16)
    ours, theirs = KvtierCache(model.config, c, 256, name="tiny16", dtype=torch.bfloat16,
                               budget=budget(manual=True)), DynamicCache()
    close(run(model, ours, IDS[:, :200]).float(), run(model, theirs, IDS[:, :200]).float(), 0)
    want = ours.layers[2].keys[0].clone()
    ours.compress(budget(64, 136, policy="vnorm", manual=True))
    assert torch.equal(ours.layers[2].keys[0, 1], want[1][ours.positions(2, 1)])


def refused(fn, word):
    """fn() fails with one line that names `word`."""
    try:
        fn()
    except (Error, ValueError) as e:
        assert word in str(e) and "\n" not in str(e), str(e)
    else:
        raise AssertionError(f"accepted: {word}")


def bad_input_is_one_line(d, c):
    for fn, word in ((lambda: fresh(c, b=budget(10, policy="nonesuch")), "nonesuch"),
                     (lambda: MODEL(IDS[:, :8].repeat(2, 1), past_key_values=fresh(c)), "batch"),
                     (lambda: Client("/nonexistent/sock", timeout_ms=200), "nonexistent")):
        refused(fn, word)


def daemon_killed_runtime_goes_on(d, c):
    KEPT.clear()
    ours, ref = evicted(c, "random")
    remember(ours)
    d.kill()
    t = time.monotonic()
    # appends cannot reach the daemon; the forward pass must neither fail nor stall
    for i in range(400, 420):
        close(MODEL(IDS[:, i : i + 1], past_key_values=ours).logits, REF(IDS[:, i : i + 1], past_key_values=ref).logits)
    assert time.monotonic() - t < 20
    try:
        ours.seq.info()
        raise AssertionError("a dead daemon answered")
    except Error:
        pass
    d.start()
    end = time.monotonic() + 10
    while True:
        try:
            again = fresh(c)
            break
        except Error:
            assert time.monotonic() < end, "never reconnected"
            time.sleep(0.05)
    run(MODEL, again, IDS[:, :100])
    again.compress(budget(32, 68, policy="random", manual=True))
    assert again.layers[0].slots == 32


TESTS = [no_eviction_equals_dynamic_cache, eviction_equals_masked_full_cache, second_plan_after_eviction, roll_back,
         memory_goes_back_to_the_kernel, rows_come_back_bit_for_bit, another_policy_ranks_anew, fetch_by_hand,
         swap_out_and_resume, generate_accepts_the_cache, bfloat16_rows, bad_input_is_one_line, daemon_killed_runtime_goes_on]


def main():
    only = sys.argv[1:]
    tests = [t for t in TESTS if not only or t.__name__ in only]
    print(f"1..{len(tests)}")
    bad = 0
    with PrivateDaemon(dram="512M", nvme="512M") as d:
        for n, test in enumerate(tests, 1):
            try:
                with Client(d.socket, name="check_hf") as c:
                    test(d, c)
                print(f"ok {n} - {test.__name__}")
            except Exception:
                bad += 1
                print(f"not ok {n} - {test.__name__}")
                print("# " + traceback.format_exc().replace("\n", "\n# "))
                if d.proc.poll() is not None:
                    print(f"# kvtierd died with {d.proc.returncode}: " + open(d.log).read()[-600:].replace("\n", "\n# "))
                    d.start()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
