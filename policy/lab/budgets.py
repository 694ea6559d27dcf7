# SPDX-License-Identifier: MIT
"""From scores [L, H, P] to rows kept, bool [L, H, P]: uniform budgets, and adaptive ones of equal total rows."""
import math

import torch

FIRST, LAST = 4, 16  # protected rows of the prompt, inside the budget, for every policy
FEWEST = 64          # rows: smaller budgets are not a case worth measuring
FLOOR, FLOOR_SHARE = 24, 0.25  # an adaptive lane keeps at least max(24 rows, 25 % of uniform)
HEAD_FLOOR = 0.2     # of uniform: the safeguard of defensive's own head-adaptive form
PAGE = 4096


def rows_of(share, prompt):
    """Rows a lane holds at a budget that is a share of the prompt."""
    return min(prompt, max(FEWEST, round(share * prompt)))


def protect(scores, window=0):
    """A copy with the protected rows, and `window` recent ones, above everything else."""
    s = scores.clone()
    top = torch.finfo(s.dtype).max
    if window > LAST:
        p = s.shape[-1]
        s[..., p - min(window, p):] = top / 4 * (1 + torch.arange(min(window, p), device=s.device) / p)
    s[..., :FIRST] = top
    s[..., -LAST:] = top
    return s


def uniform(scores, rows, window=0):
    """The `rows` best rows of every lane; ties go to the older row."""
    order = protect(scores, min(window, rows // 2)).sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order[..., :rows], True)


def heads(scores, rows, window=0):
    """Budgets shared by the heads of a layer (as in Ada-KV): HEAD_FLOOR of uniform each, the rest by score."""
    layers, h, p = scores.shape
    floor = max(FIRST + LAST, math.ceil(HEAD_FLOOR * rows))
    window = min(window, floor)
    s = protect(scores, window)
    s = torch.where(uniform(scores, floor, 2 * window), torch.finfo(s.dtype).max, s)
    order = s.flatten(1).sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros(layers, h * p, dtype=torch.bool, device=s.device)
    return mask.scatter_(-1, order[:, :h * rows], True).view(layers, h, p)


def spread(value, scores, rows):
    """One global choice over calibrated value [L, H, P], each lane keeping its floor by score: L * H * rows in all."""
    floor = min(rows, max(FLOOR, math.ceil(FLOOR_SHARE * rows)))
    s = torch.where(uniform(scores, floor), torch.finfo(value.dtype).max, value)
    order = s.flatten().sort(dim=0, descending=True, stable=True).indices
    mask = torch.zeros(s.numel(), dtype=torch.bool, device=s.device)
    mask[order[:s.shape[0] * s.shape[1] * rows]] = True
    return mask.view(s.shape)


def allocated(mask, dim, size=2):
    """Bytes of the pages that hold the rows of mask [.., L, H, P]: a K and a V plane per lane, rows of dim * size."""
    pages = (mask.sum(-1) * dim * size + PAGE - 1) // PAGE
    return (2 * PAGE * pages).flatten(-2).sum(-1)
