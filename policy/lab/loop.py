#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Evaluate policies with the model in the loop: long-range perplexity, tasks, adaptive budgets, recall.

    loop.py prepare      choose the best heuristic per lane and the tasks (valid), calibrate (calib), tune
    loop.py perplexity   rise in loss on long-range tokens of test documents
    loop.py accuracy     tasks over budgets, the question seen at eviction and not
    loop.py adaptive     tasks, adaptive against uniform budgets
    loop.py recall       tasks at one device budget, arms of recall

Every measured sample is one line of <out>/<mode>.<split>.jsonl, appended at once: run the same command again
to continue, with --stop-after to stop in time. report.py makes tables of them. Deterministic by --seed.
"""
import argparse
import importlib
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "..", "ipc", "python")]

import torch  # noqa: E402

import compact  # noqa: E402
import policies  # noqa: E402
from record import load_found  # noqa: E402

MODES = ("prepare", "perplexity", "accuracy", "adaptive", "recall")


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("mode", choices=MODES)
    p.add_argument("--samples", required=True, help="samples.jsonl.gz of the corpus")
    p.add_argument("--out", default="build/loop", help="folder of results, and of what prepare found")
    p.add_argument("--weights", help="KVP weights (.kvp)")
    p.add_argument("--weights-position", help="learned position-only prior (.kvp)")
    p.add_argument("--weights-qfilter", help="q-filters (.kvp)")
    p.add_argument("--weights-extra", action="append", default=[], metavar="NAME=PATH",
                   help="another KVP network, reported as kvp:NAME")
    p.add_argument("--policies", help="comma-separated: only these")
    p.add_argument("--budgets", help="comma-separated shares of the prompt")
    p.add_argument("--tasks", help="comma-separated: these instead of those that prepare kept")
    p.add_argument("--split", choices=("valid", "test"), default="test")
    p.add_argument("--n", type=int, default=400, help="questions per task; documents at most (perplexity)")
    p.add_argument("--shortest", type=int, help="tokens of a task's context or a document, from")
    p.add_argument("--longest", type=int, help="to")
    p.add_argument("--future", type=int, default=512, help="tokens of a continuation, at most (perplexity)")
    p.add_argument("--seen", type=int, default=5, help="questions of an item also asked with the question seen")
    p.add_argument("--device-budget", type=float, default=0.2, help="rows on the device during recall")
    p.add_argument("--kept-share", type=float, help="share of it kept, the rest recalled (default: as tuned)")
    p.add_argument("--near", metavar="BEFORE,AFTER", help="rows that come along with a hit (default: as tuned)")
    p.add_argument("--norm", choices=("mass", "logit"), help="how recall compares queries (default: mass)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=0, help="of the scoring in C (0: all cores)")
    p.add_argument("--limit", type=float, help="largest tensor of logits, elements (default: 1e9 on a GPU, 2e7)")
    p.add_argument("--stop-after", type=float, default=1e9, metavar="SECONDS")
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args(argv)
    a.limit = a.limit or (1e9 if a.device.startswith("cuda") else 2e7)
    a.end = time.time() + a.stop_after
    return a


class Lab:
    """The model, the policies and what prepare found, for one run."""

    def __init__(self, args, net=None, tok=None):
        self.args = args
        self.net, self.tok = (net, tok) if net else compact.load(args.device)
        weights = {"kvp": args.weights, "position": args.weights_position, "qfilter": args.weights_qfilter}
        weights.update(("kvp:" + x.partition("=")[0], x.partition("=")[2]) for x in args.weights_extra)
        weights = {name: path for name, path in weights.items() if path}
        wanted = args.policies.split(",") if args.policies else None
        if args.mode in ("adaptive", "recall") and not wanted:
            wanted = {"adaptive": [n for n in weights if n.startswith("kvp")] + ["best", "defensive"],
                      "recall": ["kvp"] if args.weights else ["best"]}[args.mode]
        self.c_names = [n for n in (*weights, *policies.STAR) if not wanted or n in wanted or
                        "best" in wanted and n in policies.STAR]
        self.torch_names = [n for n in policies.ATTENTION if not wanted or n in wanted]
        self.wanted = wanted
        self.kvtier = policies.Kvtier(self.net, self.c_names, weights, args.threads)
        self.found, self.filler = load_found(args.out, args.device), {}

    def scores(self, cache, nonce=0, torch_names=None):
        """{policy: [L, H, P]} of the cache's rows; `best` is the best heuristic of each lane."""
        out = self.kvtier(cache, nonce)
        out.update(policies.torch_scores(self.net, cache, self.torch_names if torch_names is None else torch_names))
        best = self.found.get("best")
        if best and all(n in out for row in best for n in row):
            out["best"] = torch.stack([torch.stack([out[n][i, j] for j, n in enumerate(row)])
                                       for i, row in enumerate(best)])
        return out

    def keeps(self, name):
        return self.wanted is None or name in self.wanted

    def close(self):
        self.kvtier.close()


def main(argv=None):
    args = arguments(argv)
    torch.set_grad_enabled(False)
    torch.manual_seed(args.seed)
    lab = Lab(args)
    try:
        left = importlib.import_module(args.mode).run(lab)
    finally:
        lab.close()
    return 0 if left == 0 else 75  # EX_TEMPFAIL: run again to continue


if __name__ == "__main__":
    sys.exit(main())
