# SPDX-License-Identifier: MIT
"""Task accuracy over budgets, the question seen at eviction or not.

Not seen: the context is compressed, then each question is asked of it. Seen: context and question but for its
last token are compressed together, then that token and the answer follow. An answer is right when every one
of its tokens is the most likely one after the gold tokens before it, which is when greedy decoding gives it.
"""
import torch

import compact
import items
import policies
import variants
from record import drive

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)


class Asked:
    """Questions and answers as one padded batch: tokens [N, F], and where each answer is predicted."""

    def __init__(self, pairs, device):
        self.pairs = pairs
        fed = [q + a[:-1] for q, a in pairs]
        width = max(map(len, fed))
        self.tokens = [f + [0] * (width - len(f)) for f in fed]  # padding comes last: causal, nobody sees it
        self.at = torch.zeros(len(pairs), max(len(a) for _, a in pairs), dtype=torch.long, device=device)
        self.gold, self.real = self.at.clone(), torch.zeros_like(self.at, dtype=torch.bool)
        for i, (q, a) in enumerate(pairs):
            self.at[i, :len(a)] = torch.arange(len(q) - 1, len(q) - 1 + len(a))
            self.gold[i, :len(a)] = torch.tensor(a)
            self.real[i, :len(a)] = True
        self.lengths = [len(f) for f in fed]

    def right(self, net, hidden):
        """[V][N] of 0 or 1 from hidden [V, N, F, hidden]."""
        h = hidden.gather(2, self.at[None, :, :, None].expand(len(hidden), -1, -1, hidden.shape[-1]))
        hit = net.loss(h, self.gold.expand(len(hidden), -1, -1))[1] | ~self.real
        return hit.all(-1).int().tolist()


def with_question(net, cache, asked, captured, i):
    """The cache after context and question i but for its last token, from the full cache's own forward."""
    n = len(asked.pairs[i][0]) - 1
    own = [[c[part][0, i][..., :n, :] for c in captured] for part in range(3)]
    q, k, v = (torch.stack(x) for x in own)
    return compact.Cache(torch.cat([cache.k, k], 2), torch.cat([cache.v, v], 2), torch.cat([cache.q, q], 3))


def utility_of(net, cache, asked, captured, questions):
    """Raw oracle: utility of the cache's rows for the given questions together, [L, H, P]."""
    total, p = 0, cache.k.shape[2]
    for i in questions:
        n = asked.lengths[i]
        q = torch.stack([c[0][0, i][..., :n, :] for c in captured])
        k = torch.stack([c[1][0, i][..., :n, :] for c in captured])
        both = compact.Cache(torch.cat([cache.k, k], 2), cache.v, None)
        total = total + policies.future_attention(both, q, p, p)[0]
    return total


def measure_item(lab, item, ready, shares, uniform=True, adapt=(), oracle=True):
    """One record. ready: (cache, scores) of the context."""
    net, args = lab.net, lab.args
    cache, scores = ready
    p = cache.k.shape[2]
    asked = Asked(item["questions"], net.device)
    captured = []
    full = asked.right(net, net.extend(asked.tokens, p, compact.Whole(cache), 1, captured))[0]
    record = {"id": item["id"], "task": item["task"], "source": item["source"], "length": p, "full": full}
    if oracle and lab.keeps("oracle"):
        scores = {**scores, "oracle": utility_of(net, cache, asked, captured, range(len(full)))}
    masks = variants.build(lab, scores, shares, uniform, adapt)
    record["rows"], record["bytes"] = variants.rows(masks), variants.bytes_of(lab, masks)
    hits = {}
    for names, hidden in variants.run(lab, cache, masks, asked.tokens, p):
        hits.update(zip(names, asked.right(net, hidden)))
    record["unseen"] = {n: hits[n] for n in masks}
    seen = {n: [] for n in masks}
    for i in range(min(args.seen, len(full))):
        question, answer = item["questions"][i]
        grown = with_question(net, cache, asked, captured, i)
        start = grown.k.shape[2]
        later = Asked([(question[-1:], answer)], net.device)
        more = lab.scores(grown, nonce=1 + i)
        if "oracle" in scores:
            own = []
            net.extend(later.tokens, start, compact.Whole(grown), 1, own)
            more["oracle"] = utility_of(net, grown, later, own, [0])
        for names, hidden in variants.run(lab, grown, variants.build(lab, more, shares, uniform, adapt), later.tokens,
                                          start):
            for name, hit in zip(names, later.right(net, hidden)):
                seen[name] += hit
    record["seen"] = seen if args.seen else {}
    return record


def prefilled(lab):
    """The function that prefills an item's context and scores its rows."""
    @torch.no_grad()
    def prepare(item):
        items.fill(lab, item)
        cache = lab.net.prefill(item["context"], queries=True)[0]
        return cache, lab.scores(cache)
    return prepare


def run(lab):
    args = lab.args
    shares = [float(b) for b in args.budgets.split(",")] if args.budgets else BUDGETS

    @torch.no_grad()
    def measure(item, ready):
        return measure_item(lab, item, ready, shares)

    return drive(lab, "accuracy", items.build(lab), prefilled(lab), measure)
