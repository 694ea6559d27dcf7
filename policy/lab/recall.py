# SPDX-License-Identifier: MIT
"""Recall arms at equal peak rows: the question comes after eviction, and rows of the prompt come back for it.

The device holds B rows of every lane. drop-only keeps the B best. The recall arms keep a share of them by the
same policy and, layer by layer in one pass, search the demoted rows with the turn's own queries (contaminated
by what is missing below) and bring in the rest of B before the layer attends. `clean` searches exactly with
the queries that the full cache would have given: what contamination costs. `seen` is snapkv that saw the
question and kept B rows. `full` keeps everything.

A question's queries find the row that answers, not the rows that continue it, which the answer's own queries
will want. Arms with "+near" therefore bring in what lies around a hit (search.spread); centroid and min/max
do so by nature, in whole blocks.
"""
import torch

import accuracy
import budgets
import compact
import items
import policies
import search
from record import drive

SEARCHES = {"centroid": search.centroid, "minmax": search.minmax, "exact": search.exact,
            "two-stage": search.two_stage, "clean": search.exact}
ARMS = ("drop-only", "random", "centroid", "minmax", "exact", "exact+near", "two-stage", "two-stage+near", "clean",
        "clean+near")
KEPT_SHARE, NEAR, NORM = 0.6, (8, 24), "mass"
NEARS = ((0, 0), (4, 12), (8, 24), (16, 16), (16, 48))  # rows before and after a hit, to choose from: "+near0" ...


class Recalling:
    """rows() of all arms and questions of one item: variant = arm * N + question."""

    def __init__(self, net, cache, scores, held, kept, near, norm, lengths, clean, truth, generator, arms=ARMS):
        self.net, self.cache, self.norm, self.arms, self.clean, self.near = net, cache, norm, arms, clean, near
        self.n = len(lengths)
        self.lengths = torch.tensor(lengths, device=net.device)
        self.want = held - kept
        self.dropped = indices(budgets.uniform(scores, held))
        keep = budgets.uniform(scores, kept)
        self.kept, self.demoted = indices(keep), indices(~keep)
        self.truth, self.generator = truth, generator
        self.mass = torch.zeros(len(arms), self.n, 3, device=net.device, dtype=torch.float64)

    def __call__(self, layer, q):
        kept, demoted = self.kept[layer], self.demoted[layer]
        index = []
        for a, arm in enumerate(self.arms):
            if arm == "drop-only":
                index.append(self.dropped[layer].expand(self.n, -1, -1))
                continue
            own = self.clean[layer] if arm.startswith("clean") else q[a * self.n:(a + 1) * self.n, 0]
            best = self.best(arm, layer, own)
            back = demoted.expand(self.n, -1, -1).gather(2, best)
            self.note(a, layer, back)
            index.append(torch.cat([kept.expand(self.n, -1, -1), back], 2))
        return *compact.gather(self.cache, layer, torch.cat(index)), None

    def best(self, arm, layer, q):
        """Places in `demoted` of the rows to bring in [N, H, want], for queries q [N, H, G, F, d]."""
        h, d = self.net.heads, self.net.dim
        demoted = self.demoted[layer]
        if arm == "random":
            score = torch.rand((self.n * h, demoted.shape[1]), generator=self.generator).to(q.device)
        else:
            picked = search.pick(q.flatten(0, 1), self.lengths.repeat_interleave(h)).flatten(1, 2) * d ** -0.5
            one = torch.arange(h, device=q.device)[:, None]
            k = self.cache.k[layer]
            on_device = k[one, self.kept[layer]].repeat(self.n, 1, 1)
            resident = (picked @ on_device.transpose(1, 2)).logsumexp(-1)
            name, _, near = arm.partition("+near")
            score = SEARCHES[name](picked, k[one, demoted].repeat(self.n, 1, 1), self.want, resident, self.norm)
            if name != arm:
                score = search.spread(score, NEARS[int(near)] if near else self.near)
        order = score.sort(dim=-1, descending=True, stable=True).indices[:, :self.want]
        return order.view(self.n, h, -1)

    def note(self, arm, layer, back):
        """True attention of the answer's queries: recalled, the most that as many rows could have, all demoted."""
        u = self.truth[:, layer]
        demoted = u.gather(2, self.demoted[layer].expand(self.n, -1, -1))
        parts = u.gather(2, back), demoted.topk(back.shape[2], -1).values, demoted
        self.mass[arm] += torch.stack([x.double().sum((1, 2)) for x in parts], 1)


def indices(mask):
    """Ascending rows of a mask [L, H, P] whose lanes hold equally many: [L, H, C]."""
    count = int(mask[0, 0].sum())
    return mask.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :count]


def true_attention(net, cache, asked, captured):
    """[N, L, H, P]: mean over the group, summed over the queries that predict the answer, full cache."""
    p, out = cache.k.shape[2], []
    for i, (question, _) in enumerate(asked.pairs):
        n, first = asked.lengths[i], len(question) - 1
        lanes = []
        for layer, (q, k, _) in enumerate(captured):
            keys = torch.cat([cache.k[layer], k[0, i][:, :n]], 1)[:, None]
            lanes.append(policies.attention(q[0, i][:, :, first:n], keys, p + first)[..., :p].mean(1).sum(1))
        out.append(torch.stack(lanes))
    return torch.stack(out)


def seen(net, cache, asked, captured, i, held):
    """Is the answer right when snapkv saw the question and kept `held` rows of the context?"""
    question, answer = asked.pairs[i]
    grown = accuracy.with_question(net, cache, asked, captured, i)
    p = cache.k.shape[2]
    scores = torch.stack([policies.snapkv(grown, layer) for layer in range(net.layers)])
    mask = torch.ones(scores.shape, dtype=torch.bool, device=net.device)
    mask[:, :, :p] = budgets.uniform(scores[:, :, :p], held)
    later = accuracy.Asked([(question[-1:], answer)], net.device)
    return later.right(net, net.extend(later.tokens, grown.k.shape[2], compact.Held(grown, mask[None])))[0][0]


def measure_item(lab, item, r, share, near, norm, base, arms=ARMS):
    """One record of an item that is accuracy.Ready."""
    net, args = lab.net, lab.args
    cache, asked, captured, n = r.cache, r.asked, r.captured, len(r.full)
    p = cache.k.shape[2]
    held = budgets.rows_of(args.device_budget, p)
    kept = max(budgets.FIRST + budgets.LAST, round(share * held))
    generator = torch.Generator().manual_seed(item["seed"])
    rows = Recalling(net, cache, r.scores[base], held, kept, near, norm, [len(q) for q, _ in asked.pairs],
                     [c[0][0] for c in captured], true_attention(net, cache, asked, captured), generator, arms)
    tokens = torch.tensor(asked.tokens).repeat(len(arms), 1)[:, None]
    hidden = net.extend(tokens, p, rows).view(len(arms), n, tokens.shape[-1], -1)
    hits = dict(zip(arms, asked.right(net, hidden)))
    hits["full"] = r.full
    if arms is ARMS:
        hits["seen"] = [seen(net, cache, asked, captured, i, held) for i in range(n)]
    lanes = net.layers * net.heads
    return {"id": item["id"], "task": item["task"], "source": item["source"], "length": p, "base": base,
            "held": held, "kept": kept, "near": near, "norm": norm, "hits": hits,
            "mass": {a: rows.mass[j].tolist() for j, a in enumerate(arms) if a != "drop-only"},
            "cost": {a: [lanes * x for x in search.cost(a, p - kept, held - kept, net.dim)] for a in arms
                     if a != "drop-only"}}


def run(lab):
    args, tuned = lab.args, lab.found.get("recall", {})
    share = args.kept_share or tuned.get("kept_share", KEPT_SHARE)
    near = [int(x) for x in args.near.split(",")] if args.near else tuned.get("near", NEAR)
    base = lab.wanted[0]

    @torch.no_grad()
    def measure(item, r):
        return measure_item(lab, item, r, share, near, args.norm or NORM, base)

    return drive(lab, "recall", items.build(lab), accuracy.prepared(lab), measure)
