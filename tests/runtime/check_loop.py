#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The evaluation with the model in the loop against references, on a small random model. TAP.

References: transformers' own Llama (full cache); transformers with minus infinity on exactly the rows that a
variant does not hold (masks are eviction); plain loops for the searches of recall; enumeration for statistics.
"""
import hashlib
import itertools
import math
import os
import struct
import sys
import tempfile
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, "..", "..", "policy", "lab"), os.path.join(HERE, "..", "..", "ipc", "python")]

try:
    import numpy as np
    import torch
    from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
except ImportError as e:
    print(f"1..0 # SKIP {e.name} is not installed (make deps)")
    sys.exit(0)

import accuracy  # noqa: E402
import budgets  # noqa: E402
import calibrate  # noqa: E402
import compact  # noqa: E402
import policies  # noqa: E402
import recall  # noqa: E402
import record  # noqa: E402
import search  # noqa: E402
import sensitivity  # noqa: E402
import stats  # noqa: E402

torch.manual_seed(7)
torch.set_grad_enabled(False)
LAYERS, HEADS, KV, DIM, VOCAB, P, F = 3, 6, 2, 32, 97, 200, 9
KEPT = {}  # layer -> bool [KV, P]: what the reference may see of the prompt


def reference_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ k.transpose(-1, -2) * scaling
    nq, nk = scores.shape[-2:]
    see = (torch.arange(nk)[None] <= torch.arange(nk - nq, nk)[:, None])[None].repeat(query.shape[1], 1, 1)
    kept = KEPT.get(module.layer_idx)
    if kept is not None:
        see[:, :, :kept.shape[1]] &= kept.repeat_interleave(groups, 0)[:, None, :]
    out = scores.masked_fill(~see[None], float("-inf")).softmax(-1) @ v
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("kvtier_loop_reference", reference_attention)


def make_model(attn):
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=HEADS * DIM, intermediate_size=160, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV, head_dim=DIM, vocab_size=VOCAB, max_position_embeddings=1024,
        tie_word_embeddings=True, attn_implementation=attn, initializer_range=0.15)).eval()


MODEL, REF = make_model("sdpa"), make_model("kvtier_loop_reference")
NET = compact.Compact(MODEL)
IDS = torch.randint(0, VOCAB, (P + F,))
CACHE, HIDDEN = NET.prefill(IDS, queries=True)
PROMPT = CACHE.first(P)


def close(a, b, limit=1e-4):
    error = (a - b).abs().max().item()
    assert error < limit, f"differs by {error:.2g}, limit {limit:.2g}"


def reference_logits(kept, tokens=IDS):
    """Logits of the continuation by transformers, rows of the prompt masked as `kept` [L, KV, P] says."""
    KEPT.clear()
    cache = DynamicCache()
    REF(tokens[None, :P], past_key_values=cache)
    KEPT.update({i: kept[i] for i in range(LAYERS)})
    out = REF(tokens[None, P:], past_key_values=cache).logits[0]
    KEPT.clear()
    return out


def masks(count=3):
    """Variants of different budgets, one of them with unequal lanes."""
    g = torch.Generator().manual_seed(5)
    out = [budgets.uniform(torch.rand(LAYERS, KV, P, generator=g), rows) for rows in (64, 30, 100)[:count]]
    out[-1] = torch.rand(LAYERS, KV, P, generator=g) < torch.rand(LAYERS, KV, 1, generator=g) * 0.5 + 0.1
    out[-1][..., :4] = True
    return torch.stack(out)


def check_full():
    want = MODEL(IDS[None]).logits[0]
    close(HIDDEN @ NET.head.T, want)
    got = NET.extend(IDS[None, P:].tolist(), P, compact.Whole(PROMPT))[0, 0] @ NET.head.T
    close(got, want[P:])
    close(PROMPT.k[1], NET.prefill(IDS[:P])[0].k[1], 1e-5)


def check_masks_are_eviction():
    m = masks()
    hidden = NET.extend(IDS[None, P:].tolist(), P, compact.Held(PROMPT, m), len(m))
    for one, mask in zip(hidden[:, 0] @ NET.head.T, m):
        close(one, reference_logits(mask))
    full = MODEL(IDS[None]).logits[0, P:]
    assert (hidden[0, 0] @ NET.head.T - full).abs().max() > 1e-2, "evicting most rows must be noticed"


def check_chunks():
    m = masks()
    taken = list(compact.chunks(m, 54, 54 * 100))
    assert sorted(i for t in taken for i in t) == [0, 1, 2] and len(taken) > 1
    whole = NET.extend(IDS[None, P:].tolist(), P, compact.Held(PROMPT, m), len(m))
    for t in taken:
        close(NET.extend(IDS[None, P:].tolist(), P, compact.Held(PROMPT, m[t]), len(t)), whole[t], 1e-5)


def check_questions():
    """Several padded questions of several variants at once: each as if alone, and right exactly when greedy is."""
    m = masks(2)
    greedy = HIDDEN[P - 1:P + 3] @ NET.head.T
    pairs = [([5, 6, 7], [1, 2]), ([8], [3])]
    first = MODEL(torch.cat([IDS[:P], torch.tensor([9, 10])])[None]).logits[0, -1].argmax().item()
    second = MODEL(torch.cat([IDS[:P], torch.tensor([9, 10, first])])[None]).logits[0, -1].argmax().item()
    pairs += [([9, 10], [first, second]), ([9, 10], [first, (second + 1) % VOCAB]), ([9, 10], [first])]
    asked = accuracy.Asked(pairs, NET.device)
    full = NET.extend(asked.tokens, P, compact.Whole(PROMPT))
    assert asked.right(NET, full)[0][2:] == [1, 0, 1]
    many = NET.extend(asked.tokens, P, compact.Held(PROMPT, m), 2)
    for i, n in enumerate(asked.lengths):
        alone = NET.extend([asked.tokens[i][:n]], P, compact.Held(PROMPT, m), 2)
        close(many[:, i, :n], alone[:, 0], 1e-4)
    captured = []
    NET.extend(asked.tokens, P, compact.Whole(PROMPT), 1, captured)
    grown = accuracy.with_question(NET, PROMPT, asked, captured, 2)
    want = NET.prefill(IDS[:P].tolist() + [9], queries=True)[0]
    for a, b in zip(grown, want):
        close(a, b)
    assert greedy.isfinite().all()


def check_uniform():
    s = torch.rand(LAYERS, KV, P)
    m = budgets.uniform(s, 70)
    assert (m.sum(-1) == 70).all() and m[..., :4].all() and m[..., -16:].all()
    inner, kept = s[..., 4:-16], m[..., 4:-16]
    assert (inner.masked_fill(~kept, 2).amin(-1) >= inner.masked_fill(kept, -1).amax(-1)).all()
    assert budgets.uniform(s, 70, 32)[..., -32:].all()
    assert int(budgets.allocated(m[None], 64)) == LAYERS * KV * 2 * 3 * 4096, "70 rows of 128 bytes are 3 pages"


def check_adaptive():
    s, value = torch.rand(LAYERS, KV, P), torch.rand(LAYERS, KV, P)
    value[0] *= 100
    for m, floor in ((budgets.spread(value, s, 60), 24), (budgets.heads(value, 60), 20)):
        assert int(m.sum()) == LAYERS * KV * 60, "equal total rows"
        assert m[..., :4].all() and m[..., -16:].all() and (m.sum(-1) >= floor).all()
    m = budgets.spread(value, s, 60)
    assert (m[0].sum(-1) > 60).all() and (m[1:].sum(-1) < 60).all(), "rows go where the value is"


def check_pav():
    y, w = [3.0, 1.0, 2.0, 2.0, 5.0, 4.0], [1, 1, 2, 1, 1, 3]
    got = calibrate.pav(y, w)
    assert (np.diff(got) >= 0).all() and abs(np.dot(got, w) - np.dot(y, w)) < 1e-9
    cost = sum(wi * (a - b) ** 2 for a, b, wi in zip(got, y, w))
    for cut in itertools.product((0, 1), repeat=5):  # every way to pool neighbours
        groups = np.cumsum((0, *cut))
        fit = [np.average([y[i] for i in range(6) if groups[i] == g], weights=[w[i] for i in range(6) if groups[i] == g])
               for g in groups]
        if all(a <= b + 1e-12 for a, b in zip(fit, fit[1:])):
            assert cost <= sum(wi * (a - b) ** 2 for a, b, wi in zip(fit, y, w)) + 1e-9
    rng = np.random.default_rng(0)
    x = rng.normal(size=20000)
    knots, values = calibrate.fit(x, np.exp(x) + rng.normal(size=20000) * 0.1)
    at = np.array([-1.0, 0.0, 1.0, 2.0])
    assert np.abs(np.interp(at, knots, values) / np.exp(at) - 1).max() < 0.1


def check_calibrated_value():
    fits = calibrate.Fit(1)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        s = torch.randn(LAYERS, KV, 900, generator=g)
        fits.add(s, torch.exp(s) * 7 * (1 + torch.arange(KV)[:, None]), 7)
    maps = torch.from_numpy(fits.maps())
    s = torch.linspace(-1.5, 1.5, P).expand(LAYERS, KV, P)
    v = calibrate.value(maps, s)
    close(v / torch.exp(s), (1 + torch.arange(KV)[:, None]).expand(LAYERS, KV, P).float(), 0.25)


def check_policies():
    h2o = torch.stack([policies.h2o(PROMPT, i, 64) for i in range(LAYERS)])
    a = policies.attention(PROMPT.q[1], PROMPT.k[1][:, None], 0)
    close(a.sum(-1), torch.ones(KV, HEADS // KV, P), 1e-5)
    close(h2o[1], a.mean(1).sum(1) / torch.arange(P, 0, -1), 1e-5)
    close(policies.tova(PROMPT, 1)[0], a[:, :, -1].mean((0, 1)), 1e-6)
    top, mean = policies.future_attention(CACHE, CACHE.q[..., P:, :], P, P)
    whole = policies.attention(CACHE.q[2], CACHE.k[2][:, None], 0)[:, :, P:, :P]
    close(top[2], whole.amax(1).sum(1), 1e-5)
    close(mean[2], whole.mean(1).sum(1), 1e-5)
    snap = policies.snapkv(PROMPT, 0)
    plain = policies.attention(PROMPT.q[0], PROMPT.k[0][:, None], 0)[:, :, -64:].mean((1, 2))
    close(snap[:, 2:-2], sum(plain[:, i:P - 4 + i] for i in range(5)) / 5, 1e-6)


def check_pick():
    q = torch.randn(2, 3, 7, DIM)
    got = search.pick(q, torch.tensor([7, 2]))
    for g in range(3):
        picked = [q[0, g, 6]]
        for _ in range(3):
            far = [min((x - y).norm().item() for y in picked) for x in q[0, g]]
            picked.append(q[0, g, far.index(max(far))])
        close(got[0, g], torch.stack(picked), 1e-6)
    close(got[1, 0, :2], q[1, 0, [1, 0]], 1e-6)
    close(got[1, 0, 2:], q[1, 0, [1, 1]], 1e-6)


def check_search():
    """The two stages against loops over groups and rows, by the definitions of policy/recall.h."""
    d, n, want = 16, 300, 20
    q, k, on = torch.randn(1, 5, d), torch.randn(1, n, d) * 1.5, torch.randn(1, 5)
    groups = [range(i, min(i + 32, n)) for i in range(0, n, 32)]
    bound = []
    for rows in groups:
        mean = k[0, list(rows)].mean(0)
        step = mean.abs().max() / 127
        c = (mean / step).round() * step
        r = (k[0, list(rows)] - c).square().sum(-1).mean().sqrt()
        bound.append(q[0] @ c + 2.07 * q[0].norm(dim=-1) * r / math.sqrt(d))
    bound = torch.stack(bound, 1)
    score = (bound - bound.max(1, keepdim=True).values).max(0).values
    probed = sorted(score.topk(max(math.ceil(len(groups) * 0.25), math.ceil(4 * want / 32))).indices.tolist())
    rows = [i for g in probed for i in groups[g]]
    logits = q[0] @ k[0, rows].T
    s = (logits - torch.logaddexp(logits.logsumexp(1), on[0])[:, None]).max(0).values
    got = search.two_stage(q, k, want, on, "mass")[0]
    assert got.isfinite().nonzero()[:, 0].tolist() == rows
    close(got[rows], s, 1e-4)
    close(search.exact(q, k, want, on, "logit")[0], (q[0] @ k[0].T).max(0).values, 1e-4)
    one = torch.full((1, 30), float("-inf")).index_fill(1, torch.tensor([10]), 5.0)
    near = search.spread(one, (2, 6))[0]
    assert (near == 5).nonzero()[:, 0].tolist() == list(range(8, 17)), "2 rows before a hit and 6 after it"
    for arm in (search.minmax, search.centroid):
        got = arm(q, k, want, on, "mass")[0]
        assert got.shape == (n,) and (got[:16] == got[0]).all() and got.max() == 0


def recalling(held, kept, arms=recall.ARMS):
    """(Recalling of all arms and two questions after one pass, hidden [arms, 2, F, hidden], questions, their full)."""
    asked = accuracy.Asked([([5, 6, 7, 8, 9], [1, 2]), ([9, 10], [3])], NET.device)
    captured = []
    full = NET.extend(asked.tokens, P, compact.Whole(PROMPT), 1, captured)
    truth = recall.true_attention(NET, PROMPT, asked, captured)
    scores = torch.rand(LAYERS, KV, P, generator=torch.Generator().manual_seed(1))
    rows = recall.Recalling(NET, PROMPT, scores, held, kept, (2, 6), "mass", [5, 2], [c[0][0] for c in captured], truth,
                            torch.Generator().manual_seed(2), arms)
    tokens = torch.tensor(asked.tokens).repeat(len(arms), 1)[:, None]
    return rows, NET.extend(tokens, P, rows).view(len(arms), 2, tokens.shape[-1], -1), scores, full[0], asked


def check_recall():
    rows, hidden, scores, full, asked = recalling(80, 50)
    drop = NET.extend(asked.tokens, P, compact.Held(PROMPT, budgets.uniform(scores, 80)[None]))[0]
    close(hidden[0], drop)
    mass = rows.mass[1:]
    assert (mass[..., 0] <= mass[..., 1] + 1e-6).all() and (mass[..., 1] <= mass[..., 2] + 1e-6).all()
    arm = {a: i for i, a in enumerate(recall.ARMS)}
    assert (rows.mass[arm["exact"]] >= rows.mass[arm["random"], :, :1].expand(-1, 3) * torch.tensor([1, 0, 0])).all()
    q = NET.project(0, NET.embed[torch.tensor(asked.tokens)], P)[0]  # layer 0: nothing below is missing
    assert (rows.best("exact", 0, q) == rows.best("clean", 0, rows.clean[0])).all()
    one = rows.best("exact", 0, q)[1, 1]
    picked = search.pick(q[1, 1:2], torch.tensor([2]))[0].flatten(0, 1) * DIM ** -0.5
    k = PROMPT.k[0, 1]
    resident = (picked @ k[rows.kept[0, 1]].T).logsumexp(-1)
    s = picked @ k[rows.demoted[0, 1]].T
    s = (s - torch.logaddexp(s.logsumexp(-1), resident)[:, None]).amax(0)
    assert one.sort().values.tolist() == s.topk(30).indices.sort().values.tolist()


def check_recall_of_everything():
    """A budget of all rows: what was demoted comes back in every arm, and the full cache's output with it."""
    rows, hidden, _, full, _ = recalling(P, 120)
    for arm, one in zip(recall.ARMS, hidden):
        close(one, full)


def check_seen():
    """snapkv that saw the question and may keep all rows is the full cache."""
    asked = accuracy.Asked([([5, 6, 7], [1, 2])], NET.device)
    captured = []
    full = asked.right(NET, NET.extend(asked.tokens, P, compact.Whole(PROMPT), 1, captured))[0]
    assert recall.seen(NET, PROMPT, asked, captured, 0, P) == full[0]
    u = recall.true_attention(NET, PROMPT, asked, captured)[0]
    tokens = torch.cat([IDS[:P], torch.tensor([5, 6, 7, 1])])
    whole = NET.prefill(tokens, queries=True)[0]
    want = policies.future_attention(whole, whole.q[..., P + 2:, :], P + 2, P)[1]
    close(u, want)


def check_stats():
    assert abs(stats.mcnemar([1] * 6 + [0] * 2, [0] * 6 + [1] * 2)[2] - 2 * sum(math.comb(8, i) for i in range(3)) / 256) < 1e-12
    assert stats.holm([0.01, 0.04, 0.03]).tolist() == [0.03, 0.06, 0.06]
    assert all(math.isnan(x) for x in stats.share(["a", "b"], [1, 2], [-1, 0])), "no loss: no share of it"
    assert stats.share(["a", "b"], [1, 2], [2, 4])[:2] == (0.5, 0.5)
    rng = np.random.default_rng(3)
    cover = 0
    for i in range(100):
        c = np.repeat(np.arange(40), 5)
        x = rng.normal(size=40).repeat(5) + rng.normal(size=200) + 0.5
        value, low, high, p = stats.mean(c, x, i)
        cover += low <= 0.5 <= high
        assert abs(value - x.mean()) < 1e-9
    assert 86 <= cover <= 100, f"{cover} of 100 intervals of a clustered mean cover it"


def check_sensitivity():
    """A patched table is read back where policy/calibrate.h puts it; other bytes stay; the digest is right."""
    lanes, lengths, distances, knots = 6, 3, 2, 4
    table = np.zeros(6 + 2 + 1 + lanes * (1 + lengths * distances * 2 * knots), "<f4")
    table[:6] = 4407628, 1, lanes, knots, lengths, distances
    table[9::49] = 1
    header = bytearray(256)
    header[:8] = b"KVTIERWT"
    struct.pack_into("<QQ", header, 200, 256, table.nbytes)
    image = bytes(header) + table.tobytes()
    got = sensitivity.patched(image, [1, 2, 3, 4, 5, 9])
    new = np.frombuffer(got, "<f4", offset=256)
    assert new[9::49].tolist() == [0.25, 0.5, 0.75, 1, 1.25, 2.25]
    assert (new != table).sum() == 5 and got[56:256] == image[56:256]
    assert got[24:56] == hashlib.sha256(got[56:]).digest()
    for bad, values in ((image, [1, 2]), (bytes(header[:200]) + bytes(56), [1] * 6), (b"x" + image[1:], [1] * 6)):
        try:
            sensitivity.patched(bad, values)
        except ValueError:
            continue
        raise AssertionError("a file without such a table must be refused")


def check_results():
    with tempfile.TemporaryDirectory(prefix="kvtier-loop-") as d:
        path = os.path.join(d, "x.jsonl")
        r = record.Results(path)
        r.add({"id": "a"})
        r.add({"id": "b"})
        with open(path, "ab") as f:
            f.write(b'{"id":"c","cut":')
        r = record.Results(path)
        assert r.done == {"a", "b"}, r.done
        r.add({"id": "c"})
        with open(path) as f:
            assert [line.strip() for line in f] == ['{"id":"a"}', '{"id":"b"}', '{"id":"c"}']
    assert list(record.ahead(range(5), lambda i: i * i)) == [(i, i * i) for i in range(5)]


def main():
    checks = [(n[6:].replace("_", " "), f) for n, f in globals().items() if n.startswith("check_")]
    print(f"1..{len(checks)}")
    failed = 0
    for i, (name, f) in enumerate(checks, 1):
        try:
            f()
            print(f"ok {i} - {name}", flush=True)
        except Exception:
            failed += 1
            print(f"not ok {i} - {name}")
            print("".join("# " + line + "\n" for line in traceback.format_exc().splitlines()), end="", flush=True)
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
