# SPDX-License-Identifier: MIT
"""The demo: a real language model whose KV rows live in four places at once.

    python3 -m kvtier.demo [--device 25 --dram 25 --nvme 25] [--policy NAME] [--context 3100] [--continue 480]

Starts a private kvtierd, reads a long text with SmolLM2-135M-Instruct, keeps a share of the rows in the
device tier, demotes shares to DRAM and to NVMe, drops the rest, brings rows back, swaps the whole
sequence out and resumes it, and checks every row that came back against the original, bit for bit.
"""
import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

POLICIES = ("random", "streaming", "knorm", "vnorm", "vrange", "keydiff", "lagkv", "cur", "kvp")
TEXT = Path(__file__).with_name("data") / "harbour.txt"


class Bar:
    """A progress bar on a terminal; plain start and end lines elsewhere."""

    def __init__(self, what, total):
        self.what, self.total, self.start, self.tty = what, total, time.monotonic(), sys.stderr.isatty()
        self(0)

    def __call__(self, done):
        if not self.tty:
            return
        share = done / self.total
        spent = time.monotonic() - self.start
        left = f"{spent / share - spent:4.0f} s left" if 0 < share < 1 else f"{spent:4.1f} s"
        sys.stderr.write(f"\r  {self.what:<28} [{'#' * int(30 * share):<30}] {100 * share:3.0f} %  {left}\033[K")
        sys.stderr.flush()

    def done(self):
        self(self.total)
        if self.tty:
            sys.stderr.write("\n")
        else:
            print(f"  {self.what}: {time.monotonic() - self.start:.1f} s", file=sys.stderr)


def mib(n):
    return f"{n / 2**20:8.1f} MiB"


def show_tiers(title, info):
    total = sum(info["tier_rows"].values()) + info["dropped_rows"]
    print(f"\n  {title}")
    print(f"  {'tier':<8}{'rows':>10}{'share':>8}{'bytes held':>16}")
    for tier, rows in info["tier_rows"].items():
        held = info["device_resident_bytes"] if tier == "device" else info["tier_bytes"][tier]
        print(f"  {tier:<8}{rows:>10}{100 * rows / max(total, 1):>7.1f}%{mib(held):>16}")
    print(f"  {'dropped':<8}{info['dropped_rows']:>10}{100 * info['dropped_rows'] / max(total, 1):>7.1f}%")
    print(f"  one plan took {info['plan_ns_last'] / 1e6:.2f} ms; index {info['index_bytes'] / 2**10:.0f} KiB; "
          f"counted misses {info['misses']}")


class Checker:
    """Original rows, kept outside kvtier's reach, to compare with what comes back."""

    def __init__(self, torch):
        self.torch, self.k, self.v = torch, [], []

    def take(self, cache):
        """Remember every row now in the device tier; call while all rows are resident."""
        self.k = [layer.keys[0].clone() for layer in cache.layers]
        self.v = [layer.values[0].clone() for layer in cache.layers]

    def add_last(self, cache):
        """Remember the row just appended: it is the last slot."""
        for i, layer in enumerate(cache.layers):
            self.k[i] = self.torch.cat([self.k[i], layer.keys[0][:, -1:]], 1)
            self.v[i] = self.torch.cat([self.v[i], layer.values[0][:, -1:]], 1)

    def compare(self, cache):
        """(rows compared, rows that differ in any bit), over everything in the device tier."""
        rows = bad = 0
        for i, layer in enumerate(cache.layers):
            for h in range(cache.model.heads):
                pos = self.torch.tensor(cache.positions(i, h))
                for now, then in ((layer.keys[0, h], self.k[i][h]), (layer.values[0, h], self.v[i][h])):
                    bad += int((now.view(self.torch.int32) != then[pos].view(self.torch.int32)).any(-1).sum())
                rows += len(pos)
        return rows, bad


def prefill(torch, model, cache, ids, what, chunk=256):
    bar = Bar(what, ids.shape[1])
    logits = None
    for i in range(0, ids.shape[1], chunk):
        logits = model(ids[:, i : i + chunk], past_key_values=cache, use_cache=True).logits[:, -1]
        bar(min(i + chunk, ids.shape[1]))
    bar.done()
    return logits


def perplexity(torch, model, cache, first_logits, target):
    """Of the true continuation, one pass, given the logits before its first token."""
    out = model(target, past_key_values=cache, use_cache=True).logits[0]
    logits = torch.cat([first_logits, out[:-1]])
    return math.exp(torch.nn.functional.cross_entropy(logits.float(), target[0]).item())


def generate(torch, model, tok, cache, logits, n, keep):
    """n tokens, drawn from the 40 likeliest with a fixed seed; returns the logits after the last one."""
    torch.manual_seed(4)
    for _ in range(n):
        top, ids = logits.topk(40)
        nxt = ids.gather(1, torch.multinomial((top / 0.7).softmax(-1), 1))
        sys.stdout.write(tok.decode(nxt[0]).replace("\n", " "))
        sys.stdout.flush()
        logits = model(nxt, past_key_values=cache, use_cache=True).logits[:, -1]
        keep.add_last(cache)
    print("...")
    return logits


def settle(cache, tier, timeout_s=10):
    """Moves between the lower tiers go on in the background: wait until none is left in `tier`."""
    end = time.monotonic() + timeout_s
    while cache.seq.info()["tier_rows"][tier] and time.monotonic() < end:
        time.sleep(0.005)
    return cache.info()


def parse():
    ap = argparse.ArgumentParser(prog="kvtier.demo", description=__doc__.splitlines()[0])
    ap.add_argument("--device", type=float, default=25, help="percent of rows kept in the device tier")
    ap.add_argument("--dram", type=float, default=25, help="percent demoted to DRAM")
    ap.add_argument("--nvme", type=float, default=25, help="percent demoted to NVMe; the rest is dropped")
    ap.add_argument("--policy", default="", help="policy of the main run (default: the best one measured)")
    ap.add_argument("--context", type=int, default=3100, help="tokens read before anything is evicted")
    ap.add_argument("--continue", dest="cont", type=int, default=480, help="tokens of true continuation scored")
    ap.add_argument("--generate", type=int, default=40, help="tokens generated in each of the two stretches")
    ap.add_argument("--text", default=str(TEXT), help="a UTF-8 text file")
    a = ap.parse_args()
    for name in ("device", "dram", "nvme"):
        if not 0 <= getattr(a, name) <= 100:
            ap.error(f"--{name}: {getattr(a, name)}, limit 0..100")
    if a.device + a.dram + a.nvme > 100:
        ap.error(f"--device + --dram + --nvme: {a.device + a.dram + a.nvme}, limit 100")
    return a


def main():
    a = parse()
    start = time.monotonic()
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as e:
        sys.exit(f"demo: {e.name} is missing: pip install torch==2.13.0 'transformers==5.17.*' gguf, then run again")
    from . import Client, Error, budget
    from .daemon import PrivateDaemon, build_dir
    from .hf import KvtierCache
    from .smollm2 import NAME, load

    torch.set_grad_enabled(False)
    print("kvtier demo: SmolLM2-135M-Instruct, float32 on the CPU; its KV rows in a kvtier region")
    bar = Bar("loading the model", 1)
    try:
        model, tok = load()
    except FileNotFoundError as e:
        sys.exit(f"demo: {e}")
    bar.done()
    ids = tok(Path(a.text).read_text(encoding="utf-8"), return_tensors="pt").input_ids
    if ids.shape[1] < a.context + a.cont:
        sys.exit(f"demo: {a.text}: {ids.shape[1]} tokens, --context + --continue need {a.context + a.cont}")
    context, target = ids[:, : a.context], ids[:, a.context : a.context + a.cont]
    max_rows = a.context + a.cont + 4 * a.generate + 64
    rows = {t: round(a.context * getattr(a, t) / 100) for t in ("device", "dram", "nvme")}

    with PrivateDaemon(dram="1G", nvme="1G") as d, Client(d.socket, name="demo") as client:
        def cache(c=client, b=None, **kw):
            return KvtierCache(model.config, c, max_rows, name=NAME, budget=b or budget(manual=True), **kw)

        # ---- read the text once; everything is kept ------------------------------------
        full = cache()
        first = prefill(torch, model, full, context, f"reading {a.context} tokens")
        keep = Checker(torch)
        keep.take(full)
        ppl_full = perplexity(torch, model, full, first, target)
        row_bytes = full.model.row_bytes
        full.close()

        def loaded(**kw):
            """A fresh sequence that holds the same rows."""
            fresh = cache(**kw)
            for i, layer in enumerate(fresh.layers):
                layer.update(keep.k[i][None], keep.v[i][None])
            return fresh

        # ---- each policy at the same budget ----------------------------------------------
        print(f"\n  Perplexity of the {a.cont} tokens that really follow; every lane keeps "
              f"{rows['device']} of {a.context} rows (first 4 and last 16 always)")
        bar = Bar("policies", len(POLICIES))
        table, refused = {}, {}
        for i, name in enumerate(POLICIES):
            one = None
            try:
                one = loaded()
                one.compress(budget(rows["device"], rows["dram"], rows["nvme"], policy=name, manual=True))
                ran = one.seq.info()
                if ran["policy"] != name:
                    refused[name] = f"the daemon ran its fallback, {ran['policy']}"
                else:
                    table[name] = perplexity(torch, model, one, first, target), ran["plan_ns_last"] / 1e6
            except Error as e:
                refused[name] = str(e)
            finally:
                if one is not None:
                    one.close()
            bar(i + 1)
        bar.done()
        print(f"  {'policy':<12}{'perplexity':>11}{'rise, nats':>12}{'plan, ms':>10}")
        print(f"  {'full cache':<12}{ppl_full:>11.3f}{0:>12.4f}{'-':>10}")
        for name, (ppl, ms) in sorted(table.items(), key=lambda x: x[1][0]):
            print(f"  {name:<12}{ppl:>11.3f}{math.log(ppl / ppl_full):>12.4f}{ms:>10.2f}")
        for name, why in refused.items():
            print(f"  {name}: not run ({why})")
        best = min(table, key=lambda n: table[n][0])
        policy = a.policy or best
        print(f"  main run: policy {policy}" + ("" if a.policy else ", the best one measured above")
              + ("" if "kvp" in table else "; no kvp weights for this model are installed yet"))

        # ---- the main run -------------------------------------------------------------------
        b = budget(rows["device"], rows["dram"], rows["nvme"], policy=policy, slack=a.generate // 2 or 1)
        main_cache = loaded(leased=True, ttl_s=120)
        before = main_cache.info()["device_resident_bytes"]
        show_tiers("before: everything in the device tier", main_cache.info())
        main_cache.compress(b)
        info = main_cache.info()
        show_tiers(f"after one plan: {a.device:g} % device, {a.dram:g} % DRAM, {a.nvme:g} % NVMe, rest dropped", info)
        print(f"  device memory: {mib(before).strip()} before, {mib(info['device_resident_bytes']).strip()} after")

        print("\n  the model goes on (plans are applied as it writes):\n  ...", end="")
        logits = generate(torch, model, tok, main_cache, first, a.generate, keep)

        plan = main_cache.compress(budget(2 * rows["device"], rows["dram"], rows["nvme"], policy=policy))
        came = plan.rows_in
        n, bad = keep.compare(main_cache)
        print(f"\n  budget doubled: {came} rows came back from DRAM and NVMe; {n} rows of the device tier compared "
              f"with the originals: {bad} differ")
        errors = bad
        main_cache.compress(b)

        # ---- swap out, leave, resume ----------------------------------------------------------
        main_cache.compress(b)
        state = sorted(main_cache.positions(0, 0))
        t = time.monotonic()
        main_cache.compress(budget(0, 0, policy=policy, nvme=0xFFFFFFFF, manual=True))
        info = settle(main_cache, "dram")
        out_s = time.monotonic() - t
        show_tiers("swapped out: the whole sequence is on NVMe", info)
        key, secret, held = main_cache.seq.key, main_cache.seq.secret, info["tier_rows"]["nvme"]
        main_cache.close()

        with Client(d.socket, name="demo-resumed") as again:
            t = time.monotonic()
            back = cache(again, b, key=key, secret=secret, leased=True, ttl_s=120, resume=True)
            plan = back.compress(b)
            in_s = time.monotonic() - t
            show_tiers("resumed by another connection and brought back to its budget", back.info())
            n, bad = keep.compare(back)
            errors += bad
            print(f"  swap-out {held * row_bytes / 2**20 / out_s:.0f} MiB/s ({out_s * 1e3:.0f} ms in all), resume to ready "
                  f"{in_s * 1e3:.0f} ms, {plan.rows_in} rows promoted; {n} rows compared with the originals: {bad} differ")
            same = sorted(back.positions(0, 0)) == state
            print(f"  the same rows are resident as before the swap: {'yes' if same else 'no'}")
            print("\n  and the model goes on where it stopped:\n  ...", end="")
            generate(torch, model, tok, back, logits, a.generate, keep)
            print()
            ctl = build_dir() / "kvtierctl"
            if ctl.exists():
                for verb in (["status"], ["ls"]):
                    print(f"  $ kvtierctl {' '.join(verb)}")
                    sys.stdout.flush()
                    subprocess.run([str(ctl), "--socket", d.admin, *verb], check=False)
            back.seq.drop()
        print(f"\n  done in {time.monotonic() - start:.0f} s; {errors} rows came back wrong")
        return 1 if errors else 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main())
