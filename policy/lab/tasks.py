#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tasks over a haystack of text: something said far above has to be found again.

    build(task, length, rng, haystack, tok) -> {"task", "context": ids, "questions": [(question ids, answer ids), ...]}

The context has exactly `length` tokens. The questions (five; one where the context holds one fact) are independent of
each other: each follows the context directly. They are written as text to be completed, without a chat template,
because a 135M model does that well; an answer counts as right when every one of its tokens is the model's argmax
after context, question and the answer's tokens before it. The kinds of tasks are those of RULER and LongBench; none
of their texts, prompts or code is used, and scores are not comparable with theirs.

    python3 policy/lab/tasks.py --check --device cuda --n 50 --lengths 1000,2000,4000
"""
import argparse
import random
import sys
import time

TASKS = ("needle", "passkey", "lookup", "multikey", "continuation", "docqa")
QUESTIONS = 5

_ADJ = ("amber ancient blue bold brave bright calm clever cold crimson curious dark eager early fancy fierce gentle "
        "giant golden grand green happy heavy hidden hollow honest humble icy jolly kind large lively lonely lucky "
        "merry mighty modern narrow noble odd pale patient plain polite proud purple quick quiet rapid rare red rough "
        "royal rusty sharp shiny silent silver simple slow small smooth soft steep stern strange strong sunny swift "
        "tall thin tiny tired vast violet warm wild wise wooden yellow young").split()
_NOUN = ("anchor apple arrow badge barrel basket bell bird blanket boat bottle branch bridge broom bucket button camel "
         "candle canyon carpet castle chair cherry circle clock cloud coin compass copper cotton crown desert dragon "
         "drum eagle engine falcon feather fence field flute forest fountain garden gate glove guitar hammer harbor "
         "helmet hill horse island jacket jungle kettle kitten ladder lamp lantern lemon letter lion market mirror "
         "monkey mountain needle ocean orange paper pencil piano pillow planet pocket rabbit ribbon river rocket "
         "saddle sailor shadow shelf shield spoon stone sugar table temple tiger tower train tunnel turtle valley "
         "violin wagon walnut whale window winter wizard").split()
_NAME = ("Alice Anna Arthur Ben Carla Carlos Clara Daniel David Diana Edward Elena Emily Emma Eric Frank George Grace "
         "Hannah Harry Helen Henry Isaac James Jane Julia Karen Kevin Laura Leo Linda Lucas Lucy Maria Mark Martin "
         "Mary Michael Nina Oliver Oscar Paul Peter Rachel Robert Rosa Ruth Sam Sarah Simon Sofia Thomas Victor "
         "Walter").split()
_CITY = ("Amsterdam Athens Atlanta Berlin Boston Brussels Cairo Chicago Copenhagen Dallas Denver Dublin Florence Geneva "
         "Hamburg Helsinki Houston Istanbul Jakarta Lima Lisbon London Madrid Melbourne Miami Milan Montreal Moscow "
         "Munich Naples Oslo Paris Prague Rome Seattle Shanghai Singapore Stockholm Sydney Tokyo Toronto Vienna "
         "Warsaw Zurich").split()
_JOB = ("architect artist baker banker carpenter chef cook dancer dentist doctor driver engineer farmer fisherman "
        "gardener journalist judge lawyer librarian mechanic musician nurse painter photographer pilot plumber "
        "poet sailor scientist singer soldier surgeon tailor teacher writer").split()
_SURNAME = ("Abbott Baxter Bishop Carver Chandler Crawford Dalton Fletcher Foster Gibson Hawkins Holloway Jennings Keller "
            "Lambert Marsh Nolan Osborne Palmer Quinn Ramsey Sinclair Thornton Underwood Vaughn Watkins Yates").split()
_PET = "cat dog horse goat rabbit snake turtle pig sheep fox duck frog donkey monkey".split()


class Haystack:
    """Filler: documents as lists of paragraphs, a paragraph as a list of token ids that ends with its newline."""

    def __init__(self, docs):
        self.docs = [d for d in docs if d]
        if not self.docs:
            raise ValueError("haystack: no text")

    @classmethod
    def from_tokens(cls, docs, tok):
        """From token lists (samples' "tokens"), cut after every token that ends a line."""
        ends = {i for t, i in tok.get_vocab().items() if t.endswith("\u010a")}  # the vocabulary's letter for \n
        out = []
        for ids in docs:
            paragraphs, p = [], []
            for t in ids:
                p.append(t)
                if t in ends and len(p) >= 24:
                    paragraphs.append(p)
                    p = []
            out.append(paragraphs)
        return cls(out)

    @classmethod
    def from_texts(cls, texts, tok):
        return cls.from_tokens([tok(t, add_special_tokens=False)["input_ids"] for t in texts], tok)

    def take(self, rng, n):
        """Consecutive paragraphs with n tokens in all; further documents follow when one is too short."""
        out, have = [], 0
        while have < n:
            doc = rng.choice(self.docs)
            start = rng.randrange(max(1, len(doc) - max(1, int(len(doc) * n / max(1, sum(map(len, doc)))))))
            for p in doc[start:]:
                out.append(p)
                have += len(p)
                if have >= n:
                    break
        if have > n:
            out[-1] = out[-1][:len(out[-1]) - (have - n)]
        return out


def _bury(rng, paragraphs, facts):
    """The ids of the paragraphs with each fact put between two of them, anywhere with equal chance."""
    places = sorted(rng.choices(range(len(paragraphs)), k=len(facts)))
    rng.shuffle(facts)
    out = []
    for i, p in enumerate(paragraphs):
        while places and places[0] == i:
            out += facts.pop()
            places.pop(0)
        out += p
    return out


def _task(length, rng, haystack, ids, facts, questions):
    """Context of exactly `length` tokens around the facts; questions as (text, answer text)."""
    facts = [ids(f) for f in facts]
    fill = length - sum(map(len, facts))
    if fill < length // 4:
        raise ValueError(f"length: {length}, the task needs at least {2 * (length - fill)}")
    context = _bury(rng, haystack.take(rng, fill), facts)
    return {"context": context, "questions": [(ids(q), ids(a)) for q, a in questions[:QUESTIONS]]}


def _keys(rng, n):
    return [f"{a} {b}" for a, b in zip(rng.sample(_ADJ, n), rng.sample(_NOUN, n))]


def _needle(length, rng, haystack, ids):
    (key,), value = _keys(rng, 1), rng.randrange(10000, 100000)
    return _task(length, rng, haystack, ids, [f"The special magic number for the {key} is: {value}.\n"],
                 [(f"\n\nThe special magic number for the {key} is:", f" {value}")])


def _passkey(length, rng, haystack, ids):
    value = rng.randrange(10000, 100000)
    return _task(length, rng, haystack, ids, [f"The pass key is {value}. Remember it. {value} is the pass key.\n"],
                 [("\n\nWhat is the pass key? The pass key is", f" {value}")])


def _multikey(length, rng, haystack, ids):
    n = rng.randint(5, 8)
    pairs = [(k, rng.randrange(10000, 100000)) for k in _keys(rng, n)]
    facts = [f"The special magic number for the {k} is: {v}.\n" for k, v in pairs]
    rng.shuffle(pairs)
    return _task(length, rng, haystack, ids, facts,
                 [(f"\n\nThe special magic number for the {k} is:", f" {v}") for k, v in pairs])


def _lookup(length, rng, haystack, ids):
    n = 16
    pairs = list(zip(rng.sample(_NOUN, n), rng.sample(_CITY, n)))
    table = "Table of codes\n" + "".join(f"code {k} = {v}\n" for k, v in pairs) + "\n"
    rng.shuffle(pairs)
    shots, asked = pairs[:2], pairs[2:]
    start = "\n\nCodes from the table\n" + "".join(f"code {k} = {v}\n" for k, v in shots)
    return _task(length, rng, haystack, ids, [table], [(f"{start}code {k} =", f" {v}") for k, v in asked])


def _docqa(length, rng, haystack, ids):
    n, facts, questions = 5, [], []
    for first, last, city, job, pet in zip(rng.sample(_NAME, n), rng.sample(_SURNAME, n), rng.sample(_CITY, n),
                                           rng.sample(_JOB, n), rng.sample(_PET, n)):
        name, an = f"{first} {last}", "an" if job[0] in "aeiou" else "a"
        says, asks, answer = rng.choice((
            (f"was born in {city}", "In which city was {} born?", f" {city}"),
            (f"works as {an} {job}", "What is the job of {}?", f" {job}"),
            (f"has a pet {pet}", "Which animal does {} keep?", f" {pet}")))
        facts.append(f"{name} {says}.\n")
        questions.append((f"\n\nQuestion: {asks.format(name)}\nAnswer: {name} {says[:-len(answer)]}", answer))
    rng.shuffle(questions)
    return _task(length, rng, haystack, ids, facts, questions)


def _continuation(length, rng, haystack, ids, given=32, asked=8):
    """Paragraphs of the text itself: the first tokens are given, the next are asked."""
    for _ in range(200):
        paragraphs = haystack.take(rng, length)
        long = [p for p in paragraphs[:-1] if len(p) > given + asked + 1]
        if len(long) >= QUESTIONS:
            break
    else:
        raise ValueError("haystack: too few long paragraphs for the continuation task")
    lead = ids("\n\nAs was said above:\n\n")
    return {"context": [t for p in paragraphs for t in p],
            "questions": [(lead + p[:given], p[given:given + asked]) for p in rng.sample(long, QUESTIONS)]}


_BUILD = {"needle": _needle, "passkey": _passkey, "lookup": _lookup, "multikey": _multikey,
          "continuation": _continuation, "docqa": _docqa}


def build(task, length, rng, haystack, tok):
    """One context with its questions; see the top. Deterministic by rng and haystack."""
    made = _BUILD[task](length, rng, haystack, lambda text: tok(text, add_special_tokens=False)["input_ids"])
    assert len(made["context"]) == length
    return {"task": task, **made}


# ---- does the full cache solve them? ----------------------------------------------------------------------------


def solve(model, made, device, limit=QUESTIONS):
    """Per question, whether every answer token is the argmax. Contexts of equal length: one pass over all of them, then
    one over the first question of each, and so on, on the contexts' cache."""
    import torch

    right = []
    with torch.inference_mode():
        contexts = torch.tensor([m["context"] for m in made], device=device)
        cache = model.model(input_ids=contexts, use_cache=True).past_key_values
        for j in range(limit):
            rows = [m["questions"][j] if j < len(m["questions"]) else None for m in made]
            width = max((len(q) + len(a) for q, a in filter(None, rows)), default=0)
            if not width:
                break
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            for i, (q, a) in ((i, r) for i, r in enumerate(rows) if r):
                ids[i, :len(q) + len(a)] = torch.tensor(q + a)
            hidden = model.model(input_ids=ids.to(device), past_key_values=cache, use_cache=True).last_hidden_state
            cache.crop(-width)
            for i, (q, a) in ((i, r) for i, r in enumerate(rows) if r):
                at = len(q) - 1
                right.append(model.lm_head(hidden[i, at:at + len(a)]).argmax(-1).tolist() == a)
    return right


def check(model, tok, haystack, device, tasks, lengths, n, seed, questions):
    rates = {}
    for length in lengths:
        for task in tasks:
            rng, start = random.Random(f"{seed}/{task}/{length}"), time.monotonic()
            made = [build(task, length, rng, haystack, tok) for _ in range(n)]
            size = max(1, (65536 if device == "cuda" else 2048) // length)
            right = [r for i in range(0, n, size) for r in solve(model, made[i:i + size], device, questions)]
            rates[task, length] = sum(right) / len(right)
            print(f"{task:14} {length:6} tokens  {rates[task, length]:6.1%} of {len(right)} questions right  "
                  f"({time.monotonic() - start:.1f} s)", flush=True)
    return rates


def main():
    p = argparse.ArgumentParser(description="Check that the full cache solves the tasks.")
    p.add_argument("--check", action="store_true", required=True, help="print the accuracy per task and length")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--n", type=int, default=50, help="contexts per task and length (default 50)")
    p.add_argument("--lengths", default="1000,2000,4000", help="tokens of context, comma-separated")
    p.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default all)")
    p.add_argument("--questions", type=int, default=QUESTIONS, help="questions per context, at most 5")
    p.add_argument("--samples", default="build/samples/samples.jsonl.gz", help="whose plain text is the haystack")
    p.add_argument("--split", default="valid", help="of the samples (default valid)")
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    import lab_model
    from samples import haystack_of

    model, tok = lab_model.load(args.device)
    lengths = [int(x) for x in args.lengths.split(",")]
    rates = check(model, tok, haystack_of(args.samples, args.split, tok), args.device, args.tasks.split(","), lengths,
                  args.n, args.seed, args.questions)
    low = [f"{t} at {n}" for (t, n), r in rates.items() if r < 0.7]
    print("below 70 %: " + (", ".join(low) or "none"), file=sys.stderr)


if __name__ == "__main__":
    main()
