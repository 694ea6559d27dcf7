#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Recall as a runtime meets it: kvtierd, KvtierCache and the model, instead of the emulation in torch (recall.py).

Every item is prefilled once; each arm gets its rows, has the daemon evict down to the device budget before any
question is known, then answers each question greedily, and is right when every token of the answer is. All arms hold
the same number of rows on the device while they answer:

    full         no eviction
    drop-only    the whole budget kept, nothing comes back
    alone        a share of it kept; for each question the daemon brings back the rows that its queries want
    near         the same, with the rows around each of them

    PYTHONPATH=ipc/python python3 policy/lab/recall_real.py --n 10 --length 600

A figure of this script is a check of the path; those to be cited are loop.py's, which asks hundreds of questions.
"""
import argparse
import os
import random
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "..", "ipc", "python")]

import torch  # noqa: E402
from kvtier import Client, attention, budget  # noqa: E402
from kvtier._lib import RECALL_ALONE  # noqa: E402
from kvtier.daemon import PrivateDaemon  # noqa: E402
from kvtier.hf import KvtierCache  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import tasks  # noqa: E402

ARMS = ("full", "drop-only", "alone", "near")
ROOM = 128  # rows for a question and its answer


def filler(path, tok):
    """Text to hide facts in: the corpus's prose, or, where there is none, Python's own reference."""
    if os.path.exists(path):
        from samples import haystack_of

        return haystack_of(path, "valid", tok)
    from pydoc_data.topics import topics

    return tasks.Haystack.from_texts([topics[t] for t in sorted(topics) if len(topics[t]) > 4000], tok)


def answer(model, cache, question, n):
    """n tokens of greedy decoding behind the question."""
    ids, out = torch.tensor([question]), []
    for _ in range(n):
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        out.append(int(logits[0, -1].argmax()))
        ids = torch.tensor([out[-1:]])
    return out


class Arm:
    """One arm's cache of one item's context."""

    def __init__(self, name, model, client, rows, held, kept, policy):
        self.name, self.length = name, rows.get_seq_length()
        if name == "full":
            self.cache = rows
            return
        back = 0 if name == "drop-only" else held - kept
        self.cache = KvtierCache(model.config, client, self.length + ROOM, name="lab", recall_rows=back,
                                 recall_args={"flags": RECALL_ALONE} if name == "alone" else None,
                                 budget=budget(manual=True))
        for ours, theirs in zip(self.cache.layers, rows.layers):
            ours.update(theirs.keys, theirs.values)
        self.cache.compress(budget(held, self.length, policy=policy, manual=True))
        assert {n for layer in self.cache.layers for n in layer.counts} == {held - back}

    def right(self, model, question, wanted):
        got = answer(model, self.cache, question, len(wanted))
        if self.name == "full":
            self.cache.crop(self.length - self.cache.get_seq_length())
        else:
            self.cache.end_turn()
            self.cache.truncate(self.length)
        return got == list(wanted)

    def close(self):
        if self.name != "full":
            self.cache.close()


def measure(model, tok, haystack, client, args, say=lambda line: None):
    """{(task, arm): [right, asked]} over args.n items of each task."""
    hits, start = {}, time.monotonic()
    held = round(args.device_budget * args.length)
    kept = round(args.kept_share * held)
    for i in range(args.n):
        for task in args.tasks.split(","):
            item = tasks.build(task, args.length, random.Random(f"{args.seed}/{task}/{i}"), haystack, tok)
            rows = DynamicCache(config=model.config)
            model(torch.tensor([item["context"]]), past_key_values=rows, use_cache=True, logits_to_keep=1)
            for name in ARMS:
                arm = Arm(name, model, client, rows, held, kept, args.policy)
                for question, wanted in item["questions"]:
                    cell = hits.setdefault((task, name), [0, 0])
                    cell[0] += arm.right(model, list(question), wanted)
                    cell[1] += 1
                arm.close()
            say(f"{task}/{i}: " + ", ".join(f"{a} {hits[task, a][0]}/{hits[task, a][1]}" for a in ARMS)
                + f" ({time.monotonic() - start:.0f} s)")
    return hits


def load():
    """(model whose attention asks for rows, tokenizer)."""
    from kvtier import smollm2

    attention.register()
    model, tok = smollm2.load()
    model.set_attn_implementation(attention.NAME)
    return model, tok


def options(argv=None):
    p = argparse.ArgumentParser(description="Accuracy with recall through kvtierd, drop-only and in full.")
    p.add_argument("--n", type=int, default=10, help="items of each task (default 10)")
    p.add_argument("--tasks", default="needle,passkey,multikey,docqa", help="comma-separated")
    p.add_argument("--length", type=int, default=600, help="tokens of context")
    p.add_argument("--device-budget", type=float, default=0.2, help="rows on the device, share of the context")
    p.add_argument("--kept-share", type=float, default=0.6, help="share of these that is kept, the rest recalled")
    p.add_argument("--policy", default="knorm", help="what evicts: a policy of kvtierd")
    p.add_argument("--model-dir", help="weights for it")
    p.add_argument("--samples", default="build/samples/samples.jsonl.gz", help="whose prose is the haystack")
    p.add_argument("--seed", type=int, default=1)
    return p.parse_args(argv)


def main():
    args = options()
    torch.set_grad_enabled(False)
    model, tok = load()
    with PrivateDaemon(dram="512M", nvme="256M", model_dir=args.model_dir) as d, \
            Client(d.socket, name="recall_real") as client:
        hits = measure(model, tok, filler(args.samples, tok), client, args, lambda s: print(s, file=sys.stderr))
    print(f"{args.policy}, {args.length} tokens, {args.device_budget:.0%} on the device, questions right:")
    for task in args.tasks.split(","):
        print(f"{task:12} " + "  ".join(f"{a} {hits[task, a][0]}/{hits[task, a][1]}" for a in ARMS))


if __name__ == "__main__":
    main()
