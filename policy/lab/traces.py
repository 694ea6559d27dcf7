#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""samples.jsonl.gz → model → OUT/{train,valid,calib,test}/<id>.kvtr and OUT/model.kvtr.

    python3 policy/lab/traces.py [--samples build/samples/samples.jsonl.gz] [--out build/traces] [--device cuda]
                                 [--splits train,valid] [--limit N] [--stop-after SECONDS]

One causal forward pass serves all cuts of a sample; continuations run on its cache. Tensors leave the device through
page-locked buffers, each of which a writer thread turns into a file, so that computing, copying and writing overlap.
Resumable: a file that is there is complete (it gets its name last) and is skipped. Sampled continuations are kept in
OUT/generated.jsonl. Exits 3 when --stop-after ended it before the last sample.
"""
import argparse
import json
import pathlib
import queue
import sys
import threading
import time

import numpy as np
import torch

import kvtr
import lab_model
import samples as lab_samples
from capture import Capture

STOPPED = 3
WITH_Q = ("valid", "test")
_ALIGN = 64


class Buffer:
    """Host memory for one sample, page-locked when the device is a GPU; grows to the largest that it met."""

    def __init__(self, cuda):
        self.cuda, self.memory, self.parts, self.event = cuda, None, [], None

    def fill(self, tensors):
        """tensors: (kind, cut, device tensor); copied behind what the device is doing, self.event marks the end."""
        need = sum(-(-t.numel() * t.element_size() // _ALIGN) * _ALIGN for _, _, t in tensors)
        if self.memory is None or self.memory.numel() < need:
            self.memory = None
            self.memory = torch.empty(need * 5 // 4, dtype=torch.uint8, pin_memory=self.cuda)
        self.parts, at = [], 0
        for kind, cut, t in tensors:
            n = t.numel() * t.element_size()
            host = self.memory[at:at + n]
            host.copy_(t.contiguous().view(-1).view(torch.uint8), non_blocking=self.cuda)
            self.parts.append((kind, cut, host))
            at += -(-n // _ALIGN) * _ALIGN
        if self.cuda:
            self.event = torch.cuda.Event()
            self.event.record()


class Writers:
    """Threads that write filled buffers; take() gives a free one, and so holds the device back when disks are slow."""

    def __init__(self, threads, cuda):
        self.free, self.work, self.errors, self.bytes, self.lock = queue.Queue(), queue.Queue(), [], 0, threading.Lock()
        for _ in range(threads + 2):
            self.free.put(Buffer(cuda))
        self.threads = [threading.Thread(target=self._loop, daemon=True) for _ in range(threads)]
        for t in self.threads:
            t.start()

    def take(self):
        if self.errors:
            raise self.errors[0]
        return self.free.get()

    def put(self, buffer, path, header, cuts, ids):
        self.work.put((buffer, path, header, cuts, ids))

    def _loop(self):
        while True:
            job = self.work.get()
            if job is None:
                return
            try:
                self._write(*job)
            except Exception as e:  # noqa: BLE001: handed to the main thread
                self.errors.append(e)
            self.free.put(job[0])

    def _write(self, buffer, path, header, cuts, ids):
        if buffer.event is not None:
            buffer.event.synchronize()
        for kind, cut, host in buffer.parts:
            if kind in (kvtr.UMAX, kvtr.UMEAN, kvtr.VNORM):
                if not np.isfinite(host.numpy().view(np.float32).sum(dtype=np.float64)):
                    raise ValueError(f"{path}: utilities or norms of cut {cut} are not finite")
        with kvtr.Writer(path, header, cuts) as w:
            w.tokens(ids)
            for kind, cut, host in buffer.parts:
                w.lanes(kind, host, cut=cut)
            size = w.size
        with self.lock:
            self.bytes += size

    def close(self):
        for _ in self.threads:
            self.work.put(None)
        for t in self.threads:
            t.join()
        if self.errors:
            raise self.errors[0]


def head(cap, **fields):
    return kvtr.header(model=lab_model.NAME, layers=cap.layers, heads=cap.heads, group=cap.group, k_dim=cap.dim,
                       dtype="float16", rope="half", rope_theta=cap.theta, keys="cached", **fields)


def write_model(cap, path):
    """What belongs to the model: the Gram matrices of its output projections."""
    with kvtr.Writer(path, head(cap, rows=0)) as w:
        w.lanes(kvtr.GRAM, cap.gram.float().cpu())


def tensors_of(cap, sample):
    """(cuts, [(kind, cut, tensor on the device)]) of one sample."""
    ids, cuts = sample["tokens"], sample["cuts"]
    k, v, q = cap.forward(ids)
    out = [(kvtr.K, 0, k), (kvtr.V, 0, v), (kvtr.VNORM, 0, cap.value_norm(v))]
    if sample["split"] in WITH_Q:
        out.append((kvtr.Q, 0, q))
    util, table = {}, []
    for prompt in sorted({c["prompt"] for c in cuts if c["branch"]}):
        mine = [i for i, c in enumerate(cuts) if c["branch"] and c["prompt"] == prompt]
        util.update(zip(mine, cap.branches(k, v, prompt, [cuts[i]["branch"] for i in mine])))
    for i, c in enumerate(cuts):
        p, n = c["prompt"], len(c["branch"]) if c["branch"] else c["queries"]
        umax, umean = util.get(i) or cap.utility(q[:, :, :, p:p + n], k[:, :, :p + n])
        out += [(kvtr.UMAX, i, umax), (kvtr.UMEAN, i, umean)]
        flags = (kvtr.BEFORE if c["before"] else 0) | (kvtr.BRANCH if c["branch"] else 0)
        table.append(kvtr.Cut(prompt=p, queries=n, context=c["context"], flags=flags))
    return table, out


def trace(cap, writers, sample, path):
    cuts, tensors = tensors_of(cap, sample)
    buffer = writers.take()
    buffer.fill(tensors)
    header = head(cap, rows=len(sample["tokens"]), source=sample["source"], domain=sample["domain"],
                  task=sample["task"], split=sample["split"])
    writers.put(buffer, path, header, cuts, sample["tokens"])


def generate(model, todo, path, batch):
    """Fill in the branches of `generate` cuts: sampled at temperature 1, equal prompts of several samples at once."""
    known = {}
    if path.exists():
        known = {r["id"]: r["branches"] for r in map(json.loads, path.read_text().splitlines())}
    groups = {}
    for s in todo:
        mine = [c for c in s["cuts"] if c["generate"]]
        if mine and s["id"] not in known:
            groups.setdefault((mine[0]["prompt"], mine[0]["generate"], len(mine)), []).append(s)
    with open(path, "a") as f:
        for (prompt, n, copies), members in sorted(groups.items()):
            for i in range(0, len(members), batch):
                part = members[i:i + batch]
                ids = torch.tensor([s["tokens"][:prompt] for s in part], device=model.device)
                torch.manual_seed(prompt * 1000003 + i)
                with torch.inference_mode():
                    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0,
                                         top_k=0, top_p=1.0, num_return_sequences=copies, min_new_tokens=n,
                                         max_new_tokens=n)[:, prompt:].tolist()
                for j, s in enumerate(part):
                    known[s["id"]] = out[j * copies:(j + 1) * copies]
                    f.write(json.dumps({"id": s["id"], "branches": known[s["id"]]}) + "\n")
                f.flush()
                print(f"traces: continuations of {len(part)} samples at {prompt} tokens", file=sys.stderr, flush=True)
    for s in todo:
        mine = [c for c in s["cuts"] if c["generate"]]
        for c, branch in zip(mine, known.get(s["id"], ())):
            c["branch"] = branch


def run(model, todo, out, threads, stop_after=0.0, batch=12):
    """Trace the samples; the number that were left out because time was up."""
    start = time.monotonic()
    cap, cuda = Capture(model), next(model.parameters()).is_cuda
    for split in {s["split"] for s in todo}:
        (out / split).mkdir(parents=True, exist_ok=True)
    if not (out / "model.kvtr").exists():
        write_model(cap, out / "model.kvtr")
    paths = {s["id"]: out / s["split"] / (s["id"] + ".kvtr") for s in todo}
    todo = [s for s in todo if not paths[s["id"]].exists()]
    if any(c["generate"] for s in todo for c in s["cuts"]):
        generate(model, todo, out / "generated.jsonl", batch)
    writers, done, shown, begin = Writers(threads, cuda), 0, start, time.monotonic()
    try:
        for s in todo:
            now = time.monotonic()
            if stop_after and now - start > stop_after:
                break
            trace(cap, writers, s, paths[s["id"]])
            done += 1
            if now - shown > 2:
                shown = now
                print(f"traces: {done} of {len(todo)}, {done / (now - begin):.1f} documents/s, "
                      f"{writers.bytes / (now - begin) / 1e9:.2f} GB/s", file=sys.stderr, flush=True)
    finally:
        writers.close()
    took = max(time.monotonic() - begin, 1e-9)
    tokens = sum(len(s["tokens"]) for s in todo[:done])
    print(f"traces: {done} written in {took:.1f} s, {done / took:.1f} documents/s, {tokens / took:.0f} tokens/s, "
          f"{writers.bytes / 1e9:.2f} GB; {len(todo) - done} left", file=sys.stderr, flush=True)
    return len(todo) - done


def main():
    p = argparse.ArgumentParser(description="Run the model over samples and write traces.")
    p.add_argument("--samples", default="build/samples/samples.jsonl.gz")
    p.add_argument("--out", default="build/traces")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--dtype", default=None, choices=("float32", "float16", "bfloat16"),
                   help="of the weights (default float32; attention is computed in float16 on CUDA)")
    p.add_argument("--splits", default="train,valid,calib,test")
    p.add_argument("--domains", default="", help="only these, comma-separated")
    p.add_argument("--limit", type=int, default=0, help="at most N samples per split")
    p.add_argument("--max-rows", type=int, default=0, help="leave out longer samples")
    p.add_argument("--stop-after", type=float, default=0.0, help="seconds, after loading the model")
    p.add_argument("--threads", type=int, default=0, help="writers (default 8 on CUDA, 1 on the CPU)")
    args = p.parse_args()
    splits, domains = args.splits.split(","), set(filter(None, args.domains.split(",")))
    every = [s for s in lab_samples.load(args.samples, set(splits)) if not domains or s["domain"] in domains]
    if args.max_rows:
        every = [s for s in every if len(s["tokens"]) <= args.max_rows]
    todo = [s for x in splits for s in [s for s in every if s["split"] == x][:args.limit or None]]
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model, _ = lab_model.load(args.device, getattr(torch, args.dtype) if args.dtype else None)
    left = run(model, todo, out, args.threads or (8 if args.device == "cuda" else 1), args.stop_after)
    sys.exit(STOPPED if left else 0)


if __name__ == "__main__":
    main()
