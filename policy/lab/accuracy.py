# SPDX-License-Identifier: MIT
"""Task accuracy over budgets, the question seen at eviction or not.

Not seen: the context is compressed, then each question is asked of it. Seen: context and question but for its
last token are compressed together, then that token and the answer follow. An answer is right when every one
of its tokens is the most likely one after the gold tokens before it, which is when greedy decoding gives it.
"""
from typing import NamedTuple

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


class Ready(NamedTuple):
    """An item prefilled: its context's cache and scores, its questions under the full cache, and with them seen."""
    cache: compact.Cache
    scores: dict
    asked: Asked
    full: list      # is each question right with the full cache
    captured: list  # (q, k, v) of the questions per layer, full cache
    seen: list      # (cache of context and question, scores), for the first questions


def ready(lab, item, seen=0):
    net = lab.net
    items.fill(lab, item)
    cache = net.prefill(item["context"], queries=True)[0]
    asked, captured = Asked(item["questions"], net.device), []
    full = asked.right(net, net.extend(asked.tokens, cache.k.shape[2], compact.Whole(cache), 1, captured))[0]
    grown = [with_question(net, cache, asked, captured, i) for i in range(min(seen, len(full)))]
    return Ready(cache, lab.scores(cache), asked, full, captured,
                 [(g, lab.scores(g, nonce=1 + i)) for i, g in enumerate(grown)])


def prepared(lab, seen=0):
    """ready() for drive()."""
    @torch.no_grad()
    def prepare(item):
        return ready(lab, item, seen)
    return prepare


def measure_item(lab, item, r, shares, uniform=True, adapt=(), oracle=True):
    """One record of an item that is Ready."""
    net, p = lab.net, r.cache.k.shape[2]
    oracle = oracle and lab.keeps("oracle")
    scores = dict(r.scores)
    if oracle:
        scores["oracle"] = utility_of(net, r.cache, r.asked, r.captured, range(len(r.full)))
    masks = variants.build(lab, scores, shares, uniform, adapt)
    hits = {}
    for names, hidden in variants.run(lab, r.cache, masks, r.asked.tokens, p):
        hits.update(zip(names, r.asked.right(net, hidden)))
    seen = {n: [] for n in masks} if r.seen else {}
    for i, (grown, more) in enumerate(r.seen):
        question, answer = item["questions"][i]
        start, later = grown.k.shape[2], Asked([(question[-1:], answer)], net.device)
        if oracle:
            own = []
            net.extend(later.tokens, start, compact.Whole(grown), 1, own)
            more = {**more, "oracle": utility_of(net, grown, later, own, [0])}
        for names, hidden in variants.run(lab, grown, variants.build(lab, more, shares, uniform, adapt), later.tokens,
                                          start):
            for name, hit in zip(names, later.right(net, hidden)):
                seen[name] += hit
    return {"id": item["id"], "task": item["task"], "source": item["source"], "length": p, "full": r.full,
            "rows": variants.rows(masks), "bytes": variants.bytes_of(lab, masks),
            "unseen": {n: hits[n] for n in masks}, "seen": seen}


def run(lab):
    args = lab.args
    shares = [float(b) for b in args.budgets.split(",")] if args.budgets else BUDGETS

    @torch.no_grad()
    def measure(item, r):
        return measure_item(lab, item, r, shares)

    return drive(lab, "accuracy", items.build(lab), prepared(lab, args.seen), measure)
