#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Corpus → samples.jsonl.gz: token ids and cut points, a document a line; traces.py runs the model over them.

    python3 policy/lab/samples.py [--corpus build/corpus/corpus.jsonl.gz] [--out build/samples/samples.jsonl.gz]
                                  [--scale 1.0] [--seed 1]

{"id", "split", "source", "domain", "task", "tokens": [ids], "cuts": [{"prompt", "queries", "context", "before",
"branch": [ids] or null, "generate": n or 0}]}. A cut without branch is followed by rows [prompt, prompt + queries) of
the tokens; with `branch`, by those tokens instead; with `generate`, by that many that the model samples. Cuts with
equal context and prompt are independent continuations. `before`: whatever is asked comes after the cut.

Domains of training, validation, calibration and test: 40 % prose and documentation, 25 % code and manuals, 10 % chat,
25 % tasks. Only in the test split: "novel", a kind of text never trained on, and "long", 6,144 to 8,192 tokens.
Deterministic by corpus, tokenizer and seed.
"""
import argparse
import collections
import gzip
import json
import math
import pathlib
import random
import re

import corpus
import tasks

COUNTS = {"train": 900, "valid": 120, "calib": 60, "test": 240}
MIX = (("prose", 0.40), ("code", 0.25), ("chat", 0.10), ("task", 0.25))
NOVEL, LONG = 40, 30
GENERATE = {"prose": 48, "novel": 12}  # test documents that get five sampled continuations
MIN, MAX, LONG_MIN, LONG_MAX = 512, 4096, 6144, 8192
FUTURE = 64, 256
SAMPLED = 128  # tokens of a sampled continuation
CONTINUATIONS = 5


def draw_length(rng):
    """512 to 4,096, mean about 1,900: mostly log-uniform."""
    if rng.random() < 0.25:
        return rng.randint(MIN, MAX)
    return round(math.exp(rng.uniform(math.log(MIN), math.log(MAX))))


def cut(prompt, queries, context, before=True, branch=None, generate=0):
    return {"prompt": prompt, "queries": queries, "context": context, "before": before, "branch": branch,
            "generate": generate}


class Builder:
    def __init__(self, docs, tok, seed, split):
        self.tok, self.split, self.rng = tok, split, random.Random(f"{seed}/{split}")
        self.docs, self.shelves = collections.defaultdict(list), {}
        for d in docs:
            if d["split"] == split:
                self.docs[d["domain"]].append(d)

    def ids(self, text):
        return self.tok(text, add_special_tokens=False)["input_ids"]

    # ---- windows of plain text ------------------------------------------------------------------------------

    def shelf(self, domains):
        """Reading positions of all documents of the domains, by package. Kept: no text is taken twice."""
        for domain in domains:
            if domain not in self.shelves:
                packages = collections.defaultdict(list)
                for d in self.docs[domain]:
                    packages[d["source"].split("/")[0]].append([d, 0])
                for name in sorted(packages):
                    self.rng.shuffle(packages[name])
                self.shelves[domain] = [packages[name] for name in sorted(packages)]
        return [row for domain in domains for row in self.shelves[domain]]

    def window(self, shelf, want):
        """(source, `want` tokens) from where a document was last left, at a paragraph; the packages take turns and
        a document goes to the end of its package's row. None when nothing as long is left."""
        for _ in range(len(shelf)):
            row = shelf.pop(0)
            shelf.append(row)
            for i, (doc, pos) in enumerate(row):
                text = doc["text"]
                if len(text) - pos < 3 * want:
                    continue
                enc = self.tok(text[pos:pos + 8 * want], add_special_tokens=False, return_offsets_mapping=True)
                ids = enc["input_ids"][:want]
                if len(ids) < want:
                    continue
                nxt = text.find("\n\n", pos + enc["offset_mapping"][want - 1][1] + self.rng.randrange(4000))
                row.pop(i)
                row.append([doc, nxt + 2 if nxt >= 0 else len(text)])
                return doc["source"], ids
        return None

    def plain(self, domain, count, lengths=draw_length, low=0.3, label=None):
        """Documents with three to five cuts at any place; what follows is the text itself."""
        out, shelf = [], self.shelf((domain,) if isinstance(domain, str) else domain)
        for _ in range(count):
            found = self.window(shelf, lengths(self.rng))
            if not found:
                continue
            source, ids = found
            cuts = []
            for _ in range(self.rng.randint(3, 5)):
                future = self.rng.randint(FUTURE[0], min(FUTURE[1], len(ids) // 4))
                cuts.append(cut(self.rng.randint(int(low * len(ids)), len(ids) - future), future, len(cuts)))
            out.append(self.sample(label or domain, source, ids, cuts))
        return out

    def sampled(self, domain, count):
        """Test documents with five continuations, sampled from the model, at one of two prompt lengths."""
        out, shelf = [], self.shelf((domain,))
        for i in range(count):
            at = (1024, 2048)[i % 2]
            found = self.window(shelf, at + FUTURE[1])
            if not found:
                continue
            source, ids = found
            cuts = [cut(at, SAMPLED, 0, generate=SAMPLED) for _ in range(CONTINUATIONS)]
            cuts += [cut(p, self.rng.randint(*FUTURE), 1 + i) for i, p in enumerate((at, at // 2, 3 * at // 4))]
            out.append(self.sample(domain, source, ids, cuts))
        return out

    def sample(self, domain, source, ids, cuts, task=""):
        return {"id": "", "split": self.split, "source": source, "domain": domain, "task": task, "tokens": ids,
                "cuts": cuts}

    # ---- tasks ------------------------------------------------------------------------------------------------

    def tasks(self, count, lengths=draw_length, label="task", branches=False, kinds=tasks.TASKS):
        """Contexts of one document each, questions after them. Cuts: before all of them, after one (then its
        answer follows), inside the context; in the test split five branches, a question each."""
        out, room = [], max(lengths(random.Random(i)) for i in range(64))
        long = [d for d in self.docs["prose"] if len(d["text"]) > 6 * room] or self.docs["prose"]
        hay = {}
        for i in range(count):
            task, doc = kinds[i % len(kinds)], long[(i // 2) % len(long)]
            if doc["source"] not in hay:
                hay[doc["source"]] = tasks.Haystack.from_texts([doc["text"][:200000]], self.tok)
            for attempt in range(20):
                length = max(700, lengths(self.rng) - 200)
                try:
                    made = tasks.build(task, length, self.rng, hay[doc["source"]], self.tok)
                    break
                except ValueError:
                    continue
            else:
                continue
            out.append(self._task_sample(label, doc["source"], made, branches))
        return out

    def _task_sample(self, label, source, made, branches):
        ids, spans = list(made["context"]), []
        for q, a in made["questions"]:
            spans.append((len(ids), len(ids) + len(q), len(ids) + len(q) + len(a)))
            ids += q + a
        c = len(made["context"])
        cuts = [cut(c, min(len(ids) - c, FUTURE[1]), 0)]
        inside = self.rng.randint(int(0.4 * c), c - FUTURE[1])
        cuts.append(cut(inside, self.rng.randint(*FUTURE), 1))
        for k, (_, at, end) in enumerate(self.rng.sample(spans, min(2, len(spans)))):
            cuts.append(cut(at, end - at, 2 + k, before=False))
        if branches:
            many = made["questions"]
            cuts += [cut(c, len(q) + len(a), len(cuts), branch=q + a) for q, a in many] if len(many) > 1 else []
        for x in cuts:
            if x["branch"]:
                x["context"] = 9
        return self.sample(label, source, ids, cuts, made["task"])

    # ---- chat -------------------------------------------------------------------------------------------------

    def chat(self, count):
        """Conversations in the model's chat template, two of three between people, one of three about a glossary.
        Cuts: before a user's turn, and after it (then the answer follows)."""
        people = [d for d in self.docs["chat"]]
        books = [d for d in self.docs["prose"] if d["source"].startswith("dict-foldoc/")]
        self.rng.shuffle(people)
        out = []
        while len(out) < count and people:
            if len(out) % 3 == 2 and books:
                doc = self.rng.choice(books)
                source, turns = doc["source"], self._glossary(doc["text"])
            else:
                source, turns = people[-1]["source"], people.pop()["turns"]
                want = draw_length(self.rng)  # longer than one conversation: the same two go on with another
                while people and sum(len(t) for _, t in turns) < 4 * want - 2000:
                    turns = turns + people.pop()["turns"]
            made = self._chat_sample(source, turns) if turns else None
            if made:
                out.append(made)
        return out

    def _glossary(self, text):
        entries = [e.split("\n", 1) for e in text.split("\n\n") if "\n" in e and len(e) < 900]
        entries = [(h, re.sub(r"\s+", " ", re.sub(r"^<[^>]*>\s*", "", b))) for h, b in entries if 2 < len(h) < 40]
        entries = [(h, b) for h, b in entries if len(b) > 40 and b[0].isalpha()]
        if len(entries) < 8:
            return None
        entries = entries[:self.rng.randint(8, min(28, len(entries)))]
        turns = [["user", "Here is a glossary. I will ask you about it.\n\n" + "\n\n".join(f"{h}: {b}" for h, b in entries)],
                 ["assistant", "Thank you. What would you like to know?"]]
        for h, b in self.rng.sample(entries, min(6, len(entries))):
            turns.append(["user", self.rng.choice(("What does {} mean?", "According to the glossary, what is {}?",
                                                   "Please explain {}.")).format(h)])
            turns.append(["assistant", re.split(r"(?<=[a-z)]\.) ", b)[0]])
        return turns

    def _chat_sample(self, source, turns):
        ids = self.ids("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
                       "<|im_end|>\n")
        places = []  # (start of the user's turn, start of the answer's text, end of the answer)
        for role, text in turns:
            start = len(ids)
            head = self.ids(f"<|im_start|>{role}\n")
            turn = head + self.ids(text + "<|im_end|>\n")
            if len(ids) + len(turn) > MAX:
                break
            ids += turn
            if role == "user":
                asked = start
            elif places is not None:
                places.append((asked, start + len(head), len(ids)))
        places = [p for p in places if p[0] >= len(ids) // 3 and p[2] - p[1] >= 8]
        if len(ids) < MIN or len(places) < 2:
            return None
        cuts = []
        for i, (asked, answer, end) in enumerate(self.rng.sample(places, min(4, len(places)))):
            if i % 2 == 0:
                future = max(min(end - asked, FUTURE[1]), min(FUTURE[0], len(ids) - asked))
                cuts.append(cut(asked, future, i))
            else:
                cuts.append(cut(answer, min(end - answer, FUTURE[1]), i, before=False))
        return self.sample("chat", source, ids, cuts)


def make(docs, tok, scale=1.0, seed=1):
    """All samples, in the order in which they are written."""
    def scaled(n):
        return max(1, round(n * scale))

    out = []
    for split, total in COUNTS.items():
        b = Builder(docs, tok, seed, split)
        parts = []
        for domain, share in MIX:
            n, test = scaled(total * share), split == "test"
            if domain == "chat":
                parts += b.chat(n)
            elif domain == "task":
                parts += b.tasks(n, branches=test)
            else:
                k = min(n, scaled(GENERATE.get(domain, 0))) if test and domain in GENERATE else 0
                parts += b.plain(domain, n - k) + (b.sampled(domain, k) if k else [])
        if split == "test":
            def stretch(rng):
                return rng.randint(LONG_MIN, LONG_MAX)

            n, k = scaled(NOVEL), scaled(GENERATE["novel"])
            parts += b.plain("novel", n - k) + b.sampled("novel", k)
            n = scaled(LONG)
            parts += b.plain(("prose", "code"), n - n // 3, stretch, 0.7, "long")
            parts += b.tasks(n // 3, stretch, "long", True)
        count = collections.Counter()
        for s in parts:
            s["id"] = f"{split}-{s['domain']}-{count[s['domain']]:04d}"
            count[s["domain"]] += 1
        out += parts
    return out


def write(path, samples):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as f:
        for s in samples:
            f.write((json.dumps(s, separators=(",", ":")) + "\n").encode())


def load(path, splits=None):
    """Samples of a file, of the splits named or all."""
    with gzip.open(path, "rt") as f:
        return [s for s in map(json.loads, f) if splits is None or s["split"] in splits]


def haystack_of(path, split, tok):
    """A haystack of the plain prose of one split of a samples file."""
    return tasks.Haystack.from_tokens([s["tokens"] for s in load(path, {split})
                                       if s["domain"] == "prose" and not s["task"]], tok)


def summary(samples):
    rows = collections.defaultdict(list)
    for s in samples:
        rows[s["split"], s["domain"]].append(s)
    for (split, domain), x in rows.items():
        cuts = [c for s in x for c in s["cuts"]]
        print(f"{split:6} {domain:6} {len(x):4} documents, {len({s['source'] for s in x}):4} sources, mean "
              f"{sum(len(s['tokens']) for s in x) / len(x):5.0f} tokens, {len(cuts):4} cuts, "
              f"{sum(c['before'] for c in cuts) / len(cuts):4.0%} before the question, "
              f"{sum(bool(c['branch'] or c['generate']) for c in cuts):4} branches")


def main():
    p = argparse.ArgumentParser(description="Cut samples out of the corpus.")
    p.add_argument("--corpus", default="build/corpus/corpus.jsonl.gz")
    p.add_argument("--out", default="build/samples/samples.jsonl.gz")
    p.add_argument("--scale", type=float, default=1.0, help="share of the documents to make (default 1.0)")
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    import lab_model

    samples = make(corpus.load(args.corpus), lab_model.tokenizer(), args.scale, args.seed)
    write(args.out, samples)
    summary(samples)


if __name__ == "__main__":
    main()
