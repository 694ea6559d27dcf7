#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Bad input and full tiers. What is refused is refused in one line that names field, value and limit, under
the documented code; what does not fit is counted; the daemon stays up."""
import os
import resource
import socket
import subprocess
import time
from pathlib import Path

from kvtier import ROWS_ALL, Client, Error, Model, Region, Sequence

from lib import disk
from lib.rows import LANES, Rows
from lib.victims import refused
from lib.world import (E_BUSY, E_EXISTS, E_INVAL, E_LIMIT, E_MODEL, E_NOENT, E_NOSPC, Failed, Tap, World,
                       equal, expect, matches, until)


def line(code, pattern, fn, what):
    text = refused(code, fn, what)
    matches(text, pattern, what)
    expect("\n" not in text, f"{what}: more than one line: {text!r}")


# ---- what a runtime may ask for ------------------------------------------------------------


def budgets(d):
    with Client(d.socket) as c:
        r = Rows(c, "budgets")
        r.append(100)
        equal(r.plan(device=10_000_000), (0, 0, 0), "a budget above the rows moves")
        equal(r.check(), 100 * LANES, "rows")
        line(E_INVAL, r'budget.policy: "oracle" is not known', lambda: r.plan(policy="oracle"), "unknown policy")
        line(E_INVAL, r"budget.policy: 40 bytes, must be at most 31", lambda: r.plan(policy="x" * 40), "long policy")
        line(E_INVAL, r"pos: 90, n: 11, the sequence has 100", lambda: r.fetch(90, 11), "fetch past the end")
        line(E_INVAL, r"^seq_append: pos: 99, must be 100", lambda: r.seq.append(99, 1), "append not at the end")
        line(E_INVAL, r"rows: 101|n: 101", lambda: r.seq.truncate(101), "truncate past the end")
        line(E_INVAL, r"prefix: 101", lambda: Rows(c, "fork", fork_of=r.seq, prefix=101), "fork past the end")
        r.check()


def sizes(d):
    with Client(d.socket) as c:
        line(E_INVAL, r"max_rows: 2000000, must be 1\.\.1048576", lambda: Rows(c, "long", max_rows=2_000_000), "max_rows")
        line(E_INVAL, r"max_rows: 0", lambda: Rows(c, "none", max_rows=0), "max_rows 0")
        line(E_INVAL, r"name: \"a/b\"", lambda: Rows(c, "x", model="a/b"), "a model named as a path")
        line(E_INVAL, r"bytes: 0", lambda: Region(c, 0), "an empty region")
        m = Model(c, "pattern", 2, 2, 16)
        layouts, n = m.layout(100, 10)
        small = Region(c, n - 4096)
        line(E_INVAL, r"layout\[1\]\.v_off: \d+, its rows end at byte \d+ of a region of \d+",
             lambda: Sequence(c, m, small, layouts, 100), "a region too small for its layouts")
        r = Rows(c, "short", cap=64, stage=16, max_rows=128)
        line(E_NOSPC, r"65 rows|cap|64", lambda: r.seq.append(0, 65), "more rows than cap")
        r.append(64)
        r.plan(device=10, dram=ROWS_ALL)
        r.append(54)
        r.plan(device=10, dram=ROWS_ALL)
        line(E_NOSPC, r"128", lambda: r.seq.append(118, 11), "rows past max_rows")
        r.append(10)
        r.check()


def names(d):
    with Client(d.socket) as c:
        key, secret = b"k" * 16, b"s" * 32
        r = Rows(c, "one", key=key, secret=secret, leased=True)
        line(E_EXISTS, r"key: in use by sequence", lambda: Rows(c, "two", key=key), "the same key again")
        line(E_NOENT, r"key: no leased sequence", lambda: Rows(c, "x", key=b"n" * 16, leased=True, resume=True),
             "a key nobody has")
        r.append(40)
        r.close()
        until("orphan", lambda: d.status()["orphans"] == 1, 5)
        line(E_MODEL, r"model: not the one", lambda: Rows(c, "one", key=key, secret=secret, leased=True, resume=True,
                                                         model="another"), "resume with another model")
        line(E_INVAL, r"max_rows: 39, the sequence has 40", lambda: Rows(
            c, "one", key=key, secret=secret, leased=True, resume=True, max_rows=39), "resume with less room")
        again = Rows(c, "one", key=key, secret=secret, leased=True, resume=True)
        again.whole()
        again.close(drop=True)
    for verb in (["show", "0x1234"], ["show", "deadbeef"], ["drop", "ffffffffffffffff"], ["budget", "abcd", "device=1"]):
        try:
            d.ctl(*verb)
            raise AssertionError(f"{verb} was accepted")
        except Failed as e:
            matches(str(e), rf"exit 1: .*{verb[1]}.*no such (handle|key)", f"kvtierctl {verb}")


def quotas(d):
    with Client(d.socket, max_seqs=2) as c, Client(d.socket) as other:
        line(E_LIMIT, r"bytes: 67108864, tenant default has \d+ of 33554432 left", lambda: Region(c, 64 << 20), "region")
        a, b = Rows(c, "a", cap=64, stage=64), Rows(c, "b", cap=64, stage=64)
        line(E_LIMIT, r"sequences: this client has 2, limit max_seqs 2", lambda: Rows(c, "c", cap=64, stage=64), "client")
        third = Rows(other, "third", cap=64, stage=64)
        line(E_LIMIT, r"sequences: tenant default has 3, limit max_seqs 3", lambda: Rows(other, "d", cap=64, stage=64),
             "tenant")
        b.close()
        b = Rows(c, "b", cap=64, stage=64)
        regions = []
        text = ""
        while not text and len(regions) < 100:
            try:
                regions.append(Region(other, 4 << 20))
            except Exception as e:  # noqa: BLE001: its line is looked at
                text = str(e)
        matches(text, r"bytes: 4194304, tenant default has \d+ of 33554432 left", "regions up to the quota")
        for s in (a, b, third):
            s.append(20)
            s.check()
    with Client(d.socket, plan_bytes=1 << 16) as c:
        line(E_NOSPC, r"plan_bytes: \d+ for 4 lanes of 100000 rows do not fit in the client's 65536",
             lambda: Rows(c, "p", cap=64, stage=64, max_rows=100_000), "plan memory")
        Rows(c, "p", cap=64, stage=64, max_rows=1000).append(20)


def clients(d):
    open_ = [Client(d.socket) for _ in range(3)]
    for _ in range(50):  # whether the line or the client's hello is first
        line(E_LIMIT, r"clients: uid \d+ has 3 in tenant default, limit max_clients_per_uid 3",
             lambda: Client(d.socket, timeout_ms=1000), "the fourth client")
    open_.pop().close()
    until("room for another", lambda: d.status()["clients"] == 2, 2)
    with Client(d.socket) as c:
        Rows(c, "late", cap=64, stage=64).append(10)
    for c in open_:
        c.close()


def cpu(d):
    fields = Path(f"/proc/{d.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors(d):
    """None left: whoever comes is told, whoever is there goes on, and the loop does not spin."""
    with Client(d.socket) as c:
        r = Rows(c, "there")
        r.append(200)
        r.plan(device=50, dram=ROWS_ALL)
        n = len(os.listdir(f"/proc/{d.pid}/fd"))
        old = resource.prlimit(d.pid, resource.RLIMIT_NOFILE, (n + 3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(8)]
        for s in waiting:
            s.connect(d.socket)
        line(E_LIMIT, r"clients: kvtierd has no descriptor left", lambda: Client(d.socket, timeout_ms=1000), "open")
        spent = cpu(d)
        time.sleep(1)
        expect(cpu(d) - spent < 0.5, f"{cpu(d) - spent:.2f} s of CPU in an idle second")
        r.plan(device=20, dram=ROWS_ALL)
        r.whole()
        for s in waiting:
            s.close()
        resource.prlimit(d.pid, resource.RLIMIT_NOFILE, old)
        until("served again", lambda: tried(lambda: Client(d.socket).close()), 5)


def tried(fn):
    try:
        fn()
        return True
    except Error:
        return False


def frozen(d):
    with Client(d.socket) as c:
        r = Rows(c, "ice")
        r.append(50)
        d.ctl("freeze", "on")
        line(E_BUSY, r"kvtierd is frozen", lambda: r.plan(device=10), "a plan while frozen")
        r.append(10)
        d.ctl("freeze", "off")
        r.plan(device=10, dram=ROWS_ALL)
        r.whole()


# ---- weights -------------------------------------------------------------------------------------


def weights(d):
    tool = Path(d.binary).parent / "kvtier-weights"
    cases = {
        "junk": (lambda p: p.write_bytes(b"not weights at all" * 100), r"magic: not KVTIERWT"),
        "empty": (lambda p: p.write_bytes(b""), r"size: 0 bytes, must be at least 256"),
        "shape": (lambda p: make(tool, p, "shape", layers=3), r"layers: 3, "),
        "flipped": (lambda p: flip(make(tool, p, "flipped"), 5000), r"digest|SHA-256"),
        "cut": (lambda p: os.truncate(make(tool, p, "cut"), 4000), r"size|total"),
        "missing": (lambda p: None, r"No such file"),
    }
    with Client(d.socket) as c:
        for name, (prepare, pattern) in cases.items():
            path = d.models / f"{name}.kvp"
            prepare(path)
            before = len(d.log_lines())
            r = Rows(c, name, model=name, cap=128, stage=128)
            r.append(100)
            r.plan(device=30, dram=ROWS_ALL, policy="kvp")
            equal(r.seq.info()["policy"], "streaming", f"{name}: the policy that ran")
            said = [x for x in d.log_lines()[before:] if f'model "{name}" runs streaming: kvp: ' in x]
            equal(len(said), 1, f"{name}: lines of the log ({d.log_lines()[before:]})")
            matches(said[0], pattern, f"{name}: the line")
            matches(said[0], rf"{name}\.kvp", f"{name}: the file in the line")
            r.whole()
            if name in ("junk", "flipped"):
                try:
                    d.ctl("policy", "load", str(path))
                    raise AssertionError("loaded")
                except Failed as e:
                    matches(str(e), rf"exit 1: .*{name}\.kvp: .*({pattern})", "policy load")
        make(tool, d.models / "sound.kvp", "sound")
        r = Rows(c, "sound", model="sound", cap=128, stage=64)
        r.append(100)
        r.plan(device=30, dram=ROWS_ALL, policy="kvp")
        equal(r.seq.info()["policy"], "kvp", "the policy that ran with sound weights")


def make(tool, path, model, layers=2):
    subprocess.run([str(tool), "random", "--layers", str(layers), "--heads", "2", "--dim", "16", "--model", model,
                    "-o", str(path)], check=True)
    return path


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


# ---- full tiers --------------------------------------------------------------------------------------


def fill(d, c, n, lossless, rows=3000, **budget):
    """n sequences of `rows` rows, more than fit below. Every row is somewhere and right, or counted as dropped:
    lossless budgets drop none, and what finds no room stays on the device."""
    seqs, dropped, behind = [], 0, 0
    for i in range(n):
        r = Rows(c, f"full{i}", cap=rows, stage=rows, equal_lanes=False)
        r.append(rows)
        r.plan(**budget)
        seqs.append(r)
    for r in seqs:
        info = r.seq.info()
        there = sum(info["tier_rows"].values())
        equal(there + info["dropped_rows"], r.rows * LANES, "rows accounted for")
        dropped += info["dropped_rows"]
        behind += info["tier_rows"]["device"] - budget["device"] * LANES
        r.plan(ROWS_ALL, 0, ROWS_ALL)
        equal(r.check(), there, "rows that came back right")
    expect(dropped + behind > 0, "everything fitted: the test is too small")
    if lossless:
        equal(dropped, 0, "rows dropped under a budget that drops nothing")
    else:
        equal(behind, 0, "rows above the device budget")
    s = d.status()
    equal(s["rows_dropped"], dropped, "rows dropped, by status")
    equal((s["misses"]["corrupt"], s["misses"]["io"]), (0, 0), "misses")
    for r in seqs:
        r.close()
    after = Rows(c, "after")
    after.append(200)
    after.plan(device=20, dram=ROWS_ALL, nvme=ROWS_ALL)
    equal(after.seq.info()["tier_rows"]["device"], 20 * LANES, "device rows, now that there is room again")
    after.whole()
    after.close()


def dram_full(lossless):
    """16M in 2M slabs of one page size each: what the allocator has free may not fit, and a plan is made again."""
    budget = {"dram": ROWS_ALL, "nvme": ROWS_ALL if lossless else 0}
    with World(dram={"size": "16M"}, nvme={"enabled": "no"}) as d, Client(d.socket, timeout_ms=10000) as c:
        fill(d, c, 14, lossless, device=32, **budget)


def both_full(lossless):
    with World(dram={"size": "4M"}, nvme={"size": "16M"}) as d, Client(d.socket, timeout_ms=10000) as c:
        fill(d, c, 16, lossless, device=32, dram=1000, nvme=ROWS_ALL if lossless else 1 << 20)


def no_space_injected():
    """Every write to NVMe finds no place: the plan comes all the same, and what the budget promised holds."""
    with World(nvme={"fault": "enospc=1000"}) as d, Client(d.socket) as c:
        for nvme in (ROWS_ALL, 200):
            r = Rows(c, f"nowhere{nvme}", equal_lanes=False)
            r.append(400)
            r.plan(device=100, nvme=nvme)
            expect(d.status()["misses"]["nospace"] > 0, "not counted")
            equal(r.check(), (400 if nvme == ROWS_ALL else 100) * LANES, "rows on the device")
            equal(r.seq.info()["dropped_rows"], 0 if nvme == ROWS_ALL else 300 * LANES, "dropped")
            r.plan(device=50, dram=ROWS_ALL)
            equal(r.check(), 50 * LANES, "rows, with room in DRAM")
            r.plan(ROWS_ALL, 0, ROWS_ALL)
            equal(r.check() + r.seq.info()["dropped_rows"], 400 * LANES, "rows that came back and rows dropped")


def tenant_quota():
    """max_dram holds one tenant back, not the other."""
    with World(**{"tenant_small": {"socket": "small.sock", "max_dram": "512K", "max_nvme": "0"}}) as d:
        with Client(os.path.join(d.run, "small.sock")) as small, Client(d.socket) as big:
            s, b = (Rows(c, t, cap=3000, stage=3000, equal_lanes=False) for c, t in ((small, "small"), (big, "big")))
            for r in (s, b):
                r.append(3000)
                r.plan(device=50, dram=ROWS_ALL, nvme=ROWS_ALL)
            equal(s.check() > 50 * LANES, True, "small keeps on the device what its quota refuses")
            equal(b.check(), 50 * LANES, "big is not held back")
            for r in (s, b):
                held = r.seq.info()["tier_bytes"]["dram"]
                expect(r is b or held <= 512 << 10, f"small holds {held} bytes, max_dram is 512K")
                r.whole()
            s.plan(device=50, dram=ROWS_ALL)
            info = s.seq.info()
            expect(info["dropped_rows"] > 0, "a budget that may drop, and a full quota: nothing was dropped")
            equal(sum(info["tier_rows"].values()) + info["dropped_rows"], 3000 * LANES, "rows accounted for")


def main():
    tap = Tap()
    with World() as d:
        tap.case("budgets, policies and positions", budgets, d)
        tap.case("sizes", sizes, d)
        tap.case("keys and names", names, d)
        tap.case("frozen", frozen, d)
        tap.case("weight files that do not fit are refused by name and the fallback runs", weights, d)
    with World(tenant_default={"max_region": "32M", "max_seqs": 3}) as d:
        tap.case("quotas of region, sequences and plan memory", quotas, d)
    with World(tenant_default={"max_clients_per_uid": 3}) as d:
        tap.case("clients of one user", clients, d)
    with World() as d:
        tap.case("descriptors", descriptors, d)
    for lossless in (True, False):
        how = "a budget that drops nothing" if lossless else "a budget that may drop"
        tap.case(f"DRAM full, no NVMe, {how}", dram_full, lossless)
        tap.case(f"DRAM and NVMe full, {how}", both_full, lossless)
    tap.case("NVMe finds no place", no_space_injected)
    tap.case("a tenant's quota of DRAM", tenant_quota)
    disk.cases(tap)
    tap.done()

if __name__ == "__main__":
    main()
