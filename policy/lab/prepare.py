# SPDX-License-Identifier: MIT
"""What the measurements need to know first, each from a split of its own. Every step leaves a file and is done once.

    best          the heuristic of lowest mean regret per lane           valid documents
    maps-*        calibrated utility of KVP's and the best heuristic's scores     calib documents
    sensitivity-* of a lane to lost attention                            calib documents
    slope         predicted against real kept attention per lane         valid documents
    tasks         tasks that the full cache solves                       valid items
    sensitivity   which of them adaptive budgets use, per policy         valid items
    recall        share of the budget kept, rows that come with a hit    valid items
"""
import sys
import time

import torch

import accuracy
import budgets
import calibrate
import compact
import items
import policies
import recall
import variants
from record import ahead, load_found, read_samples, save_found

SOLVED = 0.7                      # accuracy of the full cache that a task needs
QUESTIONS = 120                   # per task, at most
CUTS = 2                          # per document
TUNE_BUDGETS = (0.05, 0.1, 0.2)   # for the choice of sensitivity
SHARES = 0.4, 0.5, 0.6, 0.7, 0.8   # of the device's rows that are kept, the rest recalled


def cuts(args, split):
    """Cuts of documents whose future is their own rows: (tokens, prompt, queries)."""
    count = 0
    for s in read_samples(args.samples, split):
        own = [c for c in s["cuts"] if c.get("branch") is None and not c.get("generate")
               and c["prompt"] >= 2 * budgets.FEWEST]
        if own and count < args.n:
            count += 1
            for c in own[:CUTS]:
                yield s["tokens"][:c["prompt"] + c["queries"]], c["prompt"], c["queries"]


def scored(lab, split):
    """(cache of the prompt, scores, utilities (max, mean), tokens, prompt, queries) of every cut."""
    def one(cut):
        tokens, p, f = cut
        with torch.no_grad():
            whole = lab.net.prefill(tokens, queries=True)[0]
            cache = whole.first(p)
            return cache, lab.scores(cache, torch_names=()), policies.future_attention(whole, whole.q[..., p:, :], p, p)
    for cut, ready in ahead(cuts(lab.args, split), one):
        yield (*ready, *cut)


def regret(scores, utility):
    """(C - C*) / (C_rand - C*) per lane over the rows that are not protected; nan where there is nothing to lose."""
    s, u = (x[..., budgets.FIRST:x.shape[-1] - budgets.LAST].double() for x in (scores, utility))
    rank = torch.arange(1, u.shape[-1] + 1, device=u.device, dtype=torch.float64)
    cost = (u.gather(-1, s.sort(dim=-1, descending=True, stable=True).indices) * rank).sum(-1)
    best = (u.sort(-1, descending=True).values * rank).sum(-1)
    rand = (len(rank) + 1) / 2 * u.sum(-1)
    return torch.where(u.sum(-1) > 1e-6, (cost - best) / (rand - best), torch.nan)


def choose_best(lab):
    total, count = {}, {}
    for cache, scores, (top, _), *_ in scored(lab, "valid"):
        for name, s in scores.items():
            r = regret(s, top)
            total[name] = total.get(name, 0) + r.nan_to_num(0)
            count[name] = count.get(name, 0) + ~r.isnan()
    mean = {n: total[n] / count[n].clamp_min(1) for n in total}
    names = [n for n in policies.STAR if n in mean]
    pick = torch.stack([mean[n] for n in names]).argmin(0)
    save_found(lab.args.out, "best", [[names[i] for i in row] for row in pick.tolist()])
    save_found(lab.args.out, "regret", {n: m.mean().item() for n, m in mean.items()})


def value_norms(net, cache):
    """[L, H]: mean over rows and group of |W_o,h v|."""
    out = []
    for layer, block in enumerate(net.blocks):
        w = block["o"].view(net.hidden, net.heads, net.group, net.dim).permute(1, 2, 0, 3)
        out.append((cache.v[layer][:, None] @ w.transpose(-1, -2)).norm(dim=-1).mean((1, 2)))
    return torch.stack(out)


def fit_maps(lab):
    names = [n for n in lab.c_names if n.startswith("kvp")] + ["best"]
    fits = {n: calibrate.Fit(lab.args.seed) for n in names}
    kl = lost = norm = 0
    for cache, scores, (_, mean), tokens, p, f in scored(lab, "calib"):
        for n in names:
            fits[n].add(scores[n], mean, f)
        one = calibrate.knock(lab.net, cache, scores[names[0]], tokens[p:], p, mean, lab.args.limit)
        kl, lost, norm = kl + one[0], lost + one[1], norm + value_norms(lab.net, cache)
    for n in names:
        save_found(lab.args.out, "maps-" + n.replace(":", "-"), torch.from_numpy(fits[n].maps()))
    save_found(lab.args.out, "sensitivity-knock", calibrate.sensitivity(kl, lost))
    save_found(lab.args.out, "sensitivity-value", norm / norm.mean())


def measure_slope(lab):
    """Per lane, over valid cuts at 20 %: least-squares slope through 0 of real on predicted kept attention."""
    names = [n for n in (*lab.c_names, "best") if "maps-" + n.replace(":", "-") in lab.found]
    xy, xx = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for _, scores, (_, mean), _, p, f in scored(lab, "valid"):
        for n in names:
            inner = budgets.uniform(scores[n], budgets.rows_of(0.2, p))
            inner[..., :budgets.FIRST] = inner[..., -budgets.LAST:] = False
            x = (calibrate.value(lab.found["maps-" + n.replace(":", "-")], scores[n]) * inner).sum(-1)
            y = (mean / f * inner).sum(-1)
            xy[n], xx[n] = xy[n] + x * y, xx[n] + x * x
    slopes = {n: (xy[n] / xx[n].clamp_min(1e-12)).flatten().tolist() for n in names}
    save_found(lab.args.out, "slope", {n: {"inside 0.9-1.1": sum(0.9 <= s <= 1.1 for s in v) / len(v), "lanes": v}
                                       for n, v in slopes.items()})


def full_accuracy(lab):
    right, asked = {}, {}
    for item in items.build(lab, "valid", min(QUESTIONS, lab.args.n), items.names()):
        a = accuracy.Asked(items.fill(lab, item)["questions"], lab.net.device)
        cache = lab.net.prefill(item["context"])[0]
        hidden = lab.net.extend(a.tokens, cache.k.shape[2], compact.Whole(cache))
        hits = a.right(lab.net, hidden)[0]
        right[item["task"]] = right.get(item["task"], 0) + sum(hits)
        asked[item["task"]] = asked.get(item["task"], 0) + len(hits)
    full = {t: right[t] / asked[t] for t in asked}
    save_found(lab.args.out, "tasks", {"full": full, "kept": [t for t in full if full[t] >= SOLVED]})


def tune(lab):
    """Sensitivity by accuracy over TUNE_BUDGETS, recall's share and near by the two-stage arm's, on valid items."""
    names = [n for n in (*lab.c_names, "best") if "maps-" + n.replace(":", "-") in lab.found]
    base = "kvp" if "kvp" in lab.c_names else "best"
    sums, back = {}, {}
    every = items.build(lab, "valid", min(QUESTIONS, lab.args.n))
    for item, ready in ahead(every, accuracy.prepared(lab)):
        few = ready._replace(scores={n: ready.scores[n] for n in names})
        r = accuracy.measure_item(lab, item, few, TUNE_BUDGETS, uniform=False, adapt=names, oracle=False)
        for label, hits in r["unseen"].items():
            key = label.partition("@")[0]
            sums[key] = sums.get(key, 0) + sum(hits)
        for share in SHARES:
            arms = tuple(f"two-stage+near{i}" for i in range(len(recall.NEARS)))
            r = recall.measure_item(lab, item, ready, share, None, recall.NORM, base, arms)
            for i, arm in enumerate(arms):
                back[share, i] = back.get((share, i), 0) + sum(r["hits"][arm])
    chosen = {n: max(variants.KINDS, key=lambda kind: sums[f"{n}+adaptive:{kind}"]) for n in names}
    save_found(lab.args.out, "sensitivity", chosen)
    save_found(lab.args.out, "sensitivity-tried", sums)
    share, i = max(back, key=back.get)
    tried = [{"kept_share": s, "near": recall.NEARS[j], "right": n} for (s, j), n in back.items()]
    save_found(lab.args.out, "recall", {"kept_share": share, "near": recall.NEARS[i], "tried": tried})


@torch.no_grad()
def run(lab):
    lab.torch_names = []
    for name, step in (("best", choose_best), ("sensitivity-value", fit_maps), ("slope", measure_slope),
                       ("tasks", full_accuracy), ("recall", tune)):
        if name in lab.found:
            continue
        if time.time() > lab.args.end:
            return 1
        start = time.time()
        step(lab)
        lab.found = load_found(lab.args.out, lab.args.device)
        print(f"prepare {name}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    return 0
