# SPDX-License-Identifier: MIT
"""Searches of recall over a lane's demoted rows, batched over variants. Definitions: policy/recall.h.

B lanes at once (variants times KV heads): queries [B, n, d] scaled by 1/sqrt(d), keys [B, D, d] of demoted
rows in ascending position. Every search returns a score [B, D]: the `want` best rows are recalled.
"""
import math

import torch

TOKENS, GROUP, SPREAD, PROBE = 4, 32, 2.07, 0.25
QUEST = 16  # rows of a min/max block


def pick(q, count):
    """Last token's query and the farthest from those picked, per query head: q [B, G, F, d] → [B, G, TOKENS, d].

    count [B]: real tokens of each; a turn of fewer than TOKENS repeats its last token.
    """
    b, g, f, d = q.shape
    last = (count - 1)[:, None].expand(b, g)
    at = [last]
    real = torch.arange(f, device=q.device) < count[:, None, None]
    far = torch.full((b, g, f), float("inf"), device=q.device)
    for _ in range(1, TOKENS):
        one = q.gather(2, at[-1][..., None, None].expand(-1, -1, 1, d))
        far = torch.minimum(far, (q - one).square().sum(-1))
        nearest = far.masked_fill(~real, -1)
        best = nearest.argmax(-1)
        at.append(torch.where(nearest.gather(2, best[..., None])[..., 0] > 0, best, last))
    return q.gather(2, torch.stack(at, 2)[..., None].expand(-1, -1, -1, d))


def padded(k, size):
    """Groups of `size` packed rows: [B, groups, size, d] and which rows are real [groups, size]."""
    b, n, d = k.shape
    groups = math.ceil(n / size)
    real = (torch.arange(groups * size, device=k.device) < n).view(groups, size)
    k = torch.cat([k, k.new_zeros(b, groups * size - n, d)], 1).view(b, groups, size, d)
    return k, real


def summaries(k):
    """int8 centroids as dequantised [B, groups, d], and radii [B, groups]."""
    g, real = padded(k, GROUP)
    n = real.sum(-1)[:, None]
    c = g.sum(2) / n
    step = (c.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    c = (c / step).round().clamp(-127, 127) * step
    r = ((g - c[:, :, None]).square().sum(-1) * real).sum(-1) / n[:, 0]
    return c, r.sqrt()


def best_of_groups(bound):
    """B_g of bounds [B, n, groups]: each query's best group has 0."""
    return (bound - bound.amax(-1, keepdim=True)).amax(1)


def bounds(q, c, r):
    return q @ c.transpose(1, 2) + SPREAD / q.shape[-1] ** 0.5 * q.norm(dim=-1)[..., None] * r[:, None]


def rows(q, k, probed, resident, norm):
    """S_i over the probed rows [B, D], -inf elsewhere; resident [B, n]: log-sum-exp of the rows on the device."""
    s = (q @ k.transpose(1, 2)).masked_fill(~probed[:, None], float("-inf"))
    if norm == "mass":
        s = s - torch.logaddexp(s.logsumexp(-1), resident)[..., None]
    return s.amax(1)


def spread(score, near):
    """Each row takes the best score from `near` = (before, after) rows around it: what follows a hit comes along."""
    before, after = near
    if before + after == 0:
        return score
    padded_ = torch.nn.functional.pad(score[:, None], (after, before), value=float("-inf"))
    return torch.nn.functional.max_pool1d(padded_, before + after + 1, 1)[:, 0]


def two_stage(q, k, want, resident, norm):
    c, r = summaries(k)
    score = best_of_groups(bounds(q, c, r))
    groups = score.shape[1]
    probe = min(groups, max(math.ceil(groups * PROBE), math.ceil(4 * want / GROUP)))
    top = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(probe, 1).indices, True)
    return rows(q, k, top.repeat_interleave(GROUP, 1)[:, :k.shape[1]], resident, norm)


def exact(q, k, want, resident, norm):
    return rows(q, k, torch.ones(k.shape[:2], dtype=torch.bool, device=k.device), resident, norm)


def centroid(q, k, want, resident, norm):
    """Whole groups, best first by the two-stage search's bound; the last group by position."""
    c, r = summaries(k)
    return best_of_groups(bounds(q, c, r)).repeat_interleave(GROUP, 1)[:, :k.shape[1]]


def minmax(q, k, want, resident, norm):
    """Whole blocks of 16 rows by the largest logit that the channels' minima and maxima allow (Quest)."""
    g, real = padded(k, QUEST)
    low = g.masked_fill(~real[..., None], float("inf")).amin(2).transpose(1, 2)
    high = g.masked_fill(~real[..., None], float("-inf")).amax(2).transpose(1, 2)
    bound = q.clamp_min(0) @ high + q.clamp_max(0) @ low
    return best_of_groups(bound).repeat_interleave(QUEST, 1)[:, :k.shape[1]]


def cost(arm, demoted, want, dim, size=2):
    """Bytes a lane's search reads: (summaries, keys), and bytes it brings in."""
    groups, arm = math.ceil(demoted / GROUP), arm.partition("+")[0]
    if arm == "two-stage":
        probe = min(groups, max(math.ceil(groups * PROBE), math.ceil(4 * want / GROUP)))
        reads = groups * (dim + 8), probe * GROUP * dim * size
    elif arm in ("exact", "clean"):
        reads = 0, demoted * dim * size
    elif arm == "centroid":
        reads = groups * (dim + 8), 0
    elif arm == "minmax":
        reads = math.ceil(demoted / QUEST) * 2 * dim * size, 0
    else:
        reads = 0, 0
    return (*reads, want * 2 * dim * size)
