# SPDX-License-Identifier: MIT
"""Adaptive against uniform budgets of equal total rows: KVP, the best heuristic (calibrated likewise), defensive."""
import torch

import accuracy
import items
from record import drive


def run(lab):
    args = lab.args
    shares = [float(b) for b in args.budgets.split(",")] if args.budgets else accuracy.BUDGETS

    @torch.no_grad()
    def measure(item, r):
        return accuracy.measure_item(lab, item, r, shares, adapt=lab.wanted, oracle=False)

    return drive(lab, "adaptive", items.build(lab), accuracy.prepared(lab, args.seen), measure)
