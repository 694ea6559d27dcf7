# SPDX-License-Identifier: MIT
"""Attention over heads that hold different numbers of rows, on the GPU, without a mask of the size of the cache.

    kvtier.attention_cuda.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="kvtier_cuda").to("cuda")
    cache = KvtierCudaCache(model.config, client, max_rows, ...)          # kvtier.hf_cuda

A lane is (sequence, KV head). Its rows lie in slots [0, length) in any order; the last n of them are the n rows whose
queries attend now, in order, and see each other causally. Lengths are read from GPU memory by the kernels, so a
captured graph stays right while they change. Recalled rows, which everybody sees, lie in front of slot 0.

Four ways, chosen by shape: a split-KV kernel (Triton) for decode steps and questions; torch's own attention where the
new rows are all there is; its flash attention with one varlen sequence per lane for long stretches of half-precision
rows behind others; plain torch for tensors in host memory.
"""
import functools

import torch
from torch.nn.functional import scaled_dot_product_attention

from . import attention as _plain

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it: the torch fallback serves
    triton = None

NAME = "kvtier_cuda"
LONG = 64  # new rows from which torch's kernels are asked: fewer do not fill their tiles
WIDTHS = (16, 32, 64, 128, 256)  # of heads that the kernels take; others go through plain torch


def register():
    """Make attn_implementation="kvtier_cuda" known to transformers. No mask function is registered on purpose:
    transformers then builds none. May be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention interface. Keys of any other cache get plain causal attention."""
    layer = getattr(key, "kvtier_layer", None)
    if layer is None:
        return _plain.attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    if layer.fresh is not None:
        (key, value), layer.fresh = layer.fresh, None
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    layer.cache.ask(layer, query, scaling)
    front, room = layer.front()
    return attend(query, key, value, layer.lengths, layer.cache.most, scaling, front, room), None


def attend(query, key, value, lengths, most, scale=None, front=None, room=0):
    """query [B, heads, n, d]; key and value [B, KV heads, slots, d], from slot 0 on, every lane's slots contiguous and
    lanes evenly spaced. lengths: int32 [B, KV heads], the n newest rows included; most: no lane is longer (in a graph:
    will be). front: int32 [B, KV heads], recalled rows in slots [-room, -room + front). Returns [B, n, heads, d]."""
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if query.is_cuda and triton is not None and query.shape[3] in WIDTHS:
        half = query.dtype in (torch.float16, torch.bfloat16)
        if query.shape[2] >= LONG and half and front is None:
            return _flash(query, key, value, lengths, most, scale)
        return _split(query, key, value, lengths, most, scale, front, room)
    return _torch(query, key, value, lengths, scale, front, room)


def append(key, value, new_key, new_value, lengths):
    """Write new_key and new_value [B, KV heads, n, d] to the last n slots of each lane. lengths count them already."""
    n = new_key.shape[2]
    if key.is_cuda and triton is not None and key.shape[3] in WIDTHS:
        _append(key, value, new_key, new_value, lengths, n)
        return
    for b, row in enumerate(lengths.tolist()):
        for h, end in enumerate(row):
            key[b, h, end - n : end] = new_key[b, h]
            value[b, h, end - n : end] = new_value[b, h]


# ---- plain torch ------------------------------------------------------------------------


def _torch(query, key, value, lengths, scale, front, room):
    batch, heads, n, d = query.shape
    group = heads // key.shape[1]
    out = query.new_empty(batch, n, heads, d)
    late = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
    for b, row in enumerate(lengths.tolist()):
        for h, length in enumerate(row):
            k, v = key[b, h, :length], value[b, h, :length]
            if front is not None and int(front[b, h]):
                k, v = (torch.cat([_before(rows, b, h, int(front[b, h]), room), own])
                        for rows, own in ((key, k), (value, v)))
            q = query[b, h * group : (h + 1) * group].float()
            x = q @ k.float().T * scale
            x[:, :, -n:].masked_fill_(late, float("-inf"))
            out[b, :, h * group : (h + 1) * group] = (x.softmax(-1) @ v.float()).transpose(0, 1).to(out.dtype)
    return out


def _before(rows, b, h, count, room):
    """The `count` recalled rows of a lane, room slots in front of its slot 0."""
    s = rows.stride()
    at = rows.storage_offset() + b * s[0] + h * s[1] - room * s[2]
    return rows.as_strided((count, rows.shape[3]), (s[2], s[3]), at)


# ---- torch's flash attention, a varlen sequence for each lane -----------------------------


@functools.lru_cache(maxsize=64)
def _starts(lanes, step, device):
    return torch.arange(0, (lanes + 1) * step, step, dtype=torch.int32, device=device)


def _flash(query, key, value, lengths, most, scale):
    batch, heads, n, d = query.shape
    kv = key.shape[1]
    group, lanes, span = heads // kv, batch * kv, key.stride(1) // key.stride(2)
    q = query.view(batch, kv, group, n, d).transpose(2, 3).reshape(lanes * n, group, d)
    # one flat row of slots per lane; the last lane ends with its last slot
    flat = [rows.as_strided(((lanes - 1) * span + rows.shape[2], 1, d), (d, d, 1), rows.storage_offset())
            for rows in (key, value)]
    out = torch.ops.aten._flash_attention_forward(
        q, *flat, _starts(lanes, n, query.device), _starts(lanes, span, query.device), n, most, 0.0, True, False,
        scale=scale, seqused_k=lengths.reshape(-1))[0]
    return out.view(batch, kv, n, group, d).transpose(1, 2).reshape(batch, n, heads, d)


# ---- the split-KV kernel -------------------------------------------------------------------

if triton is not None:

    @triton.jit(do_not_specialize=["splits", "n", "group", "kv_heads"])
    def _split_kernel(q_ptr, k_ptr, v_ptr, len_ptr, front_ptr, out_ptr, part_ptr, lse_ptr, scale, n, chunk, splits,
                      room, q_b, q_h, q_n, lane_stride, kv_heads, group, D: tl.constexpr, BM: tl.constexpr,
                      BN: tl.constexpr, FRONT: tl.constexpr, SINGLE: tl.constexpr):
        """One (lane, split, tile of queries): rows [split * chunk, + chunk) of the lane's front and own rows."""
        lane, split = tl.program_id(0), tl.program_id(1)
        front = 0
        if FRONT:
            front = tl.load(front_ptr + lane)
        total = tl.load(len_ptr + lane) + front
        lo = split * chunk
        hi = tl.minimum(lo + chunk, total)
        if lo < total:
            b, h = lane // kv_heads, lane % kv_heads
            m = tl.program_id(2) * BM + tl.arange(0, BM)
            token, head = m // group, h * group + m % group
            valid = m < n * group
            d = tl.arange(0, D)
            q_rows = b.to(tl.int64) * q_b + head.to(tl.int64) * q_h + token * q_n
            q = tl.load(q_ptr + q_rows[:, None] + d[None], mask=valid[:, None], other=0.0)
            last = total - n + token  # the row that a query is the query of: it sees no later one
            top = tl.full([BM], float("-inf"), tl.float32)
            mass = tl.zeros([BM], tl.float32)
            acc = tl.zeros([BM, D], tl.float32)
            k_lane = k_ptr + lane.to(tl.int64) * lane_stride
            v_lane = v_ptr + lane.to(tl.int64) * lane_stride
            for start in range(lo, hi, BN):
                row = start + tl.arange(0, BN)
                there = row < hi
                slot = row
                if FRONT:
                    slot = tl.where(row < front, row - room, row - front)
                k = tl.load(k_lane + slot[None, :] * D + d[:, None], mask=there[None, :], other=0.0)
                x = tl.dot(q, k, input_precision="tf32x3") * scale
                x = tl.where(there[None, :] & (row[None, :] <= last[:, None]), x, float("-inf"))
                high = tl.maximum(top, tl.max(x, 1))
                safe = tl.where(high == float("-inf"), 0.0, high)
                p = tl.exp2(x - safe[:, None])
                shrink = tl.exp2(top - safe)
                mass = mass * shrink + tl.sum(p, 1)
                v = tl.load(v_lane + slot[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
                acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
                top = high
            if SINGLE:
                at = ((b * n + token) * (kv_heads * group) + head).to(tl.int64)
                tl.store(out_ptr + at[:, None] * D + d[None], (acc / mass[:, None]).to(out_ptr.dtype.element_ty),
                         mask=valid[:, None])
            else:
                at = (lane.to(tl.int64) * splits + split) * (n * group) + m
                seen = mass > 0.0
                tl.store(part_ptr + at[:, None] * D + d[None], acc / tl.where(seen, mass, 1.0)[:, None],
                         mask=valid[:, None])
                tl.store(lse_ptr + at, tl.where(seen, top + tl.log2(tl.where(seen, mass, 1.0)), float("-inf")),
                         mask=valid)

    @triton.jit(do_not_specialize=["splits", "n", "group", "kv_heads"])
    def _join_kernel(part_ptr, lse_ptr, len_ptr, front_ptr, out_ptr, n, chunk, splits, kv_heads, group, D: tl.constexpr,
                     BS: tl.constexpr, FRONT: tl.constexpr):
        """One query of one lane: its splits' results by their shares of the whole."""
        lane, m = tl.program_id(0), tl.program_id(1)
        total = tl.load(len_ptr + lane)
        if FRONT:
            total += tl.load(front_ptr + lane)
        used = tl.cdiv(total, chunk)
        d = tl.arange(0, D)
        top = tl.full([1], float("-inf"), tl.float32)
        mass = tl.zeros([1], tl.float32)
        acc = tl.zeros([D], tl.float32)
        for first in range(0, used, BS):
            s = first + tl.arange(0, BS)
            at = (lane.to(tl.int64) * splits + s) * (n * group) + m
            lse = tl.load(lse_ptr + at, mask=s < used, other=float("-inf"))
            part = tl.load(part_ptr + at[:, None] * D + d[None], mask=(s < used)[:, None], other=0.0)
            high = tl.maximum(top, tl.max(lse, 0))
            safe = tl.where(high == float("-inf"), 0.0, high)
            w = tl.exp2(lse - safe)
            shrink = tl.exp2(top - safe)
            mass = mass * shrink + tl.sum(w, 0)
            acc = acc * shrink + tl.sum(w[:, None] * part, 0)
            top = high
        b, h = lane // kv_heads, lane % kv_heads
        at = (b * n + m // group) * (kv_heads * group) + h * group + m % group
        tl.store(out_ptr + at.to(tl.int64) * D + d, (acc / mass).to(out_ptr.dtype.element_ty))

    @triton.jit(do_not_specialize=["n", "kv_heads"])
    def _append_kernel(nk_ptr, nv_ptr, k_ptr, v_ptr, len_ptr, n, k_b, k_h, k_n, v_b, v_h, v_n, lane_stride, kv_heads,
                       D: tl.constexpr, BT: tl.constexpr):
        lane = tl.program_id(0)
        b, h = (lane // kv_heads).to(tl.int64), (lane % kv_heads).to(tl.int64)
        t = tl.program_id(1) * BT + tl.arange(0, BT)
        d = tl.arange(0, D)
        slot = tl.load(len_ptr + lane) - n + t
        to = lane.to(tl.int64) * lane_stride + slot[:, None] * D + d[None]
        mask = (t < n)[:, None]
        tl.store(k_ptr + to, tl.load(nk_ptr + b * k_b + h * k_h + t[:, None] * k_n + d[None], mask=mask), mask=mask)
        tl.store(v_ptr + to, tl.load(nv_ptr + b * v_b + h * v_h + t[:, None] * v_n + d[None], mask=mask), mask=mask)


@functools.lru_cache(maxsize=None)
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.lru_cache(maxsize=1024)
def shape_of(queries, lanes, most, row_bytes, device, waves=2):
    """(queries in a tile, rows in a block, rows of a split, splits): 16 KiB of K in a block, enough programs to fill the
    GPU `waves` times with lanes x splits, no split shorter than two blocks."""
    bm = 16 if queries <= 16 else 64
    bn = min(max(16, 16384 // row_bytes), 128)
    wanted = max(1, waves * _multiprocessors(device) // (lanes * triton.cdiv(queries, bm)))
    chunk = max(2 * bn, triton.cdiv(triton.cdiv(most, wanted), bn) * bn)
    return bm, bn, chunk, triton.cdiv(most, chunk)


def _split(query, key, value, lengths, most, scale, front, room, shape=None, warps=4, stages=3):
    batch, heads, n, d = query.shape
    kv = key.shape[1]
    group, lanes = heads // kv, batch * kv
    if query.stride(3) != 1:
        query = query.contiguous()
    shape = shape or shape_of(n * group, lanes, most + room + 63 & ~63, d * key.element_size(), query.device)
    bm, bn, chunk, splits = shape
    out = query.new_empty(batch, n, heads, d)
    part = lse = out
    if splits > 1:
        part = torch.empty(lanes * splits * n * group * d, dtype=torch.float32, device=query.device)
        lse = torch.empty(lanes * splits * n * group, dtype=torch.float32, device=query.device)
    fronts = lengths if front is None else front
    _split_kernel[lanes, splits, triton.cdiv(n * group, bm)](
        query, key, value, lengths, fronts, out, part, lse, scale * 1.4426950408889634, n, chunk, splits, room,
        query.stride(0), query.stride(1), query.stride(2), key.stride(1), kv, group, d, bm, bn, front is not None,
        splits == 1, num_warps=warps, num_stages=stages)
    if splits > 1:
        _join_kernel[lanes, n * group](part, lse, lengths, fronts, out, n, chunk, splits, kv, group, d, 16,
                                       front is not None, num_warps=2)
    return out


def _append(key, value, new_key, new_value, lengths, n):
    if new_key.stride(3) != 1 or new_value.stride(3) != 1:
        new_key, new_value = new_key.contiguous(), new_value.contiguous()
    kv, d = key.shape[1], key.shape[3]
    bt = min(triton.next_power_of_2(n), 64)
    _append_kernel[key.shape[0] * kv, triton.cdiv(n, bt)](
        new_key, new_value, key, value, lengths, n, *new_key.stride()[:3], *new_value.stride()[:3], key.stride(1), kv,
        d, bt, num_warps=4 if bt > 8 else 1)
