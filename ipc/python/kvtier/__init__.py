# SPDX-License-Identifier: MIT
"""kvtier for Python: the C ABI as objects. What needs torch has to be imported by name:

    kvtier.hf          KvtierCache, a Hugging Face cache
    kvtier.attention   attn_implementation="kvtier": recall, and heads that hold different numbers of rows
    kvtier.trace       record(model, dir): what a model's attention sees, as files to train policies with; no daemon
"""
from ._lib import LEASED, PLAN_DECIDED, PLAN_READY, ROWS_ALL, TIERS, Error
from .client import Client, Model, Region, Sequence, budget

__all__ = ["Client", "Model", "Region", "Sequence", "budget", "Error", "ROWS_ALL", "TIERS", "LEASED",
           "PLAN_DECIDED", "PLAN_READY"]
