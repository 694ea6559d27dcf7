#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Records README's tour: kvtierctl beside a real model that writes, every line as it was printed.

    tests/runtime/tour.py [--print]      `make tour`; writes README.md between its two marks, or prints
"""
import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ipc" / "python"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

from kvtier.daemon import PrivateDaemon, build_dir  # noqa: E402

README = ROOT / "README.md"
BEGIN, END = "<!-- tour: `make tour` records it -->\n", "<!-- end of the tour -->\n"
CONTEXT, CHUNK = 1500, 250


class Tour:
    """Prose and commands with what they printed, in the order in which they are told."""

    def __init__(self, admin):
        self.admin, self.out, self.open = admin, [], False

    def say(self, text):
        self.close()
        self.out.append(text + "\n")

    def ctl(self, *words, lines=None):
        """One command. lines: how many of its lines are shown; the rest becomes one that says how many."""
        p = subprocess.run([build_dir() / "kvtierctl", "--socket", self.admin, *words], capture_output=True, text=True,
                           timeout=30, check=False, env=dict(os.environ, COLUMNS="100", TERM="dumb"))
        if p.returncode:
            sys.exit(f"tour: kvtierctl {' '.join(words)}: {p.returncode}: {p.stderr.strip()}")
        if not self.open:
            self.out.append("```console\n")
            self.open = True
        said = [x.rstrip() for x in p.stdout.splitlines()]
        if lines and len(said) > lines:
            said = said[:lines] + [f"(and {len(said) - lines} more lines)"]
        self.out.append("\n".join([f"$ kvtierctl {' '.join(words)}", *said]) + "\n")
        return p.stdout

    def close(self):
        if self.open:
            self.out.append("```\n")
            self.open = False

    def text(self):
        self.close()
        return "\n" + "\n".join(self.out).replace("console\n\n", "console\n").replace("\n\n```\n", "\n```\n") + "\n"


class Writer:
    """The model with its cache: what the operator looks at."""

    def __init__(self, torch, client, cache):
        from kvtier.smollm2 import load

        torch.set_grad_enabled(False)
        self.model, tok = load()
        self.cache = cache(self.model.config, client)
        self.ids = tok((ROOT / "ipc/python/kvtier/data/harbour.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
        self.next = None

    def read(self, begin, end):
        for i in range(begin, end, CHUNK):
            out = self.model(self.ids[:, i : min(i + CHUNK, end)], past_key_values=self.cache, use_cache=True)
        self.next = out.logits[:, -1:].argmax(-1)

    def write(self, tokens):
        for _ in range(tokens):
            out = self.model(self.next, past_key_values=self.cache, use_cache=True)
            self.next = out.logits[:, -1:].argmax(-1)

    def follow(self):
        """Wait for the plan that an operator's word makes, and apply it."""
        end = time.monotonic() + 10
        while self.cache.poll() is None:
            if time.monotonic() > end:
                sys.exit("tour: no plan came")
            time.sleep(0.01)
        time.sleep(0.1)  # its acknowledgement is read


def tell(t, w):
    """The tour itself."""
    t.say("A model of 30 layers with 3 KV heads each, 90 lanes, has read 1,500 tokens; it has no budget yet.")
    handle = re.search(r"0x[0-9a-f]{16}", t.ctl("ls")).group(0)
    t.ctl("status")
    t.say("No row may be lost, but 300 a lane must do on the device, and 600 in DRAM. The plan is made at once; the runtime\n"
          "applies it when it suits it, here while the model writes 24 tokens:")
    t.ctl("budget", handle, "device=300", "dram=600", "nvme=all")
    w.write(24)
    t.ctl("ls")
    t.ctl("trace", handle, lines=12)
    t.say("Why is a row where it is? Position 700 of lane 31, and how that lane begins:")
    t.ctl("trace", handle, "700", "31")
    t.ctl("map", handle, "31", lines=9)
    t.say("Is what is stored still what was stored? Every page is read and its checksum compared:")
    t.ctl("verify", "start", handle)
    t.say("The conversation goes idle: take its rows off the device. One word brings them back.")
    t.ctl("demote", handle)
    w.follow()
    t.ctl("ls")
    t.ctl("promote", handle)
    w.follow()
    t.ctl("ls")


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--print", action="store_true", help="print it instead of writing README.md")
    args = ap.parse_args()
    import torch
    from kvtier import Client, budget
    from kvtier.hf import KvtierCache
    from kvtier.smollm2 import NAME

    def cache(config, client):
        return KvtierCache(config, client, 4096, name=NAME, budget=budget(slack=16))

    with PrivateDaemon(dram="512M", nvme="512M") as d, Client(d.socket, name="chat") as client:
        w = Writer(torch, client, cache)
        w.read(0, CONTEXT)
        t = Tour(d.admin)
        tell(t, w)
        told = t.text().replace(d.run, "/run/kvtier").replace(d.store, "/var/lib/kvtier")
        w.cache.close()
    if args.print:
        print(told)
        return
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        sys.exit("tour: README.md has no place for it: the marks are gone")
    README.write_text(head + BEGIN + told + END + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
