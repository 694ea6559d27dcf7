# SPDX-License-Identifier: MIT
"""kvtier for Python: the C ABI as objects, and a Hugging Face cache in `kvtier.hf` (imports torch)."""
from ._lib import LEASED, PLAN_DECIDED, PLAN_READY, ROWS_ALL, TIERS, Error
from .client import Client, Model, Region, Sequence, budget

__all__ = ["Client", "Model", "Region", "Sequence", "budget", "Error", "ROWS_ALL", "TIERS", "LEASED",
           "PLAN_DECIDED", "PLAN_READY"]
