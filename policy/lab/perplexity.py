# SPDX-License-Identifier: MIT
"""Long-range perplexity: what eviction costs on tokens that need what lies far back.

A document's first P rows are compressed once, the next F tokens teacher-forced. Long-range tokens are those
whose loss with the full context is lower by more than LONG nats than with the last WINDOW tokens only (the
window moves in steps of STEP: a token sees between WINDOW - STEP and WINDOW of what precedes it).
"""
import torch

import policies
import variants
from record import drive, read_samples

WINDOW, STEP, LONG = 256, 32, 0.1
BUDGETS = (0.1, 0.25, 0.5)
ADAPT = ("kvp", "best")  # with adaptive budgets too, once prepare has calibrated them


def documents(args):
    """Plain documents of the split with --shortest to --longest tokens, cut to the longest."""
    low, high = args.shortest or 2048 + 257, args.longest or 4096
    for s in read_samples(args.samples, args.split):
        if not s.get("task") and len(s["tokens"]) >= low:
            tokens = s["tokens"][:high]
            future = min(args.future, (len(tokens) - 1) // 4)
            yield {"id": s["id"], "source": s["source"], "domain": s["domain"], "tokens": tokens[:len(tokens)],
                   "prompt": len(tokens) - 1 - future, "future": future}


def windowed(net, tokens, first, count):
    """Loss of targets first + 1 ... first + count, each after at most WINDOW tokens."""
    out = []
    starts = range(first, first + count, STEP)
    ends = [min(s + STEP, first + count) for s in starts]
    hidden = net.prefill([tokens[e - WINDOW:e] for e in ends])[1]
    for s, e, h in zip(starts, ends, hidden):
        out.append(net.loss(h[-(e - s):], tokens[s + 1:e + 1])[0])
    return torch.cat(out)


def run(lab):
    net, args = lab.net, lab.args
    budgets = [float(b) for b in args.budgets.split(",")] if args.budgets else BUDGETS

    @torch.no_grad()
    def prepare(doc):
        p, f, tokens = doc["prompt"], doc["future"], doc["tokens"]
        whole, hidden = net.prefill(tokens[:p + f], queries=True)
        cache = whole.first(p)
        scores = lab.scores(cache)
        if lab.keeps("oracle"):
            scores["oracle"] = policies.future_attention(whole, whole.q[:, :, :, p:], p, p)[0]
        return cache, scores, hidden[p:]

    @torch.no_grad()
    def measure(doc, ready):
        cache, scores, hidden = ready
        p, f, tokens = doc["prompt"], doc["future"], doc["tokens"]
        target = tokens[p + 1:p + f + 1]
        full = net.loss(hidden, target)[0]
        long = windowed(net, tokens, p, f) - full > LONG
        masks = variants.build(lab, scores, budgets, adapt=ADAPT)
        nats = {}
        for names, h in variants.run(lab, cache, masks, [tokens[p:p + f]], p):
            for name, one in zip(names, h[:, 0]):
                loss = net.loss(one, target)[0]
                nats[name] = [round(float(loss[long].double().sum()), 5), round(float(loss.double().sum()), 4)]
        return {"id": doc["id"], "source": doc["source"], "domain": doc["domain"], "prompt": p, "tokens": f,
                "long": int(long.sum()), "full": [float(full[long].double().sum()), float(full.double().sum())],
                "nats": nats, "rows": variants.rows(masks), "bytes": variants.bytes_of(lab, masks)}

    docs = list(documents(args))[:args.n]
    return drive(lab, "perplexity", docs, prepare, measure)
