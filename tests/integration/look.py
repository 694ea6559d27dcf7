#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Looking closely: what trace says of known plans and rows, who may ask, and a listing while plans are made."""
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lib.rows import LANES, Neighbour, Rows
from lib.world import Tap, World, build_dir, equal, expect, matches, until

from kvtier import ROWS_ALL, Client, Model, Region, Sequence, budget


def handle(d, r):
    return hex(r.seq.info()["handle"])


def plans(d, r, **kw):
    return d.ctl("trace", handle(d, r), **kw)["plans"]


def refused(d, *argv, socket=None):
    p = subprocess.run([str(build_dir() / "kvtierctl"), "--socket", str(socket or d.admin), *argv],
                       capture_output=True, text=True, timeout=20, check=False)
    equal(p.returncode, 1, f"exit status of {argv}")
    lines = p.stderr.strip().splitlines()
    equal(len(lines), 1, f"lines of {argv}: {lines}")
    return lines[0]


def true_counts():
    with World() as d, Client(d.socket) as c:
        r = Rows(c, "counts")
        equal(plans(d, r), [], "plans of a sequence that made none")
        r.append(300)
        moved = [r.plan(device=100, dram=150, nvme=50)]  # demoted
        moved.append(r.plan(device=200, dram=50, nvme=50))  # some of them promoted
        moved.append(r.plan(device=60, dram=40, nvme=0))  # the rest dropped
        seen = plans(d, r)
        equal([(p["out"], p["in"], p["dropped"]) for p in seen], moved, "rows out, in, dropped")
        equal([p["kept"] for p in seen], [100 * LANES, 200 * LANES, 60 * LANES], "rows kept")
        equal([p["watermark"] for p in seen], [300] * 3, "watermarks")
        equal([p["budget"]["device"] for p in seen], [100, 200, 60], "device budgets")
        equal([p["asked"]["dram"] for p in seen], [150, 50, 40], "dram budgets that were asked for")
        equal([p["outcome"] for p in seen], ["acked"] * 3, "outcomes")
        equal([p["plan"] for p in seen], [1, 2, 3], "plans")
        expect(moved[2][2] > 0, f"nothing was dropped: {moved}")
        expect(all(p["limits"] == [] for p in seen), f"limits: {seen}")
        expect(seen[1]["refaults"] > 0, f"rows came back at once and are no refaults: {seen[1]}")
        equal(sum(p["refaults"] for p in seen), r.seq.info()["refaults"], "refaults")
        for p in seen:
            expect(p["lowest_kept"] >= p["highest_gone"] or p["in"], f"the cut: {p}")
            expect(p["decide_ns"] > 0 and p["ack_ns"] > 0, f"phases: {p}")
        r.close()


def demoted_and_cancelled():
    with World() as d, Client(d.socket) as c:
        r = Rows(c, "hand")
        r.append(200)
        r.plan(device=200, dram=200)
        d.ctl("demote", handle(d, r), "30")
        r.seq.apply(r.wait(2))
        last = plans(d, r)[-1]
        equal((last["limits"], last["asked"]["device"], last["budget"]["device"]), (["demoted"], 200, 30), "demoted")
        d.ctl("promote", handle(d, r))
        r.wait(3)  # ready, and not applied
        equal(plans(d, r)[-1]["outcome"], "ready", "outcome")
        r.truncate(150)
        until("cancelled", lambda: plans(d, r)[2]["outcome"] == "cancelled: the client changed the sequence", 5)
        r.close()


def rows_agree_with_lanes():
    with World() as d, Client(d.socket) as c:
        r = Rows(c, "row")
        r.append(120)
        r.plan(device=40, dram=30, nvme=20)
        r.append(3)
        h, lanes = handle(d, r), d.ctl("show", handle(d, r), "lanes")["lane"]
        counts = [{"device": 0, "dram": 0, "nvme": 0, "dropped": 0} for _ in range(LANES)]
        ranks = [set() for _ in range(LANES)]
        for pos in range(123):
            t = d.ctl("trace", h, str(pos))
            equal((t["pos"], [x["lane"] for x in t["lanes"]]), (pos, list(range(LANES))), "lanes")
            for lane, x in enumerate(t["lanes"]):
                best = (x["tiers"] or ["dropped"])[0]
                counts[lane][best] += 1
                matches(x["why"], f"^{best}: ", "why")
                equal(pos in r.seq.resident(lane), best == "device", f"row {pos} of lane {lane} on the device")
                if x["rank"]:
                    ranks[lane].add(x["rank"])
                if best in ("dram", "nvme"):
                    expect(x["page"]["first"] <= pos and x["page"][best], f"page: {x}")
        equal(counts, lanes, "rows by tier")
        for got, lane in zip(ranks, lanes):
            n = 120 - lane["dropped"]
            equal(got, set(range(1, n + 1)), "ranks")
        one = d.ctl("trace", h, "60", "2")
        equal([x["lane"] for x in one["lanes"]], [2], "the lane that was asked for")
        matches(d.ctl("trace", h, "122", "0")["lanes"][0]["why"], "appended after the last plan", "why")
        matches(refused(d, "trace", h, "123"), r"POS: 123, the sequence has 123 rows", "the line")
        matches(refused(d, "trace", h, "1", "4"), r"LANE: 4, the sequence has 4 lanes", "the line")
        matches(refused(d, "trace", h, "x"), r'POS: "x"', "the line")
        matches(refused(d, "trace", h, "1", "2-"), r'LANE: "2-"', "the line")
        r.close()


def codes(lane):
    """The code of each row, from a lane's runs."""
    return [code for n, code in zip(lane["runs"][0::2], lane["runs"][1::2]) for _ in range(n)]


CODE = {"device": 1, "dram": 2, "nvme": 4}


def map_agrees_with_trace():
    with World() as d, Client(d.socket) as c:
        r = Rows(c, "map")
        r.append(300)
        r.plan(device=80, dram=120, nvme=70)
        r.plan(device=120, dram=80, nvme=70)  # some come back, and keep their copies below
        r.append(3)
        h = handle(d, r)
        m = d.ctl("map", h, "0+", "303")
        equal((m["rows"], m["watermark"], m["lanes"], m["columns"], m["changed"]), (303, 300, LANES, 303, False), "head")
        equal([(x["lane"], x["layer"], x["head"]) for x in m["lane"]], [(i, i // 2, i % 2) for i in range(LANES)], "lanes")
        equal(m["lane"][0]["budget"], {"device": 120, "dram": 80, "nvme": 70}, "budgets")
        tiers = [codes(x) for x in m["lane"]]
        expect(all(a != b for x in m["lane"] for a, b in zip(x["runs"][1::2], x["runs"][3::2])), "runs that are one")
        seen = set()
        for pos in range(303):
            for lane, x in enumerate(d.ctl("trace", h, str(pos))["lanes"]):
                want = sum(CODE[t] for t in x["tiers"])
                equal(tiers[lane][pos], want, f"row {pos} of lane {lane}")
                seen.add(want)
                n, least, most, mean = m["lane"][lane]["scores"][4 * pos:4 * pos + 4]
                equal(n, int(bool(want) and pos < 300), f"scores of row {pos}")
                if n:
                    equal((least, most, mean), (x["score"],) * 3, f"score of row {pos}")
        expect({0, 1, 2, 4} <= seen and seen & {3, 5}, f"tiers that were seen: {seen}")
        few = d.ctl("map", h, "2", "7")["lane"]
        equal(([x["lane"] for x in few], sum(few[0]["scores"][0::4])), ([2], sum(map(bool, tiers[2][:300]))), "seven columns")
        scores = m["lane"][2]["scores"]
        part = [scores[4 * i + 3] for i in range(303) if scores[4 * i] and i * 7 // 303 == 3]
        equal(few[0]["scores"][12], len(part), "rows of a column")
        expect(abs(few[0]["scores"][15] - sum(part) / len(part)) <= 1e-3 * max(map(abs, part)), "its mean")
        equal(d.ctl("map", h, "3+", socket=d.socket)["lane"][0]["runs"], m["lane"][3]["runs"], "a tenant's own")
        for argv, line in ((("4",), "LANE: 4, the sequence has 4 lanes"), (("x",), 'LANE: "x"'), (("0", "5000"), "COLUMNS"),
                           (("0", "0", "7"), "FROM"), (("0", "0", "0.1.303.0"), "FROM: position 1"),
                           (("0", "0", "0.512.303.0"), "FROM: position 512"), (("0", "0", "0.0.400.0"), "was cut")):
            matches(refused(d, "map", h, *argv), line, "the line")
        r.close()


def map_in_slices():
    """Rows nobody wrote, but many: pieces that the daemon tells, put together by hand and by kvtierctl."""
    rows = 50000
    with World(dram={"size": "16M"}, nvme={"enabled": "no"}) as d, Client(d.socket) as c:
        model = Model(c, "long", 2, 2, 4)
        layouts, size = model.layout(rows, 16)
        region = Region(c, size)
        s = Sequence(c, model, region, layouts, rows)
        s.append(0, rows)
        s.apply(s.wait(s.request(budget(rows // 2, 0, 0, manual=True)), timeout_ms=20000))
        h = hex(s.info()["handle"])
        until("applied", lambda: d.ctl("show", h)["rows_dropped"] == rows // 2 * LANES, 5)
        whole, pieces, at = d.ctl("map", h, "1+", "900"), [], "1.0.50000.0"
        while at:
            p = d.ctl("map", h, "1+", "900", at)
            expect(sum(len(x["runs"]) for x in p["lane"]) < 30000, "a piece without an end")
            pieces, at = pieces + p["lane"], p["next"]
        expect(len(pieces) > 6, f"{len(pieces)} pieces of {rows} rows in 3 lanes")
        for x in whole["lane"]:
            mine = [p for p in pieces if p["lane"] == x["lane"]]
            equal(sum((codes(p) for p in mine), []), codes(x), "the pieces of a lane")
            equal((codes(x).count(1), codes(x).count(0)), (rows // 2, rows // 2), "rows on the device, dropped")
            seen = [0] * 900
            for p in mine:
                for i, n in enumerate(p["scores"][0::4]):
                    seen[p["column"] + i] += n
            equal((seen, sum(seen)), (x["scores"][0::4], rows // 2), "rows with a score in each column")
        equal([x["lane"] for x in whole["lane"]], [1, 2, 3], "lanes")
        s.truncate(40000)
        matches(refused(d, "map", h, "1+", "0", "1.0.50000.0"), "was cut since", "the line")
        equal(d.ctl("map", h)["rows"], 40000, "rows after the cut")


def map_tells_what_moves():
    with World() as d, Client(d.socket) as c:
        r = Rows(c, "moves")
        r.append(100)
        r.plan(device=100)
        plan = r.wait(r.seq.request(budget(60, 40, 0, manual=True)))
        runs = [codes(x) for x in d.ctl("map", handle(d, r))["lane"]]
        equal([sum(x & 9 == 9 for x in lane) for lane in runs], [40] * LANES, "rows on the device, on their way")
        r.seq.apply(plan)
        until("applied", lambda: all(sorted(set(codes(x))) == [1, 2] for x in d.ctl("map", handle(d, r))["lane"]), 5)
        r.close()


def own_only():
    with tempfile.TemporaryDirectory(prefix="kvt.") as t, contextlib.ExitStack() as stack:
        other = os.path.join(t, "other.sock")
        d = stack.enter_context(World(tenant_other={"socket": other}))
        c = stack.enter_context(Client(d.socket))
        r = Rows(c, "mine")
        r.append(100)
        r.plan(device=50, dram=50)
        h = handle(d, r)
        equal(len(d.ctl("trace", h, socket=d.socket)["plans"]), 1, "own plans")
        for argv in (("trace", h), ("trace", h, "1"), ("map", h)):
            matches(refused(d, *argv, socket=other), "no such sequence", "the line")
        matches(refused(d, "trace", "0x123"), "no such", "the line")
        r.close()


def own_status_is_a_sum():
    """What a tenant is told of itself is counted as it changes; ls counts anew."""
    def same(socket, n):
        s, seqs = d.ctl("status", socket=socket), d.ctl("ls", socket=socket)["seqs"]
        total = {t: (sum(q["tiers"][t]["rows"] for q in seqs), sum(q["tiers"][t]["bytes"] for q in seqs))
                 for t in ("device", "dram", "nvme")}
        got = {t["name"]: (t["rows"], t["bytes"]) for t in s["tiers"]}
        return (s["sequences"], len(seqs), got, s["rows_dropped"]) == (n, n, total, sum(q["rows_dropped"] for q in seqs))

    with tempfile.TemporaryDirectory(prefix="kvt.") as t, contextlib.ExitStack() as stack:
        other = os.path.join(t, "other.sock")
        d = stack.enter_context(World(tenant_other={"socket": other}))
        mine, theirs = stack.enter_context(Client(d.socket)), stack.enter_context(Client(other))
        a, b, c = Rows(mine, "a"), Rows(mine, "b", leased=True), Rows(theirs, "c")
        for r, n in ((a, 100), (b, 200), (c, 50)):
            r.append(n)
        until("appended", lambda: same(d.socket, 2) and same(other, 1), 5)
        equal(d.ctl("status", socket=d.socket)["tiers"][0]["rows"], 300 * LANES, "rows on the device")
        a.plan(device=40, dram=20, nvme=20)
        b.plan(device=50, dram=70, nvme=ROWS_ALL)
        c.plan(device=50, dram=50)
        a.append(7)
        until("planned", lambda: same(d.socket, 2) and same(other, 1), 5)
        s = d.ctl("status", socket=d.socket)
        equal((s["plans_decided"], s["rows_dropped"], s["orphans"]), (2, 20 * LANES, 0), "plans, rows dropped, orphans")
        a.truncate(30)
        until("cut", lambda: same(d.socket, 2), 5)
        b.close()
        until("saved", lambda: d.ctl("status", socket=d.socket)["orphans"] == 1 and same(d.socket, 2), 5)
        a.close(drop=True)
        until("ended", lambda: same(d.socket, 1), 5)
        equal(d.ctl("status", socket=d.socket)["tiers"][0]["rows"], 0, "rows on the device")
        expect(d.ctl("status", socket=d.socket)["plans_decided"] >= 2, "plans only rise")
        c.close()


def table():
    with World() as d, Client(d.socket) as c:
        r = Rows(c, "table")
        r.append(100)
        for n in range(70):
            r.plan(device=20 + n % 2, dram=ROWS_ALL)
        p = subprocess.run([str(build_dir() / "kvtierctl"), "--socket", d.admin, "trace", handle(d, r)],
                           capture_output=True, text=True, timeout=20, check=True)
        lines = p.stdout.splitlines()
        equal(len(lines), 66, "lines of the table: 64 plans, a heading, and what the kernel's probes say")
        matches(lines[65], r"^stalls  off: .*(bpf|not asked yet)", "the last line")
        probes = d.ctl("trace", handle(d, r))["probes"]
        equal((probes["on"], probes["client"]), (False, None), "probes without a loader")
        matches(probes["why_off"], "bpf|not asked yet", "why")
        equal([x.split()[0] for x in lines[1:65]], [str(i) for i in range(7, 71)], "plans")
        r.close()


def listing_while_planning():
    with World() as d, Client(d.socket, max_seqs=700) as c:
        seqs = [Rows(c, f"many{i}", cap=16, stage=0, max_rows=64) for i in range(600)]
        busy = Neighbour(d.socket)
        want = {hex(r.seq.info()["handle"]) for r in seqs}
        for _ in range(10):
            got = [s["handle"] for s in d.seqs()]
            equal(len(got), len(set(got)), "sequences listed twice")
            expect(want <= set(got), f"{len(want - set(got))} sequences are not listed")
        busy.well()
        busy.stop()
        s = d.status()
        expect(0 < s["loop_recent_max_ns"] <= s["loop_max_ns"], "the longest slices")


t = Tap()
for name, fn in (("trace tells what plans did", true_counts),
                 ("trace tells of demotion by hand and of a cancelled plan", demoted_and_cancelled),
                 ("trace of a row agrees with show lanes and the runtime", rows_agree_with_lanes),
                 ("map of every row agrees with trace", map_agrees_with_trace),
                 ("a long map comes in pieces that fit", map_in_slices),
                 ("map tells what is on its way", map_tells_what_moves),
                 ("trace is for one's own sequences", own_only),
                 ("a tenant's own status is the sum of its sequences", own_status_is_a_sum),
                 ("trace prints the last 64 plans, newest last", table),
                 ("a listing while plans are made is complete", listing_while_planning)):
    t.case(name, fn)
t.done()
