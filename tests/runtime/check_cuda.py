#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The Hugging Face cache for rows in GPU memory against references, over a real private kvtierd. TAP.

With a GPU it runs there. Without one the same code runs on build/fake/libcuda.so.1, a driver whose GPU memory is host
memory and whose kernels are the real ones compiled by g++: torch's CPU tensors lie in it. References are computed on
the CPU: a full DynamicCache with, per layer and KV head, minus infinity on exactly the rows that the kvtier cache does
not hold.
"""
import ctypes
import gc
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
for _parts in (("ipc", "python"), ("policy", "lab"), ("tests", "runtime")):
    sys.path.insert(0, os.path.join(HERE, "..", "..", *_parts))

try:
    import torch
    from transformers import DynamicCache
except ImportError as e:
    print(f"1..0 # SKIP {e.name} is not installed (make deps)")
    sys.exit(0)

from kvtier.daemon import PrivateDaemon, build_dir  # noqa: E402

REAL = torch.cuda.is_available()
FAKE = build_dir() / "fake" / "libcuda.so.1"
if not REAL:
    if not FAKE.exists():
        print(f"1..0 # SKIP no GPU, and no {FAKE} (make {FAKE})")
        sys.exit(0)
    os.environ["KVTIER_LIBCUDA"] = str(FAKE)
    os.environ["KVTIER_CUDA_KERNELS"] = str(FAKE)  # any file will do: its kernels are its own
    DRIVER = ctypes.CDLL(str(FAKE))

import check_hf as hf  # noqa: E402
from check_hf import HEADS, IDS, KEPT, KV, LAYERS, REF, ROWS, close, make_model, refused, remember, run  # noqa: E402
from kvtier import Client, Error, attention, attention_cuda, budget  # noqa: E402
from kvtier._lib import RECALL_ALONE  # noqa: E402
from kvtier.client import Model  # noqa: E402
from kvtier.cuda import Gpu, Pool, Scorer  # noqa: E402
from kvtier.hf import KvtierCache  # noqa: E402
from kvtier.hf_cuda import DecodeGraph, KvtierCudaCache, LaneCache  # noqa: E402

torch.set_grad_enabled(False)
if not REAL:
    torch.set_num_threads(1)  # small work: threads would only wait for each other
attention_cuda.register()
DEV = torch.device("cuda" if REAL else "cpu")
MODEL = make_model("kvtier_cuda").to(DEV)
for _model in (MODEL, REF, hf.MODEL):  # random weights attend to everything alike; these do not
    for _layer in _model.model.layers:
        _layer.self_attn.q_proj.weight *= 6
        _layer.self_attn.k_proj.weight *= 6
MY_IDS = IDS.to(DEV)
LANES = LAYERS * KV
GPU = None   # one for all tests
NETWORK = "tiny-scored"


MEMORY = []  # addresses in the fake GPU's memory; given back after each test


def fake_memory(nbytes):
    """What torch would take from a GPU."""
    at = ctypes.c_uint64()
    assert DRIVER.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(nbytes)) == 0
    MEMORY.append(at)
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(at.value), dtype=torch.uint8)


def fresh(client, b=None, **kw):
    args = dict(name="tiny", dtype=torch.float32, device=DEV, gpu=GPU, memory=None if REAL else fake_memory,
                scorer=False, budget=b or budget(manual=True), out_bytes=1 << 20, in_bytes=1 << 20, stage=ROWS)
    args.update(kw)
    return Told(MODEL.config, client, ROWS, **args)


class Told(KvtierCudaCache):
    """The fake GPU knows no memory of torch's: queries are handed over in its own."""

    def ask(self, layer, query, scaling):
        if not REAL and self.turn:
            query = self._tensor(query.shape, query.dtype).copy_(query)
        super().ask(layer, query, scaling)


def counts(cache):
    return {n for row in cache.counts.tolist() for lanes in row for n in lanes}


def ask(ours, ref, lo, hi, tol=1e-4):
    mine, theirs = MODEL(MY_IDS[:, lo:hi], past_key_values=ours), REF(IDS[:, lo:hi], past_key_values=ref)
    close(mine.logits.cpu(), theirs.logits, tol)


def in_order(cache, layer, head, b=0):
    """(positions ascending, K, V of that lane): from slots in whatever order."""
    n = int(cache.counts[layer, b, head])
    at, order = cache.slots(b)[layer, head, :n].long().sort()
    lane = cache.layers[layer]
    return at.cpu(), lane.keys[b, head, :n][order].cpu(), lane.values[b, head, :n][order].cpu()


def originals(cache, b=0):
    """Copies of all rows; nothing was evicted yet."""
    return [[x[b, :, : cache.seen].clone().cpu() for x in (layer.keys, layer.values)] for layer in cache.layers]


def holds(cache, rows, b=0):
    """Every row on the device is, bit for bit, the one of its position. Returns how many there are."""
    total = 0
    for layer in range(LAYERS):
        for head in range(KV):
            at, k, v = in_order(cache, layer, head, b)
            assert at.tolist() == cache.positions(layer, head, b), f"layer {layer}, head {head}: the map says otherwise"
            for now, then in ((k, rows[layer][0]), (v, rows[layer][1])):
                assert torch.equal(now.view(torch.uint8), then[head][at].contiguous().view(torch.uint8)), (layer, head)
            total += len(at)
    return total


# ---- equality --------------------------------------------------------------------------------


def no_eviction_equals_dynamic_cache(d, c):
    KEPT.clear()
    ours, theirs = fresh(c), DynamicCache()
    close(run(MODEL, ours, MY_IDS[:, :300]).cpu(), run(hf.MODEL, theirs, IDS[:, :300]), 1e-5 if not REAL else 1e-4)
    for i in range(300, 310):
        close(MODEL(MY_IDS[:, i : i + 1], past_key_values=ours).logits.cpu(),
              hf.MODEL(IDS[:, i : i + 1], past_key_values=theirs).logits, 1e-5 if not REAL else 1e-4)
    assert ours.get_seq_length() == 310 and ours.seq.rows == 288  # told of once 256 were full
    ours.settle()
    assert ours.seq.rows == 310 and counts(ours) == {310}


def evicted(c, policy, b=(100, 100, 50), rows=400, **kw):
    ours, ref = fresh(c, **kw), DynamicCache()
    run(MODEL, ours, MY_IDS[:, :rows])
    run(REF, ref, IDS[:, :rows])
    ours.compress(budget(*b, policy=policy, manual=True))
    return ours, ref


def eviction_equals_masked_full_cache(d, c):
    for policy in ("random", "streaming"):
        KEPT.clear()
        ours, ref = evicted(c, policy)
        assert counts(ours) == {100}, counts(ours)
        sets = {tuple(ours.positions(layer, h)) for layer in range(LAYERS) for h in range(KV)}
        assert (len(sets) > 1) == (policy == "random"), "random keeps other rows in every head"
        remember(ours)
        for lo, hi in ((400, 401), (401, 433), (433, 434)):  # one token, several, one again
            ask(ours, ref, lo, hi)
        ours.close()


def second_plan_after_eviction(d, c):
    KEPT.clear()
    ours, ref = evicted(c, "random")
    remember(ours)
    ask(ours, ref, 400, 460)
    ours.compress(budget(80, 60, 60, policy="random", manual=True))
    assert counts(ours) == {80}
    remember(ours)
    ask(ours, ref, 460, 470)
    ours.compress(budget(120, 60, 60, policy="random", manual=True))  # some come back
    remember(ours)
    ask(ours, ref, 470, 480)


def heads_hold_different_numbers_of_rows(d, c):
    KEPT.clear()
    share = [40 + 35 * (i % 4) for i in range(LANES)]
    ours, ref = fresh(c, equal_lanes=False), DynamicCache()
    run(MODEL, ours, MY_IDS[:, :400])
    run(REF, ref, IDS[:, :400])
    ours.compress(budget(share, 2 * ROWS, policy="random", manual=True))
    assert ours.counts.flatten().tolist() == share, ours.counts
    remember(ours)
    for lo, hi in ((400, 401), (401, 433), (433, 434)):
        ask(ours, ref, lo, hi)
    ours.compress(budget([n + 25 for n in reversed(share)], 2 * ROWS, policy="random", manual=True))
    remember(ours)
    ask(ours, ref, 434, 436)


def roll_back(d, c):
    KEPT.clear()
    ours, _ = evicted(c, "random")
    first = run(MODEL, ours, MY_IDS[:, 400:440])
    ours.crop(-40)
    assert ours.get_seq_length() == 400 and counts(ours) == {100}
    close(run(MODEL, ours, MY_IDS[:, 400:440]), first, 0)
    ours.crop(-140)  # below the watermark: rows of plans go too
    assert ours.get_seq_length() == 300
    remember(ours)
    ref, kept = DynamicCache(), dict(KEPT)
    KEPT.clear()
    run(REF, ref, IDS[:, :300])
    KEPT.update(kept)
    ask(ours, ref, 300, 320)


def several_sequences_in_step(d, c):
    """Two of a batch, each with plans of its own, equal each alone."""
    KEPT.clear()
    ids = torch.cat([IDS[:, :500], IDS[:, 500:1000]])
    both = fresh(c, batch=2)
    for i in range(0, 400, 96):
        MODEL(ids[:, i : min(i + 96, 400)].to(DEV), past_key_values=both)
    both.compress(budget(90, 310, policy="random", manual=True))
    alone = []
    for b in range(2):
        KEPT.clear()
        ref = DynamicCache()
        run(REF, ref, ids[b : b + 1, :400])
        for layer in range(LAYERS):
            KEPT[layer] = torch.zeros(KV, 400, dtype=torch.bool)
            for h in range(KV):
                KEPT[layer][h, both.positions(layer, h, b)] = True
        alone.append(REF(ids[b : b + 1, 400:420], past_key_values=ref).logits)
    close(MODEL(ids[:, 400:420].to(DEV), past_key_values=both).logits.cpu(), torch.cat(alone))
    try:
        MODEL(MY_IDS[:, :8], past_key_values=both)
        raise AssertionError("accepted a batch of 1")
    except ValueError as e:
        assert "batch size: 1" in str(e), e


# ---- tiers -----------------------------------------------------------------------------------------


def rows_come_back_bit_for_bit(d, c):
    ours = fresh(c)
    run(MODEL, ours, MY_IDS[:, :600])
    rows = originals(ours)
    ours.compress(budget(50, 200, 350, policy="random", manual=True))
    assert holds(ours, rows) == 50 * LANES
    info = ours.info()
    assert info["tier_rows"] == {"device": 50 * LANES, "dram": 200 * LANES, "nvme": 350 * LANES}, info
    before = ours.seq.state().bytes_out
    assert before >= 550 * LANES * ours.model.row_bytes, before
    ours.compress(budget(600, policy="random", manual=True))
    assert holds(ours, rows) == 600 * LANES
    # a clean demotion copies nothing: the copies below are still valid
    ours.compress(budget(50, 200, 350, policy="random", manual=True))
    assert holds(ours, rows) == 50 * LANES and ours.seq.state().bytes_out == before


def rows_come_back_in_few_slots(d, c):
    """More rows wanted than stage slots: plans bring what fits, and the rest with the next."""
    ours = fresh(c, stage=64)
    run(MODEL, ours, MY_IDS[:, :500])
    rows = originals(ours)
    ours.compress(budget(100, 400, policy="random", manual=True))
    for _ in range(12):
        if counts(ours) == {500}:
            break
        ours.compress(budget(500, policy="random", manual=True))
        holds(ours, rows)
    assert holds(ours, rows) == 500 * LANES, counts(ours)


def write_through(d, c):
    ours = fresh(c, b=budget(600, 600, policy="random", write_through=True))
    for i in range(0, 600, 100):
        MODEL(MY_IDS[:, i : i + 100], past_key_values=ours)
    rows = originals(ours)
    end = time.monotonic() + 20
    while True:
        ours.settle()
        info = ours.info()
        if info["tier_bytes"]["dram"] >= 600 * LANES * ours.model.row_bytes or time.monotonic() > end:
            break
    assert info["tier_bytes"]["dram"] >= 600 * LANES * ours.model.row_bytes, info
    assert counts(ours) == {600} and info["tier_rows"]["device"] == 600 * LANES, info
    before = ours.seq.state().bytes_out
    ours.compress(budget(100, 600, policy="random", manual=True))
    assert ours.seq.state().bytes_out == before, "rows that have a copy below were copied again"
    assert holds(ours, rows) == 100 * LANES
    ours.compress(budget(600, 600, policy="random", manual=True))
    assert holds(ours, rows) == 600 * LANES


def fetch_by_hand(d, c):
    ours = fresh(c)
    run(MODEL, ours, MY_IDS[:, :500])
    rows = originals(ours)
    ours.compress(budget(100, 400, policy="streaming", manual=True))
    assert not set(range(150, 170)) & set(ours.positions(1, 0))
    ours.recall_rows(150, 20)
    pos = ours.positions(1, 1)
    assert set(range(150, 170)) <= set(pos) and len(pos) == 100, pos
    holds(ours, rows)


def anything_in_any_order(d, c):
    """Random rows, budgets, fetches and rollbacks; after each every row on the device is that of its position."""
    seed = int(os.environ.get("KVT_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"# seed {seed}", flush=True)
    rng = random.Random(seed)
    ours = fresh(c, b=budget(90, 2 * ROWS, policy="random", slack=24), cap=300, stage=rng.choice((40, 300)),
                 push_every=rng.choice((1, 17, 64)), equal_lanes=False)
    rows = [[torch.empty(KV, ROWS, hf.DIM) for _ in "kv"] for _ in range(LAYERS)]
    for _ in range(40):
        what = rng.choices(("grow", "step", "budget", "fetch", "back", "settle"), (6, 6, 2, 2, 1, 1))[0]
        at = ours.seen
        if what in ("grow", "step") and at < ROWS - 64:
            n = 1 if what == "step" else rng.randrange(2, 64)
            for layer, (k, v) in zip(ours.layers, rows):
                k[:, at : at + n], v[:, at : at + n] = torch.randn(2, KV, n, hf.DIM)
                layer.update(k[None, :, at : at + n].to(DEV), v[None, :, at : at + n].to(DEV))
        elif what == "budget" and at:
            ours.compress(budget([rng.randrange(30, 200) for _ in range(LANES)], rng.choice((300, 2 * ROWS)), 2 * ROWS,
                                 policy="random", slack=rng.choice((8, 24))))
        elif what == "fetch" and at > 40:
            pos = rng.randrange(at - 20)
            ours.recall_rows(pos, rng.randrange(1, 20))
        elif what == "back" and at:
            ours.truncate(rng.randrange(at))
        elif what == "settle":
            ours.settle()
        ours.push()
        ours._known(5000)
        holds(ours, rows)
    end = time.monotonic() + 5  # what a rollback took is counted until the plan that it cancelled has ended
    while sum((info := ours.info())["tier_rows"].values()) != ours.seen * LANES and time.monotonic() < end:
        pass
    assert sum(info["tier_rows"].values()) == ours.seen * LANES and info["misses"] == 0, info


def save_leave_and_resume(d, c):
    key, secret = os.urandom(16), os.urandom(32)
    ours = fresh(c, key=key, secret=secret, leased=True, ttl_s=60,
                 b=budget(500, 200, 400, policy="random", manual=True))
    run(MODEL, ours, MY_IDS[:, :500])
    rows = originals(ours)
    ours.settle(save=True)
    ours.close()
    with Client(d.socket) as other:
        try:
            fresh(other, key=key, secret=os.urandom(32), leased=True, resume=True)
            raise AssertionError("a wrong secret resumed the sequence")
        except Error as e:
            assert e.code == -2009, e
        back = fresh(other, key=key, secret=secret, leased=True, ttl_s=60, resume=True)
        assert back.get_seq_length() == 500
        back.compress(budget(500, policy="random", manual=True))
        assert holds(back, rows) == 500 * LANES
        KEPT.clear()
        ref = DynamicCache()
        run(REF, ref, IDS[:, :500])
        ask(back, ref, 500, 520)
        back.seq.drop()


# ---- scoring -----------------------------------------------------------------------------------------


def filled(cache, rows, chunk=100):
    for i in range(0, rows[0].shape[2], chunk):
        for layer in cache.layers:
            layer.update(*(x[layer.index : layer.index + 1, :, i : i + chunk].to(layer.device) for x in rows))


def the_network_ranks_as_the_daemon_does(d, c):
    """The same rows in a region, scored by the daemon, and in GPU memory, scored by the kernel."""
    cfg = MODEL.config
    rows = [torch.randn(LAYERS, KV, 300, hf.DIM).half() for _ in "kv"]
    kw = dict(name=NETWORK, dtype=torch.float16, budget=budget(manual=True, policy="kvp"))
    theirs = KvtierCache(cfg, c, ROWS, **kw)
    filled(theirs, rows)
    theirs.compress(budget(120, 180, policy="kvp", manual=True))
    assert theirs.info()["policy"] == "kvp", theirs.info()
    scorer = Scorer(c, GPU, theirs.model, "kvp")
    assert scorer.policy == "kvp" and scorer.coefs in (1, 2)
    ours = fresh(c, scorer=scorer, model=theirs.model, **kw)
    filled(ours, rows)
    ours.compress(budget(120, 180, policy="kvp", manual=True))
    same = total = 0
    for layer in range(LAYERS):
        for h in range(KV):
            a, b = set(theirs.positions(layer, h)), set(ours.positions(layer, h))
            assert len(b) == 120
            same, total = same + len(a & b), total + len(a)
    assert same >= 0.97 * total, f"{same} of {total} rows kept by both"
    theirs.close()
    ours.close()
    scorer.close()


def the_scorer_of_a_policy_is_found(d, c):
    ours = fresh(c, scorer=None, name=NETWORK, dtype=torch.float16, b=budget(manual=True, policy="kvp"))
    assert ours.scorer.policy == "kvp"
    assert fresh(c, scorer=None, b=budget(manual=True, policy="random")).scorer is None


# ---- recall ------------------------------------------------------------------------------------------


def remember_all(cache):
    """As remember(), and what was recalled."""
    remember(cache)
    for layer in range(LAYERS):
        for h in range(KV):
            at = cache.recalled_at[layer, 0, h, : int(cache.fronts[layer, 0, h])].long().cpu()
            assert not KEPT[layer][h, at].any(), "a row is held and recalled"
            KEPT[layer][h, at] = True


def question(ours, ref, lo, hi):
    """One step of each. What the reference may see is known after ours; its rows of the step are always seen."""
    mine = MODEL(MY_IDS[:, lo:hi], past_key_values=ours).logits.cpu()
    assert ours.recalled_stood_still()
    remember_all(ours)
    for layer, see in KEPT.items():
        KEPT[layer] = see[:, :lo]
    return mine, REF(IDS[:, lo:hi], past_key_values=ref).logits


def recalling_everything_equals_a_full_cache(d, c):
    KEPT.clear()
    ours, ref = evicted(c, "random", b=(380, 2 * ROWS), recall_rows=300)
    assert counts(ours) == {80}, counts(ours)
    # 320 rows are missing, 300 come back: not everything yet
    mine = MODEL(MY_IDS[:, 400:420], past_key_values=ours).logits.cpu()
    assert set(ours.fronts.flatten().tolist()) == {300}, ours.fronts
    full = REF(IDS[:, 400:420], past_key_values=ref).logits
    assert (mine - full).abs().max() > 1e-3, "20 rows a head are missing and nothing shows it"
    ours.close()
    ours, ref = evicted(c, "random", b=(400, 2 * ROWS), recall_rows=320)
    for lo, hi in ((400, 420), (420, 421), (421, 422), (422, 450)):
        mine = MODEL(MY_IDS[:, lo:hi], past_key_values=ours).logits.cpu()
        close(mine, REF(IDS[:, lo:hi], past_key_values=ref).logits)


def partial_recall_equals_masks(d, c):
    KEPT.clear()
    ours, ref = evicted(c, "random", b=(160, 2 * ROWS), recall_rows=60)
    rows = set()
    for lo, hi in ((400, 420), (420, 421), (421, 422), (422, 450), (450, 451)):
        close(*question(ours, ref, lo, hi))
        assert set(ours.fronts.flatten().tolist()) == {60}, ours.fronts
        rows.add(tuple(ours.recalled_at.flatten().tolist()))
    assert len(rows) == 2, "a decode step keeps what its turn recalled, a question recalls anew"
    # a plan that brings some of the recalled rows up hides them in front
    ours.compress(budget(360, 2 * ROWS, policy="random", manual=True))
    assert ours.fronts.sum() < 60 * LANES
    close(*question(ours, ref, 451, 452))
    ours.end_turn()
    remember(ours)
    ask(ours, ref, 452, 453)


def recalled_rows_are_the_wanted_ones(d, c):
    """Against the exact choice: the share of the wanted rows' weight that came back."""
    KEPT.clear()
    ours, ref = evicted(c, "random", b=(140, 2 * ROWS), recall_rows=40,
                        recall_args={"flags": RECALL_ALONE, "probe": 1000})
    MODEL(MY_IDS[:, 400:404], past_key_values=ours)
    assert ours.recalled_stood_still()
    keys, kept = ref.layers[0].keys[0], [ours.positions(0, h) for h in range(KV)]
    attn = hf.MODEL.model.layers[0].self_attn
    store = {}
    handles = attention.capture_queries(hf.MODEL, store)
    hf.MODEL(IDS[:, 400:404], position_ids=torch.arange(400, 404)[None])
    [h.remove() for h in handles]
    for h in range(KV):
        below = torch.tensor([p for p in range(400) if p not in set(kept[h])])
        group = store[0][0, h * HEADS // KV : (h + 1) * HEADS // KV]
        x = group @ keys[h, :400].T * attn.scaling
        want = x.softmax(-1).amax((0, 1))[below]
        got = ours.recalled_at[0, 0, h, : int(ours.fronts[0, 0, h])].long().cpu()
        best = want.topk(40).values.sum()
        mine = want[torch.isin(below, got)].sum()
        assert mine >= 0.9 * best, f"head {h}: {mine / best:.3f} of the weight that the best 40 rows have"


def roll_back_forgets_later_rows(d, c):
    KEPT.clear()
    ours, ref = evicted(c, "random", b=(160, 2 * ROWS), recall_rows=60)
    close(*question(ours, ref, 400, 410))
    ours.truncate(250)
    ref.crop(-160)
    for layer in range(LAYERS):
        for h in range(KV):
            at = ours.recalled_at[layer, 0, h, : int(ours.fronts[layer, 0, h])]
            assert (at < 250).all(), at
    close(*question(ours, ref, 250, 251))
    close(*question(ours, ref, 251, 262))


# ---- generation --------------------------------------------------------------------------------------


def generate_accepts_the_cache(d, c):
    args = dict(max_new_tokens=4, do_sample=False, pad_token_id=0,  # later tokens of this model hang on rounding
                attention_mask=torch.ones(1, 200, dtype=torch.long))
    plain = hf.MODEL.generate(IDS[:, :200], **args)
    args["attention_mask"] = args["attention_mask"].to(DEV)
    assert torch.equal(MODEL.generate(MY_IDS[:, :200], past_key_values=fresh(c), **args).cpu(), plain)
    # with a budget that plans by itself while it generates
    args.update(max_new_tokens=24, attention_mask=torch.ones(1, 400, dtype=torch.long, device=DEV))
    auto = fresh(c, b=budget(96, 400, policy="random", slack=16), push_every=32)
    out = MODEL.generate(MY_IDS[:, :400], past_key_values=auto, **args)
    assert out.shape[1] == 424
    end = time.monotonic() + 10
    while auto.most > 200 and time.monotonic() < end:
        auto.poll()
        time.sleep(0.01)
    assert auto.most < 200 and max(counts(auto)) == auto.most, (auto.most, counts(auto))
    # a prompt that never fits whole
    small = fresh(c, b=budget(96, 400, policy="random", slack=16), cap=160, push_every=32)
    out = MODEL.generate(MY_IDS[:, :400], past_key_values=small, prefill_chunk_size=32, **args)
    assert out.shape[1] == 424 and small.seen == 423 and small.most <= 160, (small.seen, small.most)


def a_small_cache_waits_for_its_plans(d, c):
    """Many more rows than a lane has slots for: passes wait for the plans that make room."""
    KEPT.clear()
    ours = fresh(c, cap=160, stage=32, b=budget(64, ROWS, policy="random", slack=16), push_every=32)
    for i in range(0, 600, 24):
        MODEL(MY_IDS[:, i : i + 24], past_key_values=ours)
    assert ours.get_seq_length() == 600 and ours.most <= 160
    ours.settle()
    info = ours.info()
    assert sum(info["tier_rows"].values()) == 600 * LANES and info["dropped_rows"] == 0, info


def a_graph_equals_eager_steps(d, c):
    if not REAL:
        return "SKIP no GPU"
    ours, ref = evicted(c, "random")
    remember(ours)
    step = DecodeGraph(MODEL, ours)
    for i in range(400, 410):
        close(step(MY_IDS[:, i : i + 1]).cpu(), REF(IDS[:, i : i + 1], past_key_values=ref).logits)
    ours.compress(budget(60, 300, policy="random", manual=True))
    remember(ours)
    for i in range(410, 420):
        close(step(MY_IDS[:, i : i + 1]).cpu(), REF(IDS[:, i : i + 1], past_key_values=ref).logits)
    return None


def rows_in_memory_that_is_shared(d, c):
    """The cache in a pool; another mapping of it, as another process would make, sees the rows."""
    pools = []

    def tensor(pool):
        if REAL:
            return torch.as_tensor(pool, device=DEV)
        return torch.frombuffer((ctypes.c_uint8 * pool.nbytes).from_address(pool.addr), dtype=torch.uint8)

    def memory(nbytes):
        pools.append(Pool(GPU, nbytes))
        return tensor(pools[0])

    ours = fresh(c, memory=memory)
    run(MODEL, ours, MY_IDS[:, :300])
    rows = originals(ours)
    ours.compress(budget(100, 200, policy="random", manual=True))
    fd = pools[0].fd()
    other = Pool(GPU, pools[0].nbytes, fd=fd)
    os.close(fd)
    assert other.addr != pools[0].addr
    seen = tensor(other)[: ours.rows.nbytes].view(torch.float32).view(ours.rows.shape)
    assert torch.equal(seen[2, 0, 0, 1, :100], ours.layers[2].keys[0, 1, :100])
    ours.compress(budget(300, policy="random", manual=True))
    assert holds(ours, rows) == 300 * LANES
    assert torch.equal(seen[:, :, :, :, :300], ours.rows[:, :, :, :, :300])
    ours.close()
    del seen
    other.close()
    pools[0].close()


# ---- failure ------------------------------------------------------------------------------------------


def bad_input_is_one_line(d, c):
    for fn, word in ((lambda: fresh(c, b=budget(10, policy="nonesuch")), "nonesuch"),
                     (lambda: fresh(c, batch=2, key=os.urandom(16)), "batch"),
                     (lambda: MODEL(MY_IDS[:, :8].repeat(2, 1), past_key_values=fresh(c)), "batch"),
                     (lambda: MODEL(MY_IDS[:, :80], past_key_values=fresh(c, cap=64)), "cap"),
                     (lambda: Gpu(99), "device"),
                     (lambda: Gpu(0, kernels="/nonexistent/kernels"), "nonexistent")):
        refused(fn, word)


def daemon_killed_runtime_goes_on(d, c):
    KEPT.clear()
    ours, ref = evicted(c, "random")
    remember(ours)
    d.kill()
    t = time.monotonic()
    for i in range(400, 440):
        ask(ours, ref, i, i + 1)
    ours.push()
    ours.poll()
    ask(ours, ref, 440, 450)
    assert time.monotonic() - t < 20 and ours.detached
    d.start()
    end = time.monotonic() + 10
    while True:
        try:
            again = fresh(c)
            break
        except Error:
            assert time.monotonic() < end, "never reconnected"
            time.sleep(0.05)
    run(MODEL, again, MY_IDS[:, :100])
    again.compress(budget(32, 68, policy="random", manual=True))
    assert counts(again) == {32}


class FakeCounts(ctypes.Structure):
    """What the fake driver has in use, and what it objected to: struct fake_cuda_counts."""
    _fields_ = [(n, ctypes.c_uint64) for n in (
        "allocs", "bytes", "host_allocs", "registrations", "streams", "events", "modules", "contexts", "vmm_handles",
        "vmm_maps", "vmm_ranges", "kernels", "copies", "pageable", "waits", "queries", "alloc_calls", "violations",
        "queued")]

    @classmethod
    def now(cls):
        got = cls()
        DRIVER.fake_cuda_counts(ctypes.byref(got))
        return got


def nothing_is_left_behind(d, c):
    """After all those sequences, closed or dropped with their client."""
    if REAL:
        return "SKIP the driver of a real GPU does not tell"
    used, ours = FakeCounts.now(), fresh(c)
    assert FakeCounts.now().allocs > used.allocs and FakeCounts.now().registrations == 1
    ours.close()
    used = FakeCounts.now()
    assert used.violations == 0, f"{used.violations} addresses that are nobody's"
    assert used.registrations == used.vmm_maps == used.queued == 0, used.registrations
    assert used.allocs <= 1 + len(MEMORY), f"{used.allocs} allocations"  # the GPU's own
    return None


# ---- a real model, on a real GPU ----------------------------------------------------------------------


def smollm2_answers(d, c):
    """Greedily the same text without eviction; facts found again with a quarter of the rows on the device."""
    if not REAL:
        return "SKIP no GPU"
    import recall_real
    import tasks
    from kvtier import smollm2

    try:
        model, tok = smollm2.load()
    except FileNotFoundError as e:
        return f"SKIP {e}"
    model = model.to(DEV)
    words = tok("The harbour master walked along the quay and", return_tensors="pt").input_ids.to(DEV)
    args = dict(max_new_tokens=48, do_sample=False, pad_token_id=0)
    plain = model.generate(words, **args)
    model.set_attn_implementation("kvtier_cuda")
    ours = KvtierCudaCache(model.config, c, 512, name=smollm2.NAME, dtype=torch.float32, gpu=GPU, scorer=False,
                           budget=budget(manual=True, policy="random"))
    assert torch.equal(model.generate(words, past_key_values=ours, **args), plain)
    for p in model.parameters():  # half() refuses a model that came out of a quantised file
        p.data = p.data.half()
    item = tasks.build("docqa", 1500, random.Random("check/cuda"), recall_real.filler("", tok), tok)
    context = torch.tensor([item["context"]], device=DEV)
    kept, back = 250, 125
    hits = dict.fromkeys(("full", "drop-only", "recall"), 0)
    for arm in hits:
        room = back if arm == "recall" else 0
        cache = KvtierCudaCache(model.config, c, 2048, name=smollm2.NAME, dtype=torch.float16, gpu=GPU, stage=512,
                                recall_rows=room, budget=budget(manual=True, policy="kvp"))
        model(context, past_key_values=cache, logits_to_keep=1)
        if arm != "full":
            cache.compress(budget(kept + back, 2048, policy="kvp", manual=True))
            assert counts(cache) == {kept + back - room}
        for question, wanted in item["questions"]:
            start, got = cache.get_seq_length(), []
            ids = torch.tensor([list(question)], device=DEV)
            for _ in wanted:
                logits = cache.question(model, ids).logits if ids.shape[1] > 1 else \
                    model(ids, past_key_values=cache, logits_to_keep=1).logits
                got.append(int(logits[0, -1].argmax()))
                ids = torch.tensor([got[-1:]], device=DEV)
            hits[arm] += got == list(wanted)
            cache.end_turn()
            cache.truncate(start)
        cache.close()
    n = len(item["questions"])
    print(f"# of {n} questions right: " + ", ".join(f"{arm} {n}" for arm, n in hits.items()), flush=True)
    assert hits["full"] >= n - 1 and hits["recall"] >= hits["drop-only"], hits
    return None


TESTS = [no_eviction_equals_dynamic_cache, eviction_equals_masked_full_cache, second_plan_after_eviction,
         heads_hold_different_numbers_of_rows, roll_back, several_sequences_in_step, rows_come_back_bit_for_bit,
         rows_come_back_in_few_slots, write_through, fetch_by_hand, anything_in_any_order, save_leave_and_resume,
         the_network_ranks_as_the_daemon_does, the_scorer_of_a_policy_is_found,
         recalling_everything_equals_a_full_cache, partial_recall_equals_masks, recalled_rows_are_the_wanted_ones,
         roll_back_forgets_later_rows, generate_accepts_the_cache,
         a_small_cache_waits_for_its_plans, a_graph_equals_eager_steps, rows_in_memory_that_is_shared,
         bad_input_is_one_line, daemon_killed_runtime_goes_on, nothing_is_left_behind, smollm2_answers]


def weights(folder):
    """The models' weights that are there, and a random network for the tiny model."""
    models = os.path.join(HERE, "..", "..", "policy", "models")
    for f in os.listdir(models):
        if f.endswith(".kvp"):
            os.symlink(os.path.abspath(os.path.join(models, f)), os.path.join(folder, f))
    subprocess.run([str(build_dir() / "kvtier-weights"), "random", "--layers", str(LAYERS), "--heads", str(KV), "--dim",
                    str(hf.DIM), "--model", NETWORK, "--net", "narrow", "-o", os.path.join(folder, NETWORK + ".kvp")],
                   check=True, stdout=subprocess.DEVNULL)


def main():
    global GPU
    only = sys.argv[1:]
    tests = [t for t in TESTS if not only or t.__name__ in only]
    print(f"1..{len(tests)}")
    GPU = Gpu()
    if not REAL:  # as torch leaves it: the primary context is this thread's
        context = ctypes.c_void_p()
        assert DRIVER.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert DRIVER.cuCtxPushCurrent_v2(context) == 0
    print(f"# {GPU.info()['name']}, {HEADS} heads", flush=True)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="kvt.models.") as folder:
        weights(folder)
        with PrivateDaemon(dram="512M", nvme="512M", model_dir=folder) as d:
            for n, test in enumerate(tests, 1):
                start, why, failed = time.monotonic(), None, None
                try:
                    with Client(d.socket, name="check_cuda") as c:
                        why = test(d, c)
                except Exception:
                    failed = traceback.format_exc()
                gc.collect()
                while MEMORY:
                    assert DRIVER.cuMemFree_v2(MEMORY.pop()) == 0
                if failed is None:
                    print(f"ok {n} - {test.__name__} # {why or f'{time.monotonic() - start:.1f} s'}", flush=True)
                    continue
                bad += 1
                print(f"not ok {n} - {test.__name__}")
                print("# " + failed.replace("\n", "\n# "), flush=True)
                if d.proc.poll() is not None:
                    log = open(d.log).read()[-600:].replace("\n", "\n# ")
                    print(f"# kvtierd died with {d.proc.returncode}: {log}")
                    d.start()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
