# SPDX-License-Identifier: MIT
"""kvtier for Python: the C ABI as objects. What needs torch has to be imported by name:

    kvtier.hf          KvtierCache, a Hugging Face cache
    kvtier.attention   attn_implementation="kvtier": recall, and heads that hold different numbers of rows
    kvtier.hf_cuda     KvtierCudaCache, the same for rows in GPU memory; kvtier.lanes: that memory without a daemon
    kvtier.attention_cuda  attn_implementation="kvtier_cuda": its attention, per-head lengths without a mask
    kvtier.cuda        the library's CUDA side alone; needs no torch
    kvtier.trace       record(model, dir): what a model's attention sees, as files to train policies with; no daemon
"""
from ._lib import LEASED, PLAN_DECIDED, PLAN_READY, ROWS_ALL, TIERS, Error
from .client import Client, Model, Region, Sequence, budget

__all__ = ["Client", "Model", "Region", "Sequence", "budget", "Error", "ROWS_ALL", "TIERS", "LEASED",
           "PLAN_DECIDED", "PLAN_READY"]
