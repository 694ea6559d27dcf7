# SPDX-License-Identifier: MIT
"""Task items of a split: which there are, and one in full when its turn comes. Deterministic by --seed.

An item is a task, a length and a document of the split that its filler text comes from: the cluster that
intervals go by. {"id", "task", "source", "seed", "length", ...}, then "context" and "questions" [(q, a), ...].
"""
import random

import tasks
from record import read_samples

SHORTEST, LONGEST = 1000, 4000
ONE = ("needle", "passkey")  # tasks with one question to a context


def names():
    return list(tasks.TASKS)


class Filler:
    """Prose documents of a split as paragraphs, each with its source."""

    def __init__(self, path, split, tok):
        ends = {t: i for t, i in tok.get_vocab().items() if t.endswith("\u010a")}
        self.get_vocab = lambda: ends  # what Haystack asks of a tokenizer, once for all documents
        self.docs = []
        for s in sorted(read_samples(path, split), key=lambda s: s["id"]):
            if not s.get("task") and s["domain"] == "prose":
                try:
                    self.docs.append((s["source"], tasks.Haystack.from_tokens([s["tokens"]], self).docs[0]))
                except ValueError:  # no line of any length
                    pass
        if not self.docs:
            raise ValueError(f"{path}: no prose in the {split} split")

    def haystack(self, at, length):
        """Document `at`, and as many of the next ones as a context of this length needs."""
        out, have = [], 0
        while have < length and len(out) < len(self.docs):
            out.append(self.docs[(at + len(out)) % len(self.docs)][1])
            have += sum(map(len, out[-1]))
        return tasks.Haystack(out)


def filler(lab, split):
    if split not in lab.filler:
        lab.filler[split] = Filler(lab.args.samples, split, lab.tok)
    return lab.filler[split]


def build(lab, split=None, n=None, which=None):
    """Items of n questions of every task that counts: --tasks, or those that prepare kept; the tasks take turns."""
    args = lab.args
    split, n = split or args.split, n or args.n
    which = which or (args.tasks.split(",") if args.tasks else lab.found.get("tasks", {}).get("kept") or names())
    low, high = args.shortest or SHORTEST, args.longest or LONGEST
    docs, out = filler(lab, split).docs, []
    for i in range(n):
        for task in which:
            if i * (1 if task in ONE else tasks.QUESTIONS) >= n:
                continue
            rng = random.Random(f"{args.seed}/{split}/{task}/{i}")
            doc = rng.randrange(len(docs))
            out.append({"id": f"{task}/{i}", "task": task, "split": split, "doc": doc, "source": docs[doc][0],
                        "length": rng.randint(low, high), "seed": rng.getrandbits(62)})
    return out


def fill(lab, item):
    """Add context and questions: token ids."""
    rng, length = random.Random(item["seed"]), item["length"]
    every = filler(lab, item["split"])
    hay = every.haystack(item["doc"], length)
    while True:
        try:
            made = tasks.build(item["task"], length, rng, hay, lab.tok)
            break
        except ValueError:  # this text does not do (too few long paragraphs): any of the split, then more of it
            if length > 2 * LONGEST:
                raise
            hay, length = tasks.Haystack([d for _, d in every.docs]), length + 250
    item["context"], item["questions"] = made["context"], [(list(q), list(a)) for q, a in made["questions"]]
    return item
