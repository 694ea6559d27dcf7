# SPDX-License-Identifier: MIT
"""An attention function for transformers that knows which rows each KV head holds.

    kvtier.attention.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="kvtier")
    cache = KvtierCache(model.config, client, max_rows, recall_rows=64, budget=...)

Right before a layer attends to a question it asks the daemon for the demoted rows that the question's queries want
(`KvtierCache(recall_rows=...)`), and attends over kept, recalled and own rows in one pass. Heads may hold different
numbers of rows (`equal_lanes=False`). Batches of one, causal, no padding; with any other cache it is plain causal
attention.
"""
import threading

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "kvtier"
_here = threading.local()


def register():
    """Make attn_implementation="kvtier" known to transformers. No mask function is registered on purpose: transformers
    then builds none, and this module makes its own from what the cache holds. May be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


def arrived(layer, keys):
    """This thread's newest rows went to a kvtier layer, which handed out `keys`."""
    _here.layer, _here.keys = layer, keys


def _layer_of(module, key):
    """The kvtier layer behind this call's keys, or None."""
    layer, keys = getattr(_here, "layer", None), getattr(_here, "keys", None)
    _here.layer = _here.keys = None
    if layer is None or keys is None or keys.data_ptr() != key.data_ptr() or layer.index != module.layer_idx:
        return None
    return layer


def _causal(n, total, device):
    """Query i sees everything but the rows after it; None when there is nothing to hide."""
    if n == 1:
        return None
    row = torch.arange(total, device=device)
    return (row[None] <= row[total - n :, None])[None, None]


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    layer = _layer_of(module, key)
    n = query.shape[2]
    if layer is None:
        mask = _causal(n, key.shape[2], query.device)
    else:
        layer.cache.ask(layer, query, scaling)
        key, value = layer.keys, layer.values
        mask = visible(layer, n, query.shape[1])
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling,
                                       enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).contiguous(), None


def visible(layer, n, heads):
    """What the newest n rows of a layer may see of its keys, for `heads` query heads; None: everything. Per KV head,
    by slot: recalled rows lie before slot 0, kept and own rows from there on, the newest n of them causal."""
    front, most = layer.front, layer.slots
    equal = min(layer.counts) == most and (front == 0 or bool(layer.recalled.all()))
    if equal:
        return layer.cache.shared_mask(n, front + most)
    slot = torch.arange(-front, most)
    own = torch.tensor(layer.counts)[:, None] - n + 1 + torch.arange(n)  # [KV heads, n]: slots below are seen
    see = (slot >= 0) & (slot < own[:, :, None])
    if front:
        see[:, :, :front] = layer.recalled[:, None]
    return see.repeat_interleave(heads // len(layer.counts), 0)[None]


def capture_queries(model, store):
    """Hooks that leave each layer's queries after RoPE in store[layer], [1, heads, tokens, head_dim], for models whose
    attention is not ours: modules with q_proj that get position_embeddings (Llama and its relatives). Returns the
    handles."""

    def rotate_half(x):
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    def before(module, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
        q = module.q_proj(hidden).view(*hidden.shape[:-1], -1, module.head_dim)
        if getattr(module, "q_norm", None) is not None:
            q = module.q_norm(q)
        q = q.transpose(1, 2)
        store[module.layer_idx] = q * cos.unsqueeze(1) + rotate_half(q) * sin.unsqueeze(1)

    found = [m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "layer_idx") and hasattr(m, "head_dim")]
    if not found:
        raise ValueError("model: no attention module with q_proj, layer_idx and head_dim to take queries from")
    return [m.register_forward_pre_hook(before, with_kwargs=True) for m in found]
