# SPDX-License-Identifier: MIT
"""Variants of one sample: {"policy@share": mask [L, H, P]}, and their continuation in as few forwards as fit."""
import torch

import budgets
import calibrate
import compact
import policies

KINDS = ("one", "value", "knock")  # of a lane's sensitivity: none, mean norm of its rows' values, measured


def adaptive_masks(lab, name, scores, rows):
    """Adaptive budgets of one policy: {label: mask}. defensive has its own form, the others calibrated scores."""
    if name == "defensive":
        return {"defensive+heads": budgets.heads(scores, rows, policies.WINDOW["defensive"])}
    maps, found = lab.found.get("maps-" + name.replace(":", "-")), lab.found
    if maps is None:
        return {}
    value, out = calibrate.value(maps, scores), {}
    chosen = found.get("sensitivity", {}).get(name)
    for kind in [chosen] if chosen else KINDS:
        weight = 1.0 if kind == "one" else found["sensitivity-" + kind][..., None]
        out[f"{name}+adaptive" + ("" if chosen else ":" + kind)] = budgets.spread(value * weight, scores, rows)
    return out


def build(lab, scores, shares, uniform=True, adapt=()):
    """Masks of every policy of `scores` at every budget; adapt: policies that also get adaptive ones."""
    masks = {}
    for share in shares:
        for name, s in scores.items():
            rows = budgets.rows_of(share, s.shape[-1])
            if uniform and lab.keeps(name):
                masks[f"{name}@{share:g}"] = budgets.uniform(s, rows, policies.WINDOW.get(name, 0))
            if name in adapt:
                masks.update((f"{label}@{share:g}", m) for label, m in adaptive_masks(lab, name, s, rows).items())
    return masks


def run(lab, cache, masks, tokens, start):
    """Continue every variant with tokens [N, F]: yields (names, hidden [V, N, F, hidden])."""
    names, every = list(masks), torch.stack(list(masks.values()))
    net = lab.net
    per_row = len(tokens) * net.heads * net.group * len(tokens[0])
    for take in compact.chunks(every, per_row, lab.args.limit):
        yield ([names[i] for i in take],
               net.extend(tokens, start, compact.Held(cache, every[take]), len(take)))


def rows(masks):
    """{name: mean rows of a lane}"""
    return {name: round(float(m.sum(-1).float().mean()), 2) for name, m in masks.items()}


def bytes_of(lab, masks):
    """{name: bytes that kvtier holds for it in fp16, whole pages}"""
    return {name: int(budgets.allocated(m, lab.net.dim)) for name, m in masks.items()}
