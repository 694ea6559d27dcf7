# SPDX-License-Identifier: MIT
"""A compact forward pass of Llama-like models that runs many evicted caches of one prompt at once.

Shapes, everywhere: L layers, H KV heads, G query heads per KV head, d head_dim, P rows of the prompt,
V variants (caches that differ in what they hold), N continuations of each, F tokens of a continuation.
Rows of the prompt are exchanged with each layer through a `rows(layer, q)` function, so that a variant can
choose its rows when the layer's queries are known: recall does. Keys are kept after RoPE.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as nn


class Cache(NamedTuple):
    """What a full prefill leaves. q is None unless asked for."""
    k: torch.Tensor  # [L, H, P, d], after RoPE
    v: torch.Tensor  # [L, H, P, d]
    q: torch.Tensor  # [L, H, G, P, d], after RoPE

    def first(self, rows):
        return Cache(self.k[:, :, :rows], self.v[:, :, :rows], None if self.q is None else self.q[:, :, :, :rows])


class Compact:
    """The model's weights and its forward pass in float32 (TF32 products on a GPU)."""

    def __init__(self, model, device="cpu"):
        c = model.config
        self.layers, self.heads, self.dim = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
        self.group = c.num_attention_heads // c.num_key_value_heads
        self.eps, self.hidden, self.vocab = c.rms_norm_eps, c.hidden_size, c.vocab_size
        self.device = torch.device(device)
        self.theta = float(c.rope_parameters["rope_theta"])
        angle = self.theta ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        angle = torch.arange(c.max_position_embeddings, dtype=torch.float64)[:, None] * angle
        self.cos, self.sin = (torch.cat([f(angle)] * 2, -1).float().to(self.device) for f in (torch.cos, torch.sin))

        def take(x):
            return x.detach().float().to(self.device)

        self.embed, self.norm = take(model.model.embed_tokens.weight), take(model.model.norm.weight)
        self.head = take(model.lm_head.weight) if not c.tie_word_embeddings else self.embed
        self.blocks = []
        for b in model.model.layers:
            a, m = b.self_attn, b.mlp
            self.blocks.append({
                "n1": take(b.input_layernorm.weight), "n2": take(b.post_attention_layernorm.weight),
                "qkv": torch.cat([take(a.q_proj.weight), take(a.k_proj.weight), take(a.v_proj.weight)]),
                "o": take(a.o_proj.weight), "down": take(m.down_proj.weight),
                "up": torch.cat([take(m.gate_proj.weight), take(m.up_proj.weight)])})

    def rms(self, x, w):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * w

    def rope(self, x, start):
        """x [..., T, d] at positions start ... start + T - 1; the halves are the pairs."""
        cos, sin = (t[start:start + x.shape[-2]] for t in (self.cos, self.sin))
        half = self.dim // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def unrope(self, x, start):
        cos, sin = (t[start:start + x.shape[-2]] for t in (self.cos, self.sin))
        half = self.dim // 2
        return x * cos + torch.cat([x[..., half:], -x[..., :half]], -1) * sin

    def project(self, layer, x, start):
        """q [.., H, G, T, d], k and v [.., H, T, d] of x [.., T, hidden], roped."""
        b = self.blocks[layer]
        y = (self.rms(x, b["n1"]) @ b["qkv"].T).unflatten(-1, (-1, self.dim)).transpose(-2, -3)
        heads = self.heads * self.group
        q, k, v = y[..., :heads, :, :], y[..., heads:heads + self.heads, :, :], y[..., heads + self.heads:, :, :]
        return self.rope(q, start).unflatten(-3, (self.heads, self.group)), self.rope(k, start), v

    def finish(self, layer, x, o):
        """Residual stream after the block; o [.., H, G, T, d] is what attention gave."""
        b = self.blocks[layer]
        x = x + o.flatten(-4, -3).transpose(-2, -3).flatten(-2) @ b["o"].T
        gate, up = (self.rms(x, b["n2"]) @ b["up"].T).chunk(2, -1)
        return x + (nn.silu(gate) * up) @ b["down"].T

    def prefill(self, tokens, queries=False):
        """Full causal forward of token ids [T] or [B, T] → (Cache, last hidden [.., T, hidden]).

        The cache is kept only for one sequence [T]; a batch gives None for it.
        """
        tokens = torch.as_tensor(tokens, device=self.device)
        x, ks, vs, qs = self.embed[tokens], [], [], []
        single = tokens.dim() == 1
        for layer in range(self.layers):
            q, k, v = self.project(layer, x, 0)
            kg, vg = (t.unsqueeze(-3).expand_as(q).flatten(-4, -3) for t in (k, v))
            o = nn.scaled_dot_product_attention(q.flatten(-4, -3) if not single else q.flatten(-4, -3)[None],
                                                kg if not single else kg[None],
                                                vg if not single else vg[None], is_causal=True)
            x = self.finish(layer, x, (o[0] if single else o).unflatten(-3, (self.heads, self.group)))
            if single:
                ks.append(k)
                vs.append(v)
                if queries:
                    qs.append(q)
        cache = Cache(torch.stack(ks), torch.stack(vs), torch.stack(qs) if queries else None) if single else None
        return cache, self.rms(x, self.norm)

    def extend(self, tokens, start, rows, variants=1, capture=None):
        """Continue after a prompt of `start` rows: token ids [N, F] or [V, N, F] → last hidden [V, N, F, hidden].

        rows(layer, q) → (k [V, H, C, d], v, bias [V, H, C] or None): what the variants hold of the prompt;
        q [V, N, H, G, F, d]. bias is added to the logits (0, or -inf for padding). Own rows are never
        evicted. capture: a list that receives (q, k, v) of the continuation per layer.
        """
        tokens = torch.as_tensor(tokens, device=self.device)
        if tokens.dim() == 2:
            tokens = tokens.expand(variants, *tokens.shape)
        x = self.embed[tokens]
        f = tokens.shape[-1]
        future = torch.full((f, f), float("-inf"), device=self.device).triu(1)
        for layer in range(self.layers):
            q, k, v = self.project(layer, x, start)
            if capture is not None:
                capture.append((q, k, v))
            x = self.finish(layer, x, self.attend(q, k, v, *rows(layer, q), future))
        return self.rms(x, self.norm)

    def attend(self, q, k, v, pk, pv, bias, future):
        """Softmax over the prompt's rows pk, pv [V, H, C, d] and the continuation's own, merged by log-sum-exp."""
        nv, nn_, h, g, f, d = q.shape
        q = q * d ** -0.5
        s = torch.matmul(q.permute(0, 2, 1, 3, 4, 5).reshape(nv, h, nn_ * g * f, d), pk.transpose(-1, -2))
        if bias is not None:
            s += bias[:, :, None]
        top = s.amax(-1, keepdim=True)
        p = s.softmax(-1)
        lse = top - p.amax(-1, keepdim=True).log()
        o = torch.matmul(p, pv).view(nv, h, nn_, g, f, d).transpose(1, 2)
        lse = lse.view(nv, h, nn_, g, f, 1).transpose(1, 2)
        own = torch.matmul(q, k.unsqueeze(3).transpose(-1, -2)) + future
        share = torch.sigmoid(lse - own.logsumexp(-1, keepdim=True))
        return share * o + (1 - share) * torch.matmul(own.softmax(-1), v.unsqueeze(3))

    def loss(self, hidden, targets, block=8192):
        """(nats, top1 == target) of hidden [..., hidden] predicting targets [...]; float32 and bool."""
        h, t = hidden.reshape(-1, self.hidden), torch.as_tensor(targets, device=self.device).reshape(-1)
        nats, hit = [], []
        for i in range(0, len(h), block):
            z = h[i:i + block] @ self.head.T
            nats.append(nn.cross_entropy(z, t[i:i + block], reduction="none"))
            hit.append(z.argmax(-1) == t[i:i + block])
        shape = hidden.shape[:-1]
        return torch.cat(nats).view(shape), torch.cat(hit).view(shape)


class Held:
    """rows() of variants that hold fixed rows: mask [V, L, H, P] over one cache."""

    def __init__(self, cache, mask):
        self.cache, self.mask = cache, mask
        self.count = mask.sum(-1)
        self.widest = self.count.amax((0, 2)).tolist()
        self.ragged = (self.count != self.count.amax((0, 2))[None, :, None]).any(2).any(0).tolist()

    def __call__(self, layer, q):
        c = self.widest[layer]
        index = self.mask[:, layer].to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :c]
        bias = None
        if self.ragged[layer]:
            bias = torch.zeros(index.shape, device=index.device)
            late = torch.arange(c, device=index.device) >= self.count[:, layer, :, None]
            bias.masked_fill_(late, float("-inf"))
        return *gather(self.cache, layer, index), bias


def gather(cache, layer, index):
    """Rows index [V, H, C] of the cache's layer: k, v [V, H, C, d]. What is not in index is really gone."""
    head = torch.arange(index.shape[1], device=index.device)[None, :, None]
    return cache.k[layer][head, index], cache.v[layer][head, index]


class Whole:
    """rows() of the full cache, for any number of variants."""

    def __init__(self, cache):
        self.cache = cache

    def __call__(self, layer, q):
        v = q.shape[0]
        return (self.cache.k[layer].expand(v, *self.cache.k[layer].shape),
                self.cache.v[layer].expand(v, *self.cache.v[layer].shape), None)


def chunks(masks, per_row, limit):
    """Slices of V variants, in ascending order of rows held, each with at most `limit` logits in a layer.

    masks [V, L, H, P]; per_row: logits per held row of the widest lane (N * H * G * F). Yields index tensors.
    """
    widest = masks.sum(-1).flatten(1).amax(-1)
    order = widest.argsort(stable=True).tolist()
    widest = widest.tolist()
    take = []
    for i in order:
        if take and (widest[i] * per_row * (len(take) + 1) > limit or
                     len(take) >= 8 and widest[i] > 1.4 * widest[take[0]]):  # padding costs more than a pass
            yield take
            take = []
        take.append(i)
    if take:
        yield take


def load(device="cpu"):
    """(Compact SmolLM2-135M-Instruct, tokenizer)."""
    from kvtier import smollm2
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    model, tok = smollm2.load()
    return Compact(model, device), tok
