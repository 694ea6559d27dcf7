#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The lab's data, end to end and small: text → documents in splits → samples → traces by a random Llama.

What traces say is compared with a second computation: transformers' own eager attention in fp32, and the C
reader's utilities from the stored keys and queries. Prints TAP; skips, with the reason, without torch or transformers.
"""
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("KVT_BUILD", ROOT / "build"))
PLAN = 24


class Tap:
    def __init__(self):
        self.count, self.failed = 0, 0
        print(f"1..{PLAN}", flush=True)

    def ok(self, good, what):
        self.count += 1
        self.failed += not good
        print(f"{'ok' if good else 'not ok'} {self.count} - {what}", flush=True)


class Words:
    """A tokenizer for tests: a token is a word with the space before it, or a run of newlines."""

    def __init__(self):
        self.vocab = {}

    def __call__(self, text, add_special_tokens=False, return_offsets_mapping=False):
        spans = [m.span() for m in re.finditer(r"\n+| ?[^\s]+| +|\t+", text)]
        return {"input_ids": [self.vocab.setdefault(text[a:b], len(self.vocab)) for a, b in spans],
                "offset_mapping": spans}

    def get_vocab(self):
        return {t.replace("\n", "\u010a"): i for t, i in self.vocab.items()}


def made_up(rng, words):
    """Paragraphs of random words: no two texts share a run of eight."""
    return "\n\n".join(" ".join(rng.choice(words) for _ in range(rng.randint(40, 90))) + "." for _ in range(120))


def check_corpus(tap):
    rng = random.Random(1)
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9))) for _ in range(3000)]
    one, other = made_up(rng, words), made_up(rng, words)
    seen = corpus.Seen()
    tap.ok(seen.contained(one) == 0, "a first text is new")
    tap.ok(seen.contained(other) < 0.05, "another one is not taken for its copy")
    half = one[:len(one) // 2] + made_up(rng, words)[:len(one) // 2]
    tap.ok(0.35 < seen.contained(half) < 0.65, "half a copy is seen as half")
    tap.ok(seen.contained(one.upper().replace(". ", ".\n")) > 0.99, "letters and line ends do not hide a copy")

    notice = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software."
    text = corpus.clean(f"{one[:300]}\n\n{notice}\n\n\n\n\x07{other[:300]}   \n")
    tap.ok("hereby" not in text and "\x07" not in text and "\n\n\n" not in text and other[:200] in text,
           "licence paragraphs, control characters and empty lines are removed, text stays")
    share = "see also the other pages of this manual, which say more about it and its like"
    docs = [{"text": f"{made_up(rng, words)}\n\n{share}"} for _ in range(4)]
    corpus.drop_boilerplate(docs)
    tap.ok(all(share not in d["text"] and len(d["text"]) > 1000 for d in docs), "a paragraph of four documents goes")

    source = corpus.SOURCES[6]
    splits = [corpus.split_of(source._replace(split=None), f"file{i}") for i in range(2000)]
    share = {s: splits.count(s) / 2000 for s, _ in corpus.SPLITS}
    tap.ok(all(abs(share[s] - x) < 0.03 for s, x in corpus.SPLITS), f"files fall into splits by their names: {share}")
    tap.ok(all(corpus.split_of(s, "x") == "test" for s in corpus.SOURCES if s.domain == "novel"),
           "the held-out domain is for tests alone")

    docs = []
    for split in ("train", "valid", "calib", "test"):
        for i in range(8):
            for domain in ("prose", "code") + (("novel",) if split == "test" else ()):
                text = "\n\n".join(made_up(rng, words) for _ in range(1 + i % 4))
                docs.append({"source": f"{'ab'[i % 2]}/{split}-{domain}-{i}", "split": split, "domain": domain,
                             "text": text})
            turns = [["user" if j % 2 == 0 else "assistant", " ".join(rng.choice(words) for _ in range(25))]
                     for j in range(60)]
            docs.append({"source": f"talk/{split}-{i}", "split": split, "domain": "chat", "turns": turns})
    return docs


def check_samples(tap, docs):
    tok = Words()
    made = samples.make(docs, tok, scale=0.02, seed=3)
    again = samples.make(docs, Words(), scale=0.02, seed=3)
    tap.ok(made == again and made != samples.make(docs, Words(), scale=0.02, seed=4), "samples follow from the seed")
    where = {d["source"]: d["split"] for d in docs}
    tap.ok(all(where[s["source"]] == s["split"] for s in made) and len({s["id"] for s in made}) == len(made),
           f"{len(made)} samples: each in its document's split, ids differ")
    cuts = [(s, c) for s in made for c in s["cuts"]]
    tap.ok(all(0 < c["prompt"] and c["queries"] > 0 and (c["branch"] or c["generate"]
                                                          or c["prompt"] + c["queries"] <= len(s["tokens"]))
               and c["prompt"] <= len(s["tokens"]) for s, c in cuts), "cuts and their futures lie in the document")
    tap.ok(all(512 <= len(s["tokens"]) <= (8192 if s["domain"] == "long" else 4600) for s in made)
           and all(len(s["tokens"]) > 6000 for s in made if s["domain"] == "long"), "lengths are within their limits")
    tap.ok({s["domain"] for s in made if s["split"] == "train"} == {"prose", "code", "chat", "task"}
           and {"novel", "long"} <= {s["domain"] for s in made if s["split"] == "test"}, "domains are where they belong")
    asked = [c for s, c in cuts if s["domain"] in ("task", "chat") and s["split"] != "test"]
    share = sum(c["before"] for c in asked) / len(asked)
    tap.ok(0.4 <= share <= 0.7, f"{share:.0%} of the cuts of tasks and chat come before the question")
    five = [s for s in made if sum(bool(c["branch"] or c["generate"]) for c in s["cuts"]) == 5]
    tap.ok(five and all(s["split"] == "test" for s in five)
           and all(len({(c["prompt"], c["context"]) for c in s["cuts"] if c["branch"] or c["generate"]}) == 1
                   for s in five), f"{len(five)} test documents have five continuations of one prompt")

    hay, rng = tasks.Haystack.from_texts([d["text"] for d in docs if d["domain"] == "prose"], tok), random.Random(5)
    names = {i: t for t, i in tok.vocab.items()}
    good = True
    for task in tasks.TASKS:
        m = tasks.build(task, 900, rng, hay, tok)
        good &= len(m["context"]) == 900 and len(m["questions"]) == (1 if task in ("needle", "passkey") else 5)
        names.update({i: t for t, i in tok.vocab.items()})
        text = "".join(names[i] for i in m["context"])
        good &= all("".join(names[i] for i in a).strip(" .") in text for _, a in m["questions"])
        good &= len({tuple(q) for q, _ in m["questions"]}) == len(m["questions"])
    tap.ok(good, "every task: a context of the length asked for, different questions, answers in the context")
    try:
        tasks.build("lookup", 40, rng, hay, tok)
        refused = False
    except ValueError as e:
        refused = "length: 40" in str(e)
    tap.ok(refused, "a context too short for its facts is refused")
    return made


# ---- traces -----------------------------------------------------------------------------------------------------


def chunk(path, kind, lane, cut=0, dtype="float32"):
    args = [BUILD / "kvtier-trace", "cat", path, kind, "--lane", str(lane), "--raw"]
    if kind in ("umax", "umean"):
        args += ["--cut", str(cut)]
    return numpy.frombuffer(subprocess.run(args, capture_output=True, check=True).stdout, dtype)


def reference(model, ids, prompt, n):
    """Utilities by eager attention over all of ids; n queries from row `prompt` on."""
    with torch.inference_mode():
        att = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    a = torch.stack([x[0] for x in att])[:, :, prompt:prompt + n, :prompt]
    a = a.view(LAYERS, HEADS, GROUP, n, prompt)
    return a.amax(2).sum(2), a.mean(2).sum(2)


def far(path, kind, cut, want):
    """Largest difference of a kind's lanes from [layers, heads, P], relative to the largest value."""
    got = numpy.stack([chunk(path, kind, lane, cut) for lane in range(LAYERS * HEADS)])
    want = want.reshape(LAYERS * HEADS, -1).numpy()
    return abs(got - want).max() / abs(want).max() if got.shape == want.shape else float("inf")


def check_traces(tap, tmp):
    rng = random.Random(2)

    def cut(prompt, queries, context, branch=None, n=0, before=True):
        return samples.cut(prompt, queries, context, before, branch, n)

    ids = [rng.randrange(VOCAB) for _ in range(150)]
    todo = [{"id": "valid-a", "split": "valid", "source": "book/one", "domain": "prose", "task": "", "tokens": ids,
             "cuts": [cut(90, 60, 0), cut(31, 7, 1, before=False), cut(80, 3, 2, [4, 9, 2]), cut(80, 5, 2, [1, 1, 7, 3, 8]),
                      cut(64, 6, 3, None, 6), cut(64, 6, 3, None, 6)]},
            {"id": "train-a", "split": "train", "source": "book/two", "domain": "task", "task": "needle",
             "tokens": ids[:77], "cuts": [cut(60, 17, 0)]}]
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS * GROUP,
        num_key_value_heads=HEADS, head_dim=16, vocab_size=VOCAB, initializer_range=0.15,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    left = traces.run(model, todo, tmp, 2)
    path = tmp / "valid" / "valid-a.kvtr"
    done = subprocess.run([BUILD / "kvtier-trace", "verify", tmp], capture_output=True, text=True, check=False)
    tap.ok(left == 0 and path.exists() and done.returncode == 0, "all is written, and verifies " + done.stdout[:200])
    model.set_attn_implementation("eager")
    worst = 0.0
    for i, c in enumerate(todo[0]["cuts"]):
        all_ids = ids[:c["prompt"]] + c["branch"] if c["branch"] else ids
        umax, umean = reference(model, all_ids, c["prompt"], len(c["branch"] or ()) or c["queries"])
        worst = max(worst, far(path, "umax", i, umax), far(path, "umean", i, umean))
    tap.ok(worst < 5e-3, f"utilities of cuts, branches and sampled branches are those of eager attention: {worst:.1e}")

    again = tmp / "again.kvtr"
    subprocess.run([BUILD / "kvtier-trace", "cut", path, "-o", again, "--at", "90:60"], capture_output=True, check=True)
    worst = max(abs(chunk(path, kind, lane, 0) - chunk(again, kind, lane, len(todo[0]["cuts"]))).max()
                for kind in ("umax", "umean") for lane in range(LAYERS * HEADS))
    tap.ok(worst < 1e-3, f"the same from the stored keys and queries in C: {worst:.1e}")
    again.unlink()

    worst = 0.0
    gram_worst = 0.0
    for lane in range(LAYERS * HEADS):
        wo = model.model.layers[lane // HEADS].self_attn.o_proj.weight.detach()
        wo = wo[:, lane % HEADS * GROUP * 16:][:, :GROUP * 16]
        v = torch.tensor(chunk(path, "v", lane, dtype="float16").reshape(-1, 16)).float()
        norm = torch.stack([(v @ wo[:, g * 16:(g + 1) * 16].T).norm(dim=1) for g in range(GROUP)]).mean(0).numpy()
        worst = max(worst, abs(chunk(path, "vnorm", lane) / norm - 1).max())
        gram = chunk(tmp / "model.kvtr", "gram", lane).reshape(GROUP * 16, -1)
        gram_worst = max(gram_worst, abs(gram - (wo.T @ wo).numpy()).max())
    tap.ok(worst < 1e-3 and gram_worst < 1e-4, f"value norms {worst:.1e} and Gram matrices {gram_worst:.1e} are W_o's")
    info = subprocess.run([BUILD / "kvtier-trace", "info", path], capture_output=True, text=True, check=True).stdout
    queries = subprocess.run([BUILD / "kvtier-trace", "cat", tmp / "train" / "train-a.kvtr", "q"], capture_output=True,
                             check=False)
    tap.ok("book/one" in info and queries.returncode == 1, "the header names the document; training traces have no queries")

    stamp = path.stat().st_mtime_ns
    branches = (tmp / "generated.jsonl").read_text()
    (tmp / "train" / "train-a.kvtr").unlink()
    traces.run(model, todo, tmp, 1)
    tap.ok(path.stat().st_mtime_ns == stamp and (tmp / "train" / "train-a.kvtr").exists(), "a second run writes what is missing")
    path.unlink()
    for c in todo[0]["cuts"]:
        c["branch"] = None if c["generate"] else c["branch"]
    traces.run(model, todo, tmp, 1)
    tap.ok(path.exists() and (tmp / "generated.jsonl").read_text() == branches, "sampled continuations are kept and used again")


def main():
    tap = Tap()
    docs = check_corpus(tap)
    check_samples(tap, docs)
    with tempfile.TemporaryDirectory(prefix="kvtier-") as tmp:
        check_traces(tap, pathlib.Path(tmp))
    if tap.count != PLAN:
        print(f"# {tap.count} checks ran, {PLAN} were planned")
    return 1 if tap.failed or tap.count != PLAN else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import numpy
        import torch
        import transformers
    except ImportError as e:
        print(f"1..0 # SKIP cannot import {e.name}: .ci/deps model installs it")
        sys.exit(0)
    for needed in ("kvtier-trace", "libkvtier-lab.so"):
        if not (BUILD / needed).exists():
            print(f"Bail out! {needed} is not built: make")
            sys.exit(1)
    sys.path.insert(0, str(ROOT / "policy" / "lab"))
    import corpus
    import samples
    import tasks
    import traces

    LAYERS, HEADS, GROUP, VOCAB = 2, 2, 3, 97
    torch.set_num_threads(2)
    sys.exit(main())
