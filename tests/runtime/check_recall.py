#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Recall in a transformer: kept, recalled and own rows attended in one pass equal a full cache whose masks hide exactly
the rows that are in neither; heads with different numbers of rows too; and what was recalled is what the queries want and
what policy/lab/search.py would have chosen.

A Llama with random weights and sharpened queries, float32, a real kvtierd.
"""
import os
import sys
import time
import traceback

for _parts in (("ipc", "python"), ("policy", "lab")):
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", *_parts))

try:
    import torch
    from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
except ImportError as e:
    print(f"1..0 # SKIP {e.name} is not installed (make deps)")
    sys.exit(0)

import search  # noqa: E402
from kvtier import Client, Error, attention, budget  # noqa: E402
from kvtier._lib import RECALL_ALONE, RECALL_LOGITS, RECALL_NO_RESIDENT  # noqa: E402
from kvtier.daemon import PrivateDaemon  # noqa: E402
from kvtier.hf import KvtierCache  # noqa: E402

torch.manual_seed(11)
torch.set_grad_enabled(False)
attention.register()
LAYERS, HEADS, KV, DIM, ROWS = 4, 6, 2, 32, 1024
SEE = {}      # layer -> bool [KV, positions]: what the reference may see of those positions
QUERIES = {}  # layer -> the newest queries, [HEADS, n, DIM]


def reference_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ k.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    nq, nk = scores.shape[-2:]
    see = (torch.arange(nk)[None] <= torch.arange(nk - nq, nk)[:, None])[None].expand(query.shape[1], nq, nk).clone()
    kept = SEE.get(module.layer_idx)
    if kept is not None:
        see[:, :, : kept.shape[1]] &= kept.repeat_interleave(groups, 0)[:, None, :]
    QUERIES[module.layer_idx] = query[0]
    out = scores.masked_fill(~see[None], float("-inf")).softmax(-1) @ v
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("recall_reference", reference_attention)


def make_model(attn):
    cfg = LlamaConfig(hidden_size=HEADS * DIM, intermediate_size=192, num_hidden_layers=LAYERS,
                      num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=DIM, vocab_size=512,
                      max_position_embeddings=2048, attn_implementation=attn)
    torch.manual_seed(3)
    model = LlamaForCausalLM(cfg).eval()
    for layer in model.model.layers:  # random weights attend to everything alike; these do not
        layer.self_attn.q_proj.weight *= 12
        layer.self_attn.k_proj.weight *= 12
    return model


MODEL, REF, STOCK = make_model("kvtier"), make_model("recall_reference"), make_model("sdpa")
IDS = torch.randint(0, 512, (1, ROWS))


def fresh(client, model=MODEL, b=None, **kw):
    return KvtierCache(model.config, client, ROWS, name="tiny", budget=b or budget(manual=True), **kw)


def run(model, cache, ids, chunk=96):
    out = [model(ids[:, i : i + chunk], past_key_values=cache, use_cache=True).logits
           for i in range(0, ids.shape[1], chunk)]
    return torch.cat(out, 1)


def holds(cache, recalled=True):
    """Per layer, which positions each head holds or has recalled."""
    for layer in cache.layers:
        see = torch.zeros(KV, cache.get_seq_length(), dtype=torch.bool)
        for h in range(KV):
            see[h, cache.positions(layer.index, h)] = True
            if recalled and layer.front:
                at = layer.recalled_at[h][layer.recalled[h]]
                assert not see[h, at].any(), "a row is held and recalled"
                see[h, at] = True
        SEE[layer.index] = see


def close(a, b, tol=1e-4):
    diff = (a - b).abs().max().item()
    assert diff <= tol, f"logits differ by {diff}, limit {tol}"
    return diff


def evicted(c, device, rows=400, recall=0, model=MODEL, policy="random", **kw):
    """Ours after eviction, and a full cache of the same rows."""
    SEE.clear()
    ours, ref = fresh(c, model, recall_rows=recall, **kw), DynamicCache()
    run(model, ours, IDS[:, :rows])
    run(REF, ref, IDS[:, :rows])
    ours.compress(budget(device, 2 * ROWS, policy=policy, manual=True))
    return ours, ref


def question(ours, ref, lo, hi):
    """One step of each. What the reference may see is known after ours; its rows of the step are always seen."""
    mine = MODEL(IDS[:, lo:hi], past_key_values=ours).logits
    holds(ours)
    for layer, see in SEE.items():
        SEE[layer] = see[:, :lo] if see.shape[1] > lo else see
    return mine, REF(IDS[:, lo:hi], past_key_values=ref).logits


def without_recall_it_is_plain_attention(d, c):
    SEE.clear()
    ours, theirs, full = fresh(c), DynamicCache(), DynamicCache()
    want = run(REF, theirs, IDS[:, :300])
    close(run(MODEL, ours, IDS[:, :300]), want)
    close(run(MODEL, full, IDS[:, :300]), want)  # a cache of another kind
    for i in range(300, 304):
        close(MODEL(IDS[:, i : i + 1], past_key_values=ours).logits, REF(IDS[:, i : i + 1], past_key_values=theirs).logits)


def recalling_everything_equals_a_full_cache(d, c):
    ours, ref = evicted(c, device=380, recall=300)
    assert ours.layers[0].slots == 80, ours.layers[0].slots
    # 320 rows are missing, 300 come back: not everything yet
    mine = MODEL(IDS[:, 400:420], past_key_values=ours).logits
    assert ours.layers[0].front == 300
    SEE.clear()
    full = REF(IDS[:, 400:420], past_key_values=ref).logits
    assert (mine - full).abs().max() > 1e-3, "20 rows a head are missing and nothing shows it"
    ours.close()
    ours, ref = evicted(c, device=400, recall=320)
    for lo, hi in ((400, 420), (420, 421), (421, 422), (422, 450)):
        SEE.clear()
        close(MODEL(IDS[:, lo:hi], past_key_values=ours).logits, REF(IDS[:, lo:hi], past_key_values=ref).logits)
    assert ours.recall_stats["calls"] == 2 * LAYERS, ours.recall_stats


def partial_recall_equals_masks(d, c):
    ours, ref = evicted(c, device=120, recall=40)
    assert ours.layers[0].slots == 80
    for lo, hi in ((400, 424), (424, 425), (425, 426), (426, 427)):
        mine, want = question(ours, ref, lo, hi)
        close(mine, want)
    sets = {tuple(layer.recalled_at[h].tolist()) for layer in ours.layers for h in range(KV)}
    assert len(sets) == LAYERS * KV, "heads recalled the same rows: nothing per-head was tested"
    # the next question recalls anew; rows of the first one are kept and demoted by nobody
    before = ours.layers[2].recalled_at.clone()
    mine, want = question(ours, ref, 427, 460)
    close(mine, want)
    assert not torch.equal(before, ours.layers[2].recalled_at)
    ours.end_turn()
    mine, want = question(ours, ref, 460, 461)
    assert ours.layers[0].front == 0
    close(mine, want)


def recalled_rows_are_the_wanted_ones(d, c):
    ours, ref = evicted(c, device=120, recall=24, recall_args={"probe": 1000, "flags": RECALL_ALONE})
    q = MODEL(IDS[:, 400:404], past_key_values=ours)  # four tokens: all of them are selected
    holds(ours, recalled=False)
    kept = {layer: see[:, :400] for layer, see in SEE.items()}
    holds(ours)
    SEE.update({layer: see[:, :400] for layer, see in SEE.items()})
    close(q.logits, REF(IDS[:, 400:404], past_key_values=ref).logits)
    better = 0.0
    for layer in range(LAYERS):
        k = ref.layers[layer].keys[0]  # full cache: the reference saw what ours saw, so its rows are ours
        for h in range(KV):
            queries = QUERIES[layer][h * 3 : h * 3 + 3].reshape(-1, DIM)
            share = (queries @ k[h, :400].T * DIM ** -0.5).softmax(-1).amax(0)
            out = (~kept[layer][h]).nonzero()[:, 0]
            best = out[share[out].topk(24).indices]
            got = ours.layers[layer].recalled_at[h]
            assert set(got.tolist()) <= set(out.tolist())
            better += share[got].sum().item() / share[best].sum().item()
    assert better / (LAYERS * KV) > 0.97, better / (LAYERS * KV)


def the_labs_search_finds_the_same(d, c):
    ours, ref = evicted(c, device=164, rows=900, recall=64)
    keys, g, differ = [], HEADS // KV, 0
    for layer in ref.layers:
        keys.append(layer.keys[0].clone())
    torch.manual_seed(5)
    for tokens in (1, 3, 4, 30):
        for flags, near in ((0, None), (0, (3, 0)), (0, (0, 40)), (RECALL_ALONE, (0, 0)), (RECALL_LOGITS, (8, 24)),
                            (RECALL_NO_RESIDENT | RECALL_ALONE, (0, 0)), (RECALL_NO_RESIDENT, (16, 16))):
            before, after = near or (0, 0)
            for probe, find in ((0, search.two_stage), (1000, search.exact)):
                for layer in ours.layers:
                    k = keys[layer.index]
                    aim = k[:, 100 * tokens % 900].repeat_interleave(g, 0)[None, :, None]
                    q = 2 * torch.randn(1, HEADS, tokens, DIM) + aim
                    ours.recall_args = dict(flags=flags, probe=probe, before=before, after=after)
                    ours._recall(layer, q, 64)
                    picked = search.pick(q[0].view(KV, g, tokens, DIM), torch.full((KV,), tokens)).flatten(1, 2)
                    picked = picked * DIM ** -0.5
                    for h in range(KV):
                        held = torch.tensor(ours.positions(layer.index, h))
                        below = torch.ones(900, dtype=torch.bool).index_fill_(0, held, False).nonzero()[:, 0]
                        on_device = (picked[h] @ k[h, held].T).logsumexp(-1)
                        if flags & (RECALL_LOGITS | RECALL_NO_RESIDENT):
                            on_device.fill_(float("-inf"))
                        score = find(picked[h : h + 1], k[h : h + 1, below], 64, on_device[None],
                                     "logit" if flags & RECALL_LOGITS else "mass")
                        score = search.spread(score, near or (8, 24))[0]
                        best = score.sort(descending=True, stable=True).indices[:64]
                        want, got = set(below[best].tolist()), set(layer.recalled_at[h].tolist())
                        assert len(got) == 64 and len(want) == 64
                        for pos in want ^ got:  # only rows whose scores are equal but for rounding
                            gap = (score[below == pos] - score[best[-1]]).abs().item()
                            assert gap < 1e-4, (tokens, flags, near, probe, layer.index, h, pos, gap)
                        differ += len(want ^ got)
    assert differ <= 20, f"{differ} rows differ by rounding: too many to be that"


def decode_keeps_what_its_turn_recalled(d, c):
    ours, ref = evicted(c, device=150, recall=50)
    mine, want = question(ours, ref, 400, 430)
    close(mine, want)
    calls = ours.recall_stats["calls"]
    rows = ours.layers[1].recalled_at.clone()
    # a plan in the middle promotes some of the recalled rows: none is seen twice, none vanishes
    ours.compress(budget(250, 2 * ROWS, policy="random", manual=True))
    for i in range(430, 436):
        mine, want = question(ours, ref, i, i + 1)
        close(mine, want)
    assert ours.recall_stats["calls"] == calls and torch.equal(rows, ours.layers[1].recalled_at)
    assert not ours.layers[1].recalled.all(), "the plan promoted none of them: choose another seed"


def roll_back_forgets_later_rows(d, c):
    ours, ref = evicted(c, device=120, recall=40)
    question(ours, ref, 400, 430)
    ours.truncate(250)
    for layer in ours.layers:
        assert layer.front and (layer.recalled_at[layer.recalled] < 250).all()
    ref.crop(250)
    mine, want = question(ours, ref, 250, 251)
    close(mine, want)


def heads_hold_different_numbers_of_rows(d, c):
    lanes = LAYERS * KV
    share = [60 + 35 * (i % 4) for i in range(lanes)]
    for recall in (0, 30):
        SEE.clear()
        ours, ref = fresh(c, recall_rows=recall, equal_lanes=False), DynamicCache()
        run(MODEL, ours, IDS[:, :400])
        run(REF, ref, IDS[:, :400])
        ours.compress(budget([s + recall for s in share], 2 * ROWS, policy="random", manual=True))
        assert [n for layer in ours.layers for n in layer.counts] == share, [layer.counts for layer in ours.layers]
        for lo, hi in ((400, 401), (401, 433), (433, 434), (434, 460)):
            mine, want = question(ours, ref, lo, hi)
            close(mine, want)
        assert ours.recall_stats["calls"] == (2 * LAYERS if recall else 0)
        ours.compress(budget([s + recall + 10 for s in share], 2 * ROWS, policy="random", manual=True))
        mine, want = question(ours, ref, 460, 461)
        close(mine, want)
        ours.close()


def two_passes_without_a_hook(d, c):
    ours, ref = evicted(c, device=120, recall=40, model=STOCK)
    out = ours.recall_two_pass(STOCK, IDS[:, 400:424])
    assert {layer.front for layer in ours.layers} == {40}
    holds(ours)
    SEE.update({layer: see[:, :400] for layer, see in SEE.items()})
    close(out.logits, REF(IDS[:, 400:424], past_key_values=ref).logits)
    for i in range(424, 427):  # decode
        close(STOCK(IDS[:, i : i + 1], past_key_values=ours).logits, REF(IDS[:, i : i + 1], past_key_values=ref).logits)
    ours.close()
    # fewer rows below than there is room for: every head gets as many
    ours, ref = evicted(c, device=430, recall=40, model=STOCK)
    ours.recall_two_pass(STOCK, IDS[:, 400:410])
    assert {layer.front for layer in ours.layers} == {10}, [layer.front for layer in ours.layers]


def generate_with_recall(d, c):
    args = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)  # later tokens of this model hang on rounding
    SEE.clear()
    plain = REF.generate(IDS[:, :430], **args)
    ours = fresh(c, recall_rows=320)
    run(MODEL, ours, IDS[:, :400])
    ours.compress(budget(400, 2 * ROWS, policy="random", manual=True))
    assert torch.equal(MODEL.generate(IDS[:, :430], past_key_values=ours, **args), plain)
    # with plans that come by themselves
    auto = fresh(c, b=budget(150, 2 * ROWS, policy="random", slack=16), recall_rows=50)
    out = MODEL.generate(IDS[:, :400], past_key_values=auto, **args)
    end = time.monotonic() + 5
    while auto.layers[0].slots > 200 and time.monotonic() < end:
        auto.poll()
        time.sleep(0.01)
    assert auto.layers[0].slots < 200 and out.shape[1] == 404
    MODEL(IDS[:, 404:430], past_key_values=auto)
    assert auto.layers[0].front == 50


def rows_only_on_nvme_are_counted_and_brought_up(d, c):
    SEE.clear()
    ours, ref = fresh(c, recall_rows=40), DynamicCache()
    run(MODEL, ours, IDS[:, :400])
    run(REF, ref, IDS[:, :400])
    ours.compress(budget(120, 100, 300, policy="random", manual=True))
    mine, want = question(ours, ref, 400, 410)
    close(mine, want)
    assert ours.recall_stats["searched"] == 100 * LAYERS * KV, ours.recall_stats
    assert ours.recall_stats["skipped"] == 220 * LAYERS * KV, ours.recall_stats
    ours.seq.recall_prepare()  # they come up; the next question finds all of them
    end = time.monotonic() + 10
    while time.monotonic() < end:
        before = dict(ours.recall_stats)
        mine, want = question(ours, ref, ours.get_seq_length(), ours.get_seq_length() + 2)
        close(mine, want)
        if ours.recall_stats["skipped"] == before["skipped"]:
            break
        time.sleep(0.05)
    assert ours.recall_stats["searched"] - before["searched"] == 320 * LAYERS * KV, (before, ours.recall_stats)


def the_real_model_answers_from_recalled_rows(d, c):
    """SmolLM2, facts in 600 tokens, a fifth of the rows on the device, evicted before the question is known."""
    import recall_real

    try:
        model, tok = recall_real.load()
    except FileNotFoundError as e:
        return f"SKIP {e}"
    args = recall_real.options(["--n", "1", "--tasks", "docqa"])
    hits = recall_real.measure(model, tok, recall_real.filler("", tok), c, args)
    right = {arm: hits["docqa", arm][0] for arm in recall_real.ARMS}
    print("# of 5 questions right: " + ", ".join(f"{arm} {n}" for arm, n in right.items()), flush=True)
    assert right["full"] >= 4, right
    assert right["near"] >= max(right["drop-only"] + 1, right["alone"]), right
    return None


def a_dead_daemon_costs_quality_only(d, c):
    ours, ref = evicted(c, device=120, recall=40)
    d.kill()
    t = time.monotonic()
    for lo, hi in ((400, 420), (420, 421), (421, 440)):
        mine = MODEL(IDS[:, lo:hi], past_key_values=ours).logits
        holds(ours)
        for layer, see in SEE.items():
            see[:, 400:] = True  # the library was not told of rows that came after the daemon's end
            SEE[layer] = see[:, :lo]
        close(mine, REF(IDS[:, lo:hi], past_key_values=ref).logits)
    assert time.monotonic() - t < 20 and ours.detached
    d.start()


def bad_input_is_one_line(d, c):
    for fn, word in ((lambda: fresh(c, b=budget(10, manual=True), recall_rows=20), "recall_rows"),
                     (lambda: fresh(c, STOCK, equal_lanes=False), "equal_lanes")):
        try:
            fn()
        except (Error, ValueError) as e:
            assert word in str(e) and "\n" not in str(e), str(e)
        else:
            raise AssertionError(f"accepted: {word}")


TESTS = [without_recall_it_is_plain_attention, recalling_everything_equals_a_full_cache, partial_recall_equals_masks,
         recalled_rows_are_the_wanted_ones, the_labs_search_finds_the_same, decode_keeps_what_its_turn_recalled,
         roll_back_forgets_later_rows, heads_hold_different_numbers_of_rows, two_passes_without_a_hook,
         generate_with_recall, rows_only_on_nvme_are_counted_and_brought_up, bad_input_is_one_line,
         the_real_model_answers_from_recalled_rows, a_dead_daemon_costs_quality_only]


def main():
    only = sys.argv[1:]
    tests = [t for t in TESTS if not only or t.__name__ in only]
    print(f"1..{len(tests)}")
    bad = 0
    with PrivateDaemon(dram="512M", nvme="512M") as d:
        for n, test in enumerate(tests, 1):
            try:
                with Client(d.socket, name="check_recall") as c:
                    why = test(d, c)
                print(f"ok {n} - {test.__name__}" + (f" # {why}" if why else ""))
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
