# SPDX-License-Identifier: MIT
"""Calibrated scores: per lane, isotonic regression of a row's utility per future query on its score.

Bucketed by the length of the prompt and the distance to its end; 64 knots a map, linear between them, flat
outside. The value that adaptive budgets compare across lanes is calibrated utility times the lane's
sensitivity: what the model's output loses (KL, nats) per unit of attention that the lane loses.
"""
import numpy as np
import torch

from budgets import FIRST, LAST, uniform
from compact import Held, Whole, chunks

KNOTS, BINS, ENOUGH = 64, 512, 2048
LENGTHS = (768, 1536, 3072)  # bounds of the length buckets, rows
DISTANCES = (64, 256, 1024)  # bounds of the distance buckets, rows to the end
SAMPLE = 768                 # rows of a sample and lane that are kept for the fit
KNOCK = 0.25                 # budget of the one lane that is evicted to measure sensitivity


def pav(y, w):
    """Weighted isotonic (not decreasing) fit of y by pooling adjacent violators."""
    value, weight, count = [], [], []
    for yi, wi in zip(y, w):
        value.append(float(yi))
        weight.append(float(wi))
        count.append(1)
        while len(value) > 1 and value[-2] >= value[-1]:
            total = weight[-2] + weight[-1]
            value[-2:] = [(value[-2] * weight[-2] + value[-1] * weight[-1]) / total]
            weight[-2:], count[-2:] = [total], [count[-2] + count[-1]]
    return np.repeat(value, count)


def fit(score, utility):
    """(scores, utilities) at KNOTS ascending knots: rows binned by score quantile, then PAV."""
    order = np.argsort(score, kind="stable")
    parts = np.array_split(order, min(BINS, len(order)))
    x = np.array([score[p].mean() for p in parts])
    y = pav([utility[p].mean() for p in parts], [len(p) for p in parts])
    at = (len(x) - 1) * (1 - (1 - np.linspace(0, 1, KNOTS)) ** 2)  # finer towards the high scores
    x, y = (np.interp(at, np.arange(len(x)), z) for z in (x, y))
    return x.astype(np.float32), y.astype(np.float32)


def length_bucket(prompt):
    return int(np.searchsorted(LENGTHS, prompt, side="right"))


class Fit:
    """Collects rows of calibration samples, then fits. One policy."""

    def __init__(self, seed=0):
        self.rng, self.rows = np.random.default_rng(seed), []

    def add(self, scores, mean_utility, queries):
        """scores and the summed mean utility [L, H, P] of `queries` future queries; protected rows are left out."""
        p = scores.shape[-1]
        at = np.sort(self.rng.permutation(p - FIRST - LAST)[:SAMPLE]) + FIRST
        index = torch.from_numpy(at).to(scores.device)
        s, u = (x.flatten(0, 1)[:, index].cpu().numpy() for x in (scores, mean_utility / queries))
        self.rows.append((s, u, p - 1 - at, np.full(len(at), length_bucket(p))))

    def maps(self):
        """Knots [lanes, lengths, distances, 2, KNOTS]; thin buckets take the map of all lengths, then of all rows."""
        s, u = (np.concatenate([r[i] for r in self.rows], 1) for i in (0, 1))
        far, length = (np.concatenate([r[i] for r in self.rows]) for i in (2, 3))
        far = np.searchsorted(DISTANCES, far, side="right")
        out = np.empty((len(s), len(LENGTHS) + 1, len(DISTANCES) + 1, 2, KNOTS), np.float32)
        for j in range(out.shape[2]):
            near = far == j
            for i in range(out.shape[1]):
                pick = next((m for m in (near & (length == i), near) if m.sum() >= ENOUGH), np.ones(len(far), bool))
                for lane in range(len(s)):
                    out[lane, i, j] = fit(s[lane, pick], u[lane, pick])
        return out


def value(maps, scores):
    """Calibrated utility per future query [L, H, P] of scores, by maps (a tensor on the scores' device)."""
    p = scores.shape[-1]
    far = torch.arange(p - 1, -1, -1, device=scores.device)
    bucket = torch.bucketize(far, torch.tensor(DISTANCES, device=scores.device), right=True)
    s, out = scores.flatten(0, 1).contiguous(), torch.empty_like(scores).flatten(0, 1)
    by_distance = maps[:, length_bucket(p)]
    for j in range(by_distance.shape[1]):
        at = (bucket == j).nonzero()[:, 0]
        if len(at) == 0:
            continue
        x, y = by_distance[:, j, 0].contiguous(), by_distance[:, j, 1].contiguous()
        z = s[:, at].contiguous()
        i = torch.searchsorted(x, z).clamp(1, KNOTS - 1)
        x0, x1, y0, y1 = (t.gather(1, k) for t, k in ((x, i - 1), (x, i), (y, i - 1), (y, i)))
        out[:, at] = y0 + (y1 - y0) * ((z - x0) / (x1 - x0).clamp_min(1e-30)).clamp(0, 1)
    return out.view(scores.shape)


def knock(net, cache, scores, tokens, start, mean_utility, limit):
    """(KL, attention evicted), each [L, H] per future query, when one lane alone is cut to KNOCK of its rows."""
    layers, h, p = scores.shape
    kept = uniform(scores, max(FIRST + LAST + 1, round(KNOCK * p)))
    full = torch.ones(layers * h, layers, h, p, dtype=torch.bool, device=scores.device)
    for lane in range(layers * h):
        full[lane, lane // h, lane % h] = kept[lane // h, lane % h]
    f = len(tokens)
    base = (net.extend([tokens], start, Whole(cache))[0, 0] @ net.head.T).log_softmax(-1)
    kl = torch.empty(layers * h, device=scores.device)
    for take in chunks(full, h * net.group * f, limit):
        hidden = net.extend([tokens], start, Held(cache, full[take]), len(take))[:, 0]
        for i, one in zip(take, hidden):
            z = (one @ net.head.T).log_softmax(-1)
            kl[i] = (base.exp() * (base - z)).sum(-1).mean()
    lost = (mean_utility * ~kept).sum(-1) / f
    return kl.view(layers, h), lost


def sensitivity(kl, lost):
    """Per lane, from sums over samples: KL per unit of attention, half of it the layer's mean (samples are few)."""
    lane = kl / lost.clamp_min(1e-9)
    layer = (kl.sum(1, keepdim=True) / lost.sum(1, keepdim=True).clamp_min(1e-9)).expand_as(lane)
    return ((lane + layer) / 2).clamp_min(1e-9)
