#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Processes die at the worst moment: clients by SIGKILL, the daemon by SIGKILL, SIGTERM and SIGSTOP.

Ephemeral sequences leave nothing behind; leased ones come back with the right bytes or not at all; clients
of a dead or stopped daemon get their answer within their deadline and keep their rows.
"""
import os
import signal
import subprocess
import time
from pathlib import Path

from kvtier import ROWS_ALL, Client, Error, Region

from lib.rows import LANES, Neighbour, Rows
from lib.victims import RND, Victim, Worker, leased, refused, resume
from lib.world import (E_BUSY, E_DAEMON, E_EXISTS, E_NOENT, E_STALE, E_TIMEOUT, Skip, Tap, World, equal, expect,
                       until)

# ---- clients die ----------------------------------------------------------------------------


def usage(d):
    s = d.status()
    lower = {t["name"]: (t["rows"], t["used_bytes"]) for t in s["tiers"][1:]}
    device = s["tiers"][0]
    return {"clients": s["clients"], "sequences": s["sequences"], "orphans": s["orphans"], "models": s["models"],
            "device": (device["rows"], device["bytes"]), "plan_bytes": s["plan_bytes"], "fds": d.fds(), **lower}


def back_to(d, base, seconds=1.0):
    until(lambda: f"{usage(d)}, was {base}", lambda: usage(d) == base, seconds)


def ephemeral(d):
    base = usage(d)
    for _ in range(4):
        v = Victim(d, "ephemeral")
        time.sleep(RND.random() * 0.3)
        expect(usage(d)["sequences"] > base["sequences"], "the client's sequence is not there")
        v.kill()
        back_to(d, base)
    expect(d.alive(), "the daemon died")


def forked(d):
    release = tuple(int(n) for n in os.uname().release.split("-")[0].split(".")[:2])
    if release < (6, 5):
        raise Skip(f"Linux {os.uname().release} has no SO_PEERPIDFD (6.5): only the last descriptor ends the session")
    base = usage(d)
    v = Victim(d, "forked")
    try:
        v.kill()
        os.kill(v.child, 0)
        back_to(d, base)
        os.kill(v.child, 0)
    finally:
        os.kill(v.child, signal.SIGKILL)


def idle_leased(d):
    v = Victim(d, "idle", "idle")
    with Client(d.socket, name="heir") as c:
        refused(E_BUSY, lambda: Rows(c, "idle", resume=True, **leased("idle")), "resume beside the living client")
        refused(E_EXISTS, lambda: Rows(c, "idle", **leased("idle")), "open over a leased sequence")
        v.kill()
        until("orphan", lambda: d.status()["orphans"] == 1, 2)
        refused(E_NOENT, lambda: resume(d, "idle", c, secret=b"x" * 32), "resume with another secret")
        refused(E_NOENT, lambda: resume(d, "idle", c, key=b"y" * 16), "resume with another key")
        r = resume(d, "idle", c)
        equal(r.rows, 677, "rows")
        r.whole()
        equal(r.seq.info()["dropped_rows"], 0, "dropped rows")
        r.close(drop=True)
        refused(E_NOENT, lambda: resume(d, "idle", c), "resume after drop")


def survivors(r):
    """Bring back what there is: right bytes, and what is missing is counted. Returns (there, missing)."""
    r.plan(ROWS_ALL, 0, ROWS_ALL)
    there, lost = r.check(), r.seq.info()["dropped_rows"]
    equal(there + lost, r.rows * LANES, "rows there and rows counted as dropped")
    return there, lost


def busy_leased(d):
    for i in range(5):
        v = Victim(d, "busy", "busy")
        time.sleep(RND.random() * 0.25)
        v.kill()
        with Client(d.socket, name="heir") as c:
            r = resume(d, "busy", c)
            expect(677 <= r.rows <= 760, f"rows: {r.rows}")
            there, _ = survivors(r)
            expect(there > 0, f"life {i}: nothing came back")
            r.append(5)
            r.check()
            r.close(drop=True)


def torn_leased(d):
    """Rows moved in the region, the daemon does not know: it may believe only what no plan touched."""
    Victim(d, "torn", "torn").kill()
    with Client(d.socket, name="heir") as c:
        r = resume(d, "torn", c)
        equal(r.rows, 677, "rows")
        there, lost = survivors(r)
        expect(there >= 400 * LANES and lost > 0, f"{there} rows came back, {lost} are lost")
        r.close(drop=True)


def expires(d):
    base = usage(d)
    Victim(d, "idle", "brief", ttl=1).kill()
    until("orphan", lambda: d.status()["orphans"] == 1, 2)
    until("freed after its second", lambda: d.status()["orphans"] == 0, 4)
    with Client(d.socket) as c:
        refused(E_NOENT, lambda: resume(d, "brief", c), "resume after the TTL")
    back_to(d, base)


# ---- the daemon dies ------------------------------------------------------------------------------


def outlived(d, w, killed):
    """What holds for a client whose daemon was killed, before and after another daemon runs."""
    w.join(10)
    expect(not w.is_alive(), "a call did not come back")
    expect(isinstance(w.error, Error), f"{w.error!r}")
    equal(w.error.code, E_DAEMON, f"code ({w.error})")
    expect(w.ended - killed < 3, f"came back after {w.ended - killed:.1f} s of a deadline of 1.5")
    expect(w.rows.check() > 0, "no rows")
    t = time.monotonic()
    refused(E_DAEMON, w.rows.seq.info, "info without a daemon")
    refused(E_DAEMON, lambda: Region(w.client, 4096), "a region without a daemon")
    expect(time.monotonic() - t < 1, "the answer took its time")


def reconnected(w):
    def up():
        w.client.process()
        return w.client.stats()["reconnects"] > 0

    until("reconnected", up, 5)
    refused(E_STALE, w.rows.seq.info, "the old sequence on a new connection")
    refused(E_STALE, lambda: w.rows.seq.append(w.rows.rows, 1), "append to it")
    expect(w.rows.check() > 0, "rows of the detached sequence")
    again = Rows(w.client, "again")
    again.append(300)
    again.plan(device=50, dram=100, nvme=ROWS_ALL)
    again.whole()


def swapped_out(d, tag):
    """A leased sequence of 700 rows that is on NVMe alone and closed."""
    with Client(d.socket, name=tag) as c:
        r = Rows(c, tag, ttl_s=60, **leased(tag))
        r.append(700)
        r.plan(device=0, dram=0, nvme=ROWS_ALL)
        equal(r.seq.info()["tier_rows"]["nvme"], 700 * LANES, "rows on NVMe")
        r.close()


def daemon_killed(d):
    tags = [f"night{i}" for i in range(7)]
    for tag in tags:
        swapped_out(d, tag)  # 7 x 350 KiB: some 1 MiB segments are sealed, one is not
    workers = [Worker(d, i) for i in range(3)]
    time.sleep(0.5)
    d.kill()
    killed = time.monotonic()
    for w in workers:
        outlived(d, w, killed)
    d.start()
    for w in workers:
        reconnected(w)
    found = 0
    with Client(d.socket, name="heir") as c:
        for tag in tags:
            try:
                r = resume(d, tag, c)
            except Error as e:
                equal(e.code, E_NOENT, f"code ({e})")
                continue
            found += survivors(r)[0]
            r.close(drop=True)
    expect(found >= 2 * 700 * LANES, f"{found} rows came back of two sealed segments")
    for w in workers:
        w.client.close()


def killed_again_and_again(d):
    for _ in range(4):
        w = Worker(d, 9)
        time.sleep(0.05 + RND.random() * 0.3)
        d.kill()
        w.join(10)
        expect(w.rows.check() >= 0, "rows")
        w.client.close()
        d.start()
    n = Neighbour(d.socket)
    n.well()
    n.stop()


def drained(d):
    """SIGTERM with a detached, a resting and a busy leased sequence, and an ephemeral one."""
    swapped_out(d, "asleep")
    c = Client(d.socket, name="open")
    r = Rows(c, "open", ttl_s=60, **leased("open"))
    r.append(500)
    r.plan(device=120, dram=100, nvme=ROWS_ALL)
    r.append(33)
    busy = Victim(d, "busy", "busy")
    w = Worker(d, 1)
    time.sleep(0.2)
    t = time.monotonic()
    d.proc.terminate()
    equal(d.proc.wait(25), 0, "exit status")
    expect(time.monotonic() - t < 15, f"draining took {time.monotonic() - t:.1f} s")
    w.join(10)
    busy.kill()
    r.check()
    d.start()
    with Client(d.socket, name="heir") as h:
        for tag, rows in (("asleep", 700), ("open", 533)):
            s = resume(d, tag, h)
            equal(s.rows, rows, f"{tag}: rows")
            s.whole()
            s.close(drop=True)
        s = resume(d, "busy", h)
        expect(0 < s.rows <= 760, f"busy: rows: {s.rows}")
        survivors(s)
        s.close(drop=True)
        refused(E_NOENT, lambda: resume(d, "worker1", h, key=w.rows.seq.key), "an ephemeral sequence after a restart")
    c.close()
    w.client.close()


# ---- the daemon stops -----------------------------------------------------------------------------


def stopped(d):
    c = Client(d.socket, name="patient", timeout_ms=400)
    r = Rows(c, "patient")
    r.append(300)
    r.plan(device=100, dram=ROWS_ALL)

    def on_time(code, fn, what, deadline=0.4):
        t = time.monotonic()
        refused(code, fn, what)
        took = time.monotonic() - t
        expect(deadline * 0.9 <= took < deadline + 1.5, f"{what}: {took:.2f} s, its deadline is {deadline}")

    os.kill(d.pid, signal.SIGSTOP)
    try:
        on_time(E_TIMEOUT, r.seq.info, "info")
        on_time(E_TIMEOUT, r.seq.request, "plan_request")
        on_time(E_TIMEOUT, lambda: r.seq.fetch(0, 10), "fetch")
        on_time(E_TIMEOUT, lambda: Region(c, 4096), "region_create")
        on_time(E_TIMEOUT, lambda: Rows(c, "never"), "model_register or region_create")
        on_time(E_TIMEOUT, lambda: r.seq.wait(99, timeout_ms=300), "plan_wait", 0.3)
        on_time(E_DAEMON, lambda: Client(d.socket, timeout_ms=400), "open")
        t = time.monotonic()
        r.append(50)
        r.seq.peek()
        r.check()
        expect(time.monotonic() - t < 0.3, "append, peek and resident need no daemon")
        p = subprocess.run([str(Path(d.binary).parent / "kvtierctl"), "--socket", d.admin, "--timeout", "0.4", "status"],
                           capture_output=True, text=True, timeout=10, check=False)
        equal(p.returncode, 4, f"kvtierctl's exit status ({p.stderr})")
    finally:
        os.kill(d.pid, signal.SIGCONT)
    until("served again", lambda: r.seq.info()["rows"] == 350, 5)
    r.whole()
    r.close()
    c.close()


def main():
    tap = Tap()
    with World() as d:
        tap.case("SIGKILL in the middle of a cycle: nothing of an ephemeral client is left within a second", ephemeral, d)
        tap.case("SIGKILL while a forked child holds the socket", forked, d)
        tap.case("SIGKILL of a leased client at rest: another process resumes every byte", idle_leased, d)
        tap.case("SIGKILL of a busy leased client: right bytes, losses counted", busy_leased, d)
        tap.case("SIGKILL between a plan's application and its acknowledgement", torn_leased, d)
        tap.case("a lease ends after its TTL", expires, d)
        tap.case("SIGSTOP of the daemon: calls return at their deadline", stopped, d)
    with World() as d:
        tap.case("SIGKILL of the daemon: clients keep their rows and reconnect", daemon_killed, d)
    with World() as d:
        tap.case("SIGTERM: drains in time, leased sequences survive bit for bit", drained, d)
        tap.case("SIGKILL of the daemon, again and again", killed_again_and_again, d)
    tap.done()


if __name__ == "__main__":
    main()
