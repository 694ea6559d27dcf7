# SPDX-License-Identifier: MIT
"""Intervals and tests: everything is paired by item and resampled by cluster (the document a text came from)."""
import math

import numpy as np

DRAWS, LEVEL = 4000, 0.95


def by_cluster(clusters, *columns):
    """Sums of each column per cluster: [columns, clusters]."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.stack([np.bincount(index, np.asarray(c, float)) for c in columns])


def ratio(clusters, top, bottom, seed=0, draws=DRAWS):
    """sum(top) / sum(bottom), its interval, and the two-sided bootstrap p of 0. (value, low, high, p)

    Clustered bootstrap: clusters are drawn with replacement, percentile interval.
    """
    t, b = by_cluster(clusters, top, bottom)
    if b.sum() <= 0:  # nothing to be a share of
        return math.nan, math.nan, math.nan, math.nan
    pick = np.random.default_rng(seed).multinomial(len(t), np.full(len(t), 1 / len(t)), draws)
    bottoms = pick @ b
    r = (pick @ t)[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.quantile(r, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    beyond = min((r <= 0).mean(), (r >= 0).mean())
    return t.sum() / b.sum(), low, high, min(1.0, 2 * (beyond * len(r) + 1) / (len(r) + 1))


def mean(clusters, x, seed=0):
    return ratio(clusters, x, np.ones(len(x)), seed)


def share(clusters, top, bottom, seed=0, draws=DRAWS):
    """A ratio of two differences (a share recovered): (value, low, high); wide or nan when the bottom may be 0."""
    value, low, high, _ = ratio(clusters, top, bottom, seed, draws)
    return value, low, high


def mcnemar(a, b):
    """Exact two-sided McNemar test of paired booleans: (only a, only b, p)."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 0, 0, 1.0
    tail = math.fsum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2))
                     for i in range(k + 1))
    return only_a, only_b, min(1.0, 2 * tail)


def holm(p):
    """Holm's step-down adjustment of a family of p-values."""
    p = np.asarray(p, float)
    order, worst, out = np.argsort(p), 0.0, np.empty(len(p))
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out
