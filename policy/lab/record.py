# SPDX-License-Identifier: MIT
"""Samples in, results out: append-only JSON lines that a later run continues, and what prepare found."""
import concurrent.futures
import gzip
import json
import os
import sys
import time

import torch


def load_found(out, device="cpu"):
    """What prepare left in <out>/prepare: {name: JSON value or tensor}."""
    found, folder = {}, os.path.join(out, "prepare")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        stem, ext = os.path.splitext(name)
        if ext == ".json":
            with open(os.path.join(folder, name)) as f:
                found[stem] = json.load(f)
        elif ext == ".pt":
            found[stem] = torch.load(os.path.join(folder, name), map_location=device)
    return found


def save_found(out, name, value):
    folder = os.path.join(out, "prepare")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name + (".pt" if torch.is_tensor(value) else ".json"))
    if torch.is_tensor(value):
        torch.save(value.cpu(), path + ".tmp")
    else:
        with open(path + ".tmp", "w") as f:
            json.dump(value, f, indent=1)
    os.replace(path + ".tmp", path)


def read_samples(path, split):
    with gzip.open(path, "rt") as f:
        for line in f:
            s = json.loads(line)
            if s["split"] == split:
                yield s


class Results:
    """Append-only JSON lines with a resumable set of finished ids. A line cut short by a kill is dropped."""

    def __init__(self, path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self.file = open(path, "a+b")
        self.file.seek(0)
        data = self.file.read()
        whole = data.rfind(b"\n") + 1
        self.file.truncate(whole)
        self.done = {json.loads(line)["id"] for line in data[:whole].splitlines()}

    def add(self, record):
        self.file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self.file.flush()
        self.done.add(record["id"])


def ahead(items, prepare):
    """(item, prepare(item)) in order, the next one prepared by a thread while this one is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            ready, waiting = waiting, (item, pool.submit(prepare, item))
            if ready:
                yield ready[0], ready[1].result()
        if waiting:
            yield waiting[0], waiting[1].result()


def drive(lab, name, items, prepare, measure):
    """Run measure(item, prepare(item)) → record over the items that are not done yet; returns how many are left."""
    args = lab.args
    results = Results(os.path.join(args.out, f"{name}.{args.split}.jsonl"))
    todo = [i for i in items if i["id"] not in results.done]
    start, done = time.time(), 0
    for item, ready in ahead((i for i in todo if time.time() < args.end), prepare):
        results.add(measure(item, ready))
        done += 1
        if done % 10 == 0 or time.time() >= args.end:
            print(f"{name}: {done} of {len(todo)}, {done / (time.time() - start):.2f} a second", file=sys.stderr)
    left = len(todo) - done
    print(json.dumps({"mode": name, "done": len(results.done), "left": left,
                      "per_second": round(done / max(time.time() - start, 1e-9), 3)}))
    return left
