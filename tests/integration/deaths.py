#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Processes die: what exactly is left then, case by case. Many deaths at random moments are in tests/torture.

Leased sequences come back with the right bytes or not at all; clients of a dead daemon get their answer within their
deadline and keep their rows.
"""
import time

from kvtier import ROWS_ALL, Client, Error, Region

from lib.rows import LANES, Rows
from lib.victims import Victim, Worker, leased, refused, resume
from lib.world import E_BUSY, E_DAEMON, E_EXISTS, E_NOENT, E_STALE, Tap, World, equal, expect, until

# ---- clients die ----------------------------------------------------------------------------


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
    if not r.rows:  # nothing of it had been stored: there is nothing to decide
        return 0, 0
    r.plan(ROWS_ALL, 0, ROWS_ALL)
    there, lost = r.check(), r.seq.info()["dropped_rows"]
    equal(there + lost, r.rows * LANES, "rows there and rows counted as dropped")
    return there, lost


def torn_leased(d):
    """Rows moved in the region, the daemon does not know: it may believe only what no plan touched."""
    Victim(d, "torn", "torn").kill()
    with Client(d.socket, name="heir") as c:
        r = resume(d, "torn", c)
        equal(r.rows, 677, "rows")
        there, lost = survivors(r)
        expect(there >= 400 * LANES and lost > 0, f"{there} rows came back, {lost} are lost")
        r.close(drop=True)


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


def main():
    tap = Tap()
    with World() as d:
        tap.case("SIGKILL of a leased client at rest: another process resumes every byte", idle_leased, d)
        tap.case("SIGKILL between a plan's application and its acknowledgement", torn_leased, d)
    with World() as d:
        tap.case("SIGKILL of the daemon: clients keep their rows and reconnect", daemon_killed, d)
    with World() as d:
        tap.case("SIGTERM: drains in time, leased sequences survive bit for bit", drained, d)
    tap.done()


if __name__ == "__main__":
    main()
