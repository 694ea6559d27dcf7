# SPDX-License-Identifier: MIT
"""What the attention heads of a model see: K, V and Q of every layer after RoPE, and the utilities of cached rows.

Works with any Hugging Face model that goes through the attention interface with one head size and no windows. One
Capture at a time per process; not for several threads.
"""
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

_active = None


def _attention(module, query, key, value, mask, scaling=None, **_):
    return _active.attend(module, query, key, value, scaling), None


AttentionInterface.register("kvtier_capture", _attention)


class Capture:
    """model: in evaluation mode, on its device. Tensors returned are float16, on the model's device."""

    def __init__(self, model, scores_bytes=None):
        global _active
        cfg = model.config.get_text_config(decoder=True)
        self.model, self.device = model, next(model.parameters()).device
        self.layers, self.heads = cfg.num_hidden_layers, cfg.num_key_value_heads
        self.group = cfg.num_attention_heads // self.heads
        self.dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
        self.theta = float((getattr(cfg, "rope_parameters", None) or {}).get("rope_theta", 10000.0))
        self.scores_bytes = scores_bytes or (3 << 30 if self.device.type == "cuda" else 64 << 20)
        wo = torch.stack([b.self_attn.o_proj.weight.detach().float() for b in model.model.layers])
        wo = wo.view(self.layers, -1, self.heads, self.group * self.dim)
        self.gram = torch.einsum("lohx,lohy->lhxy", wo, wo).contiguous()  # [layers, heads, group * dim, group * dim]
        g = self.gram.view(self.layers, self.heads, self.group, self.dim, self.group, self.dim)
        self._head_gram = torch.stack([g[:, :, i, :, i] for i in range(self.group)], 2)
        self.k = self.v = self.q = self.prefix = None
        _active = self

    def attend(self, module, query, key, value, scaling):
        layer, (n, _, rows, _) = module.layer_idx, query.shape
        self.q[:, layer], self.k[:, layer], self.v[:, layer] = query, key, value
        dtype = query.dtype
        if query.is_cuda:  # as stored; float32 has no fast kernel
            query, key, value = query.half(), key.half(), value.half()
        if self.prefix is None:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        else:
            key, value = (torch.cat([x[layer].to(y.dtype).expand(n, -1, -1, -1), y], 2)
                          for x, y in zip(self.prefix, (key, value)))
            before = key.shape[2] - rows
            mask = torch.ones(rows, before + rows, dtype=torch.bool, device=self.device).tril(before)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).to(dtype).contiguous()

    def _run(self, ids, first):
        def room(heads):
            return torch.empty(n, self.layers, heads, rows, self.dim, dtype=torch.float16, device=self.device)

        n, rows = ids.shape
        self.k, self.v, self.q = room(self.heads), room(self.heads), room(self.heads * self.group)
        old = self.model.config._attn_implementation
        self.model.config._attn_implementation = "kvtier_capture"
        try:
            with torch.inference_mode():
                self.model.model(input_ids=ids.to(self.device), use_cache=False,
                                 position_ids=torch.arange(first, first + rows, device=self.device)[None])
        finally:
            self.model.config._attn_implementation = old
        k, v, q, self.k, self.v, self.q = self.k, self.v, self.q, None, None, None
        return k, v, q

    def forward(self, ids):
        """One causal pass: k, v [layers, heads, T, dim] and q [layers, heads, group, T, dim]."""
        self.prefix = None
        k, v, q = self._run(torch.tensor([ids]), 0)
        return k[0], v[0], q[0].view(self.layers, self.heads, self.group, len(ids), self.dim)

    def branches(self, k, v, prompt, futures):
        """(umax, umean) of the first `prompt` rows of k and v for each of several continuations of them."""
        width = max(map(len, futures))
        ids = torch.tensor([f + [0] * (width - len(f)) for f in futures])
        self.prefix = (k[:, :, :prompt], v[:, :, :prompt])
        try:
            kf, _, qf = self._run(ids, prompt)
        finally:
            self.prefix = None
        out = []
        for i, f in enumerate(futures):
            q = qf[i].view(self.layers, self.heads, self.group, width, self.dim)[:, :, :, :len(f)]
            keys = torch.cat([k[:, :, :prompt], kf[i, :, :, :len(f)]], 2)
            out.append(self.utility(q, keys))
        return out

    def utility(self, q, k):  # float16 values: their products are exact in TF32 too
        """q [layers, heads, group, F, dim]: the queries of the last F rows of k [layers, heads, P + F, dim].
        (umax, umean), float32 [layers, heads, P]: attention that each of the first P rows gets from them, summed
        over queries, the largest or the mean of its query group."""
        n, rows = q.shape[3], k.shape[2]
        prompt = rows - n
        step = max(1, self.scores_bytes // (self.heads * self.group * n * rows * 8))
        future = torch.ones(n, n, dtype=torch.bool, device=k.device).triu(1)
        umax, umean = [], []
        with torch.inference_mode():
            for i in range(0, self.layers, step):
                part = q[i:i + step].float().flatten(2, 3) * self.dim**-0.5  # the group's queries below each other
                a = torch.matmul(part, k[i:i + step].float().mT).unflatten(2, (self.group, n))
                a[..., prompt:].masked_fill_(future, float("-inf"))
                a = torch.softmax(a, -1)[..., :prompt]
                umax.append(a.amax(2).sum(2))
                umean.append(a.sum((2, 3)) / self.group)
        return torch.cat(umax), torch.cat(umean)

    def value_norm(self, v):
        """[layers, heads, T]: the length that a row's value has after the output projection, mean of its group."""
        x = v.float()[:, :, None]
        square = (torch.matmul(x, self._head_gram) * x).sum(-1)
        return square.clamp_min(0).sqrt().mean(2)
