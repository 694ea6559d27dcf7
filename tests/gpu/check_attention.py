#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The attention of kvtier.attention_cuda on a GPU against float64, on fresh random rows. TAP; no daemon.

Slots past a lane's length, and memory that results will lie in, hold NaN: what is read or left unwritten by mistake
shows.
"""
import os
import sys
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "ipc", "python"))

try:
    import torch
except ImportError as e:
    print(f"1..0 # SKIP {e.name} is not installed (make deps)")
    sys.exit(0)
if not torch.cuda.is_available():
    print("1..0 # SKIP no GPU")
    sys.exit(0)

from kvtier import attention_cuda as ours  # noqa: E402

DEV = torch.device("cuda")
LIMIT = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def reference(query, key, value, lengths, scale, front=None, room=0):
    """key and value with their room: [B, KV, room + slots, d]."""
    batch, heads, n, d = query.shape
    group = heads // key.shape[1]
    out = torch.empty(batch, n, heads, d, dtype=torch.float64, device=DEV)
    for b in range(batch):
        for h in range(key.shape[1]):
            length = int(lengths[b, h])
            rows = list(range(room, room + length))
            if front is not None:
                rows = list(range(int(front[b, h]))) + rows
            k, v = key[b, h, rows].double(), value[b, h, rows].double()
            x = query[b, h * group : (h + 1) * group].double() @ k.T * scale
            for i in range(n):
                x[:, i, len(rows) - n + 1 + i :] = float("-inf")
            out[b, :, h * group : (h + 1) * group] = (x.softmax(-1) @ v).transpose(0, 1)
    return out


def poison():
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24):
        torch.full((size,), float("nan"), device=DEV)


def case(batch, kv, group, n, d, slots, dtype, room=0, recalled=False, lengths=None, **how):
    key = torch.full((batch, kv, room + slots, d), float("nan"), dtype=dtype, device=DEV)
    value = key.clone()
    if lengths is None:
        lengths = torch.randint(n, slots + 1, (batch, kv))
        lengths.view(-1)[0] = n       # nothing but the new rows
        lengths.view(-1)[-1] = slots  # all there is
    lengths = lengths.to(torch.int32).to(DEV)
    front = None
    if recalled:
        front = torch.randint(0, room + 1, (batch, kv), dtype=torch.int32, device=DEV)
        front.view(-1)[0] = 0
    for b in range(batch):
        for h in range(kv):
            f = int(front[b, h]) if recalled else 0
            for plane in (key, value):
                plane[b, h, :f] = torch.randn(f, d, device=DEV).to(dtype)
                plane[b, h, room : room + int(lengths[b, h])] = torch.randn(int(lengths[b, h]), d, device=DEV).to(dtype)
    # the queries stand out where they should look, so that a wrong row shows
    query = (2 * torch.randn(batch, n, kv * group, d, device=DEV)).to(dtype).transpose(1, 2)
    scale = d**-0.5
    want = reference(query, key, value, lengths, scale, front, room)
    poison()
    got = ours.attend(query, key[:, :, room:], value[:, :, room:], lengths, slots, scale, front, room, **how)
    assert got.shape == want.shape and got.dtype == dtype
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error <= LIMIT[dtype], f"{batch}x{kv}x{group}, {n} rows, d {d}, {dtype}: error {error}"
    return error


def decode():
    worst = 0.0
    for dtype in LIMIT:
        for batch, kv, group, d, slots in ((1, 4, 7, 128, 5000), (1, 3, 3, 64, 3000), (5, 4, 7, 128, 700),
                                           (3, 2, 1, 64, 40), (2, 8, 8, 256, 300), (1, 2, 16, 32, 1111)):
            worst = max(worst, case(batch, kv, group, 1, d, slots, dtype))
    print(f"# largest error {worst:.1e}")


def questions():
    for dtype in LIMIT:
        for n in (2, 5, 32, 63):
            case(1, 4, 7, n, 128, 2100, dtype)
            case(2, 3, 3, n, 64, 300, dtype)


def long_stretches():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for n in (64, 200, 512):
            case(1, 4, 7, n, 128, 1500, dtype)
            case(2, 3, 3, n, 64, 800, dtype)
            case(1, 4, 7, n, 128, n, dtype, lengths=torch.full((1, 4), n))  # an empty cache before


def recalled_rows_in_front():
    for dtype in LIMIT:
        for n in (1, 7, 32, 100):
            case(1, 4, 7, n, 128, 900, dtype, room=64, recalled=True)
            case(2, 3, 3, n, 64, 300, dtype, room=33, recalled=True)


def append_fills_the_last_slots():
    for dtype in LIMIT:
        for batch, kv, n, d, slots in ((1, 4, 1, 128, 500), (3, 3, 1, 64, 90), (2, 4, 300, 128, 700)):
            key = torch.randn(batch, kv, slots, d, device=DEV).to(dtype)
            value = torch.randn(batch, kv, slots, d, device=DEV).to(dtype)
            want = key.clone(), value.clone()
            lengths = torch.randint(n, slots + 1, (batch, kv), dtype=torch.int32)
            new = [torch.randn(batch, n, kv, d, device=DEV).to(dtype).transpose(1, 2) for _ in "kv"]
            for b in range(batch):
                for h in range(kv):
                    end = int(lengths[b, h])
                    for plane, rows in zip(want, new):
                        plane[b, h, end - n : end] = rows[b, h]
            ours.append(key, value, *new, lengths.to(DEV))
            assert torch.equal(key, want[0]) and torch.equal(value, want[1])


def a_graph_follows_the_lengths():
    slots, d = 2000, 128
    key, value = (torch.randn(2, 4, slots, d, device=DEV).bfloat16() for _ in "kv")
    query = torch.randn(2, 28, 1, d, device=DEV).bfloat16()
    lengths = torch.full((2, 4), 1, dtype=torch.int32, device=DEV)
    ours.attend(query, key, value, lengths, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours.attend(query, key, value, lengths, slots)
    for _ in range(5):
        lengths.copy_(torch.randint(1, slots + 1, (2, 4)))
        out.fill_(float("nan"))
        graph.replay()
        want = reference(query, key, value, lengths, d**-0.5)
        assert (out.double() - want).norm() / want.norm() < 1e-2


def plain_torch_agrees():
    query, key, value = (torch.randn(2, h, n, 64) for h, n in ((6, 5), (2, 300), (2, 300)))
    lengths = torch.randint(5, 300, (2, 2), dtype=torch.int32)
    want = reference(query.to(DEV), key.to(DEV), value.to(DEV), lengths, 0.125)
    assert (ours.attend(query, key, value, lengths, 300).to(DEV) - want).abs().max() < 1e-5


TESTS = [decode, questions, long_stretches, recalled_rows_in_front, append_fills_the_last_slots,
         a_graph_follows_the_lengths, plain_torch_agrees]


def main():
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    print(f"1..{len(TESTS)}\n# seed {seed}, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    bad = 0
    for n, test in enumerate(TESTS, 1):
        try:
            test()
            torch.cuda.synchronize()
            print(f"ok {n} - {test.__name__}", flush=True)
        except Exception:
            bad += 1
            print(f"not ok {n} - {test.__name__}")
            print("# " + traceback.format_exc().replace("\n", "\n# "), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
