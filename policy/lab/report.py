#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tables of what loop.py measured: report.py build/loop → build/loop/tables/*.csv, results.md, *.gp.

Intervals are 95 %, bootstrapped over documents and paired; p of accuracies is McNemar's, Holm-adjusted over
the budgets of a comparison. A policy is compared with KVP, or with the best heuristic where KVP did not run.
"""
import argparse
import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np

import stats

RIVALS = ("snapkv", "tova", "h2o", "expected", "defensive", "best")
GROUPS = {"single needle": ("needle", "passkey"), "multi-key and document QA": ("multikey", "docqa")}
BAND = 0.3, 0.8  # of full accuracy that uniform budgets keep: where adaptive ones are judged


def read(folder, name):
    path = os.path.join(folder, name + ".jsonl")
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        return [json.loads(line) for line in f if line.endswith(b"\n")]


def split_name(variant):
    policy, _, share = variant.rpartition("@")
    return policy, float(share)


def variants(records, field):
    """{share: [policies]} of all records, in the order of the first."""
    out = {}
    for name in records[0][field]:
        policy, share = split_name(name)
        out.setdefault(share, []).append(policy)
    return dict(sorted(out.items()))


class Table:
    """Rows of one table: all to CSV; to Markdown, rounded, those that `brief` takes."""

    def __init__(self, name, title, columns, brief=lambda row: True):
        self.name, self.title, self.columns, self.brief, self.rows = name, title, columns, brief, []

    def add(self, *row):
        self.rows.append(row)

    def write(self, folder, out):
        with open(os.path.join(folder, self.name + ".csv"), "w", newline="") as f:
            csv.writer(f).writerows([self.columns, *self.rows])
        print(f"\n### {self.title}\n\n| {' | '.join(self.columns)} |\n|{'---|' * len(self.columns)}", file=out)
        for row in filter(self.brief, self.rows):
            print("| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) + " |", file=out)


def mib(records, variant):
    return float(np.mean([r["bytes"][variant] for r in records])) / 2 ** 20


# ---- perplexity --------------------------------------------------------------------------------------------------


def perplexity(records):
    long, ratio = (Table("perplexity", "Long-range perplexity: rise in loss over the full cache",
                         ["domain", "budget", "policy", "rise (nats)", "low", "high", "rise, all tokens",
                          "long-range tokens", "documents", "MiB held"], lambda row: row[0] == "all"),
                   Table("perplexity-ratio", "KVP's rise as a share of the rival's",
                         ["budget", "rival", "rival's rise (nats)", "share", "low", "high"]))
    every = variants(records, "nats")
    for domain in ("all", *sorted({r["domain"] for r in records})):
        some = [r for r in records if domain in ("all", r["domain"]) and r["long"]]
        sources = [r["source"] for r in some]
        rise = {}
        for share, names in every.items():
            for name in names:
                v = f"{name}@{share:g}"
                rise[v] = [r["nats"][v][0] - r["full"][0] for r in some]
                value, low, high, _ = stats.ratio(sources, rise[v], [r["long"] for r in some])
                rest = sum(r["nats"][v][1] - r["full"][1] for r in some) / sum(r["tokens"] for r in some)
                long.add(domain, share, name, value, low, high, rest, sum(r["long"] for r in some), len(some),
                         mib(some, v))
            for name in names if domain == "all" and "kvp" in names else ():
                if name != "kvp":
                    base = f"{name}@{share:g}"
                    value, low, high = stats.share(sources, rise[f"kvp@{share:g}"], rise[base])
                    ratio.add(share, name, sum(rise[base]) / sum(r["long"] for r in some), value, low, high)
    return [long, ratio]


# ---- accuracy ----------------------------------------------------------------------------------------------------


def flat(records, field, variant=None):
    """(source, hit) of every question: of a variant, or of the full cache at the same questions."""
    out = []
    for r in records:
        hits = r[field][variant] if variant else r["full"][:len(next(iter(r[field].values())))]
        out += [(r["source"], h) for h in hits]
    return [s for s, _ in out], np.array([h for _, h in out], float)


def accuracy(records):
    tables = []
    for field, title in (("unseen", "question not seen at eviction"), ("seen", "question seen at eviction")):
        some = [r for r in records if r[field]]
        if not some:
            continue
        every = variants(some, field)
        table = Table("accuracy-" + field, f"Task accuracy, {title}",
                      ["task", "budget", "policy", "accuracy", "low", "high", "full", "questions", "MiB held"],
                      lambda row: row[0] == "all")
        for task in ("all", *sorted({r["task"] for r in some})):
            part = [r for r in some if task in ("all", r["task"])]
            full = flat(part, field)[1].mean()
            for share, names in every.items():
                for name in names:
                    sources, hits = flat(part, field, f"{name}@{share:g}")
                    value, low, high, _ = stats.mean(sources, hits)
                    table.add(task, share, name, value, low, high, full, len(hits), mib(part, f"{name}@{share:g}"))
        tables += [table, compare(some, field, title, every)]
    return tables


def compare(records, field, title, every):
    ours = "kvp" if any("kvp" in names for names in every.values()) else "best"
    table = Table("compare-" + field, f"{ours} against rivals, all tasks, {title} (points)",
                  ["rival", "budget", "difference", "low", "high", "only ours", "only rival's", "p (McNemar)",
                   "p (Holm)"])
    for rival in RIVALS:
        rows = []
        for share, names in every.items():
            if ours in names and rival in names and rival != ours:
                sources, a = flat(records, field, f"{ours}@{share:g}")
                b = flat(records, field, f"{rival}@{share:g}")[1]
                value, low, high, _ = stats.mean(sources, 100 * (a - b))
                rows.append((rival, share, value, low, high, *stats.mcnemar(a, b)))
        for row, p in zip(rows, stats.holm([r[-1] for r in rows])):
            table.add(*row, float(p))
    return table


# ---- adaptive budgets --------------------------------------------------------------------------------------------


def adaptive(records):
    table = Table("adaptive", "Adaptive against uniform budgets of equal rows (points)",
                  ["policy", "question", "task", "budget", "full", "uniform", "adaptive", "difference", "low", "high",
                   "p (Holm)", "questions", "in the band"], lambda row: row[-1] or row[2] == "all")
    pooled = Table("adaptive-pooled", f"The same where uniform keeps {BAND[0]:.0%} to {BAND[1]:.0%} of full accuracy",
                   ["policy", "question", "cells", "questions", "difference", "low", "high"])
    for field in ("unseen", "seen"):
        some = [r for r in records if r[field]]
        every = variants(some, field) if some else {}
        pairs = sorted({n for names in every.values() for n in names if "+" in n})
        for label in pairs:
            name, cells = label.partition("+")[0], []
            for task in ("all", *sorted({r["task"] for r in some})):
                part = [r for r in some if task in ("all", r["task"])]
                rows, full = [], flat(part, field)[1].mean()
                for share in every:
                    sources, u = flat(part, field, f"{name}@{share:g}")
                    a = flat(part, field, f"{label}@{share:g}")[1]
                    value, low, high, _ = stats.mean(sources, 100 * (a - u))
                    inside = BAND[0] * full <= u.mean() <= BAND[1] * full
                    rows.append((label, field, task, share, full, u.mean(), a.mean(), value, low, high,
                                 stats.mcnemar(a, u)[2], len(u), int(inside)))
                    if inside and task != "all":
                        cells.append((sources, 100 * (a - u)))
                for row, p in zip(rows, stats.holm([r[10] for r in rows])):
                    table.add(*row[:10], float(p), *row[11:])
            if cells:
                sources = [s for c in cells for s in c[0]]
                diff = np.concatenate([c[1] for c in cells])
                pooled.add(label, field, len(cells), len(diff), *stats.mean(sources, diff)[:3])
    return [table, pooled]


# ---- recall ------------------------------------------------------------------------------------------------------


def recall(records):
    first = records[0]
    arms = ["full", "seen"] + [a for a in first["hits"] if a not in ("full", "seen")]
    table = Table("recall", f"Recall, base {first['base']}, equal peak rows, {first['kept'] / first['held']:.0%} of "
                  f"them kept, +near: {first['near'][0]} rows before and {first['near'][1]} after a hit",
                  ["tasks", "arm", "accuracy", "of full", "low", "high", "loss recovered", "low ", "high ",
                   "questions"])
    for group in ("all", *GROUPS, *sorted({r["task"] for r in records})):
        part = [r for r in records if group == "all" or r["task"] in GROUPS.get(group, (group,))]
        if not part:
            continue
        sources = [r["source"] for r in part for _ in r["hits"]["full"]]
        hit = {a: np.array([h for r in part for h in r["hits"][a]], float) for a in arms}
        for a in arms:
            value, low, high, _ = stats.ratio(sources, hit[a], hit["full"])
            back = stats.share(sources, hit[a] - hit["drop-only"], hit["full"] - hit["drop-only"])
            table.add(group, a, hit[a].mean(), value, low, high, *back, len(hit[a]))
    found = Table("recall-mass", "Attention of the answer's queries on demoted rows: what recall brought back",
                  ["arm", "recall@k", "low", "high", "of all demoted", "summaries read (KiB)", "keys read (KiB)",
                   "moved (KiB)"])
    for a in first["mass"]:
        mass = np.array([np.sum(r["mass"][a], 0) for r in records])
        value, low, high, _ = stats.ratio([r["source"] for r in records], mass[:, 0], mass[:, 1])
        cost = np.mean([r["cost"][a] for r in records], 0) / 1024
        found.add(a, value, low, high, float(mass[:, 0].sum() / mass[:, 2].sum()), *map(float, cost))
    return [table, found]


# ---- plots -------------------------------------------------------------------------------------------------------

PLOTS = {"accuracy-unseen": ("accuracy", 4, 5, 6, "Task accuracy, question not seen at eviction"),
         "accuracy-seen": ("accuracy", 4, 5, 6, "Task accuracy, question seen at eviction"),
         "perplexity": ("rise in loss on long-range tokens (nats)", 4, 5, 6, "Long-range perplexity")}


def plot(folder, table):
    """A gnuplot script beside the CSV, and its SVG when gnuplot is there."""
    label, y, low, high, title = PLOTS[table.name]
    names = list(dict.fromkeys(r[2] for r in table.rows if r[2] not in ("random",)))
    lines = [f"""  '< awk -F, ''$1=="all" && $3=="{n}"'' {table.name}.csv' using ($2*100):{y}:{low}:{high} """
             f"""with yerrorlines title '{n}'""" for n in names]
    path = os.path.join(folder, table.name + ".gp")
    with open(path, "w") as f:
        f.write(f"set datafile separator ','\nset terminal svg size 900,560 background 'white'\n"
                f"set output '{table.name}.svg'\nset title '{title}'\n"
                f"set xlabel 'rows kept (%)'\nset ylabel '{label}'\n"
                f"set logscale x\nset xtics (5,10,20,25,30,50)\nset key outside right\nset grid\nplot \\\n"
                + ", \\\n".join(lines) + "\n")
    if shutil.which("gnuplot"):
        subprocess.run(["gnuplot", os.path.basename(path)], cwd=folder, check=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", nargs="?", default="build/loop")
    p.add_argument("--split", default="test")
    args = p.parse_args()
    folder = os.path.join(args.folder, "tables")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "results.md"), "w") as out:
        print(f"Model in the loop, {args.split} split. {__doc__.partition(chr(10) * 2)[2].strip()}", file=out)
        for mode, make in (("perplexity", perplexity), ("accuracy", accuracy), ("adaptive", adaptive),
                           ("recall", recall)):
            records = read(args.folder, f"{mode}.{args.split}")
            if not records:
                print(f"{mode}: nothing measured", file=sys.stderr)
                continue
            for table in make(records):
                table.write(folder, out)
                if table.name in PLOTS:
                    plot(folder, table)
    print(os.path.join(folder, "results.md"))


if __name__ == "__main__":
    main()
