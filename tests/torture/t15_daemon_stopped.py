#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# torture 15: the daemon is stopped for a while
# pass: client calls return within their deadline
# quick: stopped for 10 s
# full: stopped for 60 s
# plants: call-without-deadline wait-without-deadline send-without-deadline
"""SIGSTOP, and then every call of kvtier.h that talks to the daemon, again and again until it goes on, on a connection
that has not heard of it and on one whose socket and rings are full: each returns by its deadline, with the code that its
comment promises, and what needs no daemon goes on at once. After SIGCONT every row is right and the sequence goes on.
A deadline that is missed by more than the time that a loaded machine may take (2 s) fails.
"""
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from kvtier import ROWS_ALL, Client, Error, Model, Region, Sequence, budget  # noqa: E402
from kvtier._lib import Layout  # noqa: E402
from lib.riders import full, percentile  # noqa: E402
from lib.rows import DIM, HEADS, Rows  # noqa: E402
from lib.victims import leased  # noqa: E402
from lib.world import E_DAEMON, E_NOSPC, E_STALE, E_TIMEOUT, Tap, World, equal, expect, until  # noqa: E402

DEADLINE, GRACE = 0.2, 2.0
SECONDS = 60 if full() else 10


class Late:
    """How long after its deadline each call came back."""

    def __init__(self):
        self.over, self.calls = [], 0

    def call(self, codes, what, fn, deadline=DEADLINE):
        """One of `codes`, in time. A sequence whose truncation got no answer is STALE until that is asked again."""
        t = time.monotonic()
        try:
            fn()
            code = 0
        except Error as e:
            code = e.code
        took = time.monotonic() - t
        self.calls += 1
        self.over.append(max(0.0, took - deadline))
        expect(code in codes, f"{what}: {code}, must be one of {codes}")
        expect(took < deadline + GRACE, f"{what}: came back after {took:.2f} s, its deadline is {deadline}")
        if code == E_TIMEOUT:
            expect(took > deadline * 0.9, f"{what}: TIMEOUT after {took:.2f} s, its deadline is {deadline}")


class Seat:
    """A client with a leased sequence that has rows everywhere, a spare region and another sequence."""

    def __init__(self, d, tag):
        self.d, self.tag = d, tag
        self.client = Client(d.socket, name=tag, timeout_ms=int(DEADLINE * 1000))
        self.patient(10000)
        self.rows = Rows(self.client, tag, ttl_s=60, region=lambda c, n: Region(c, n + 65536), **leased(tag))
        self.rows.append(300)
        self.rows.plan(device=100, dram=100, nvme=ROWS_ALL)
        self.cut = Rows(self.client, tag + "cut")
        self.cut.append(50)
        self.spare = Region(self.client, 1 << 20)
        self.query = (ctypes.c_float * (HEADS * DIM))(*[0.5] * (HEADS * DIM))
        at, row = self.rows.region.nbytes - 65536, DIM * 4
        self.window = Layout(k_off=at, v_off=at + HEADS * 8 * row, k_head_stride=8 * row, v_head_stride=8 * row,
                             k_row_stride=row, v_row_stride=row, cap=8)

    def patient(self, ms):
        """Set-up may take longer than the deadline that is measured."""
        end = time.monotonic() + ms / 1000
        while time.monotonic() < end:
            try:
                Region(self.client, 4096).close()
                return
            except Error:
                time.sleep(0.01)

    def calls(self, late):
        c, r, seq = self.client, self.rows, self.rows.seq
        late.call((E_TIMEOUT,), "kvtier_seq_info", seq.info)
        late.call((E_TIMEOUT,), "kvtier_plan_request", lambda: seq.request(budget(50, 50, ROWS_ALL, manual=True)))
        late.call((E_TIMEOUT,), "kvtier_fetch", lambda: seq.fetch(0, 10))
        late.call((E_TIMEOUT,), "kvtier_region_create", lambda: Region(c, 4096))
        with os.fdopen(os.memfd_create("pool"), "r+b") as pool:
            pool.truncate(8192)
            late.call((E_TIMEOUT,), "kvtier_region_import", lambda: Region(c, 8192, pool.fileno()))
        late.call((E_TIMEOUT,), "kvtier_model_register", lambda: Model(c, f"other{late.calls}", 1, 1, 16))
        late.call((E_TIMEOUT,), "kvtier_seq_open", lambda: Sequence(c, r.model, self.spare, r.layouts, 512))
        late.call((E_TIMEOUT,), "kvtier_seq_resume",
                  lambda: Sequence(c, r.model, self.spare, r.layouts, 512, resume=True, ttl_s=60, **leased("nobody")))
        late.call((E_TIMEOUT,), "kvtier_seq_fork",
                  lambda: Sequence(c, r.model, self.spare, r.layouts, 512, fork_of=seq, prefix=10))
        late.call((E_TIMEOUT,), "kvtier_seq_recall", lambda: seq.recall(0, ctypes.addressof(self.query), 1, 8, self.window))
        late.call((E_TIMEOUT,), "kvtier_seq_recall_prepare", seq.recall_prepare)
        late.call((E_TIMEOUT,), "kvtier_seq_recall_end", seq.recall_end)
        late.call((E_TIMEOUT,), "kvtier_plan_wait", lambda: seq.wait(1 << 40, timeout_ms=200), 0.2)
        late.call((E_TIMEOUT,), "kvtier_seq_truncate", lambda: self.cut.seq.truncate(40))
        late.call((E_STALE,), "kvtier_seq_append after that", lambda: self.cut.seq.append(50, 1))
        late.call((E_DAEMON,), "kvtier_open", lambda: Client(self.d.socket, timeout_ms=int(DEADLINE * 1000)))

    def needs_no_daemon(self, late):
        r = self.rows
        late.call((0, E_NOSPC), "kvtier_seq_append", lambda: r.append(1) if r.rows < 700 else None)
        late.call((0,), "kvtier_plan_peek", r.seq.peek)
        late.call((0,), "kvtier_process", self.client.process)
        late.call((0,), "kvtier_stats", self.client.stats)
        r.check()

    def goes_on(self):
        rows = self.rows.rows
        until(f"{self.tag}: served again", lambda: served(self.rows, rows), 20)
        for _ in range(20):  # what was asked for in between is done or cancelled; the deadline is short for a busy host
            try:
                self.rows.whole()
                break
            except Error as e:
                expect(e.code == E_TIMEOUT, f"{e}")
        self.rows.check()
        until(f"{self.tag}: the truncation is answered", lambda: answered(self.cut), 20)
        self.cut.check()
        self.client.close()


def served(r, rows):
    try:
        return r.seq.info()["rows"] == rows
    except Error as e:
        expect(e.code == E_TIMEOUT, f"{e}")
        return False


def answered(r):
    try:
        r.truncate(40)
        return True
    except Error as e:
        expect(e.code == E_TIMEOUT, f"{e}")
        return False


@contextlib.contextmanager
def at_rest(d, longest):
    """The daemon is stopped. A call that does not come back ends with it."""
    os.kill(d.pid, signal.SIGSTOP)
    rescue = threading.Timer(longest, d.proc.kill)
    rescue.start()
    try:
        yield
    finally:
        rescue.cancel()
        os.kill(d.pid, signal.SIGCONT)


class Hammer(threading.Thread):
    """Asks on one connection all the time, large requests, until its socket takes no more, and then still; hints past
    what its ring holds. Whoever shares the connection waits for its lock no longer than for anything else."""

    def __init__(self, seat):
        super().__init__(daemon=True)
        self.seat, self.late, self.error, self.end, self.full = seat, Late(), None, time.monotonic() + SECONDS, False

    def run(self):
        try:
            while time.monotonic() < self.end:
                self.late.call((E_TIMEOUT,), "kvtier_model_register, a large one", self.register)
                while self.seat.rows.rows < 700:
                    self.seat.rows.append(1)
            self.seat.calls(self.late)
        except BaseException as e:  # noqa: BLE001: told by the case
            self.error = e

    def register(self):
        try:
            Model(self.seat.client, f"large{self.late.calls}", 256, 1, 16)
        except Error as e:
            self.full |= "does not read" in str(e)
            raise


def stopped(d, late):
    idle, busy = Seat(d, "idle"), Seat(d, "busy")
    with at_rest(d, SECONDS + 15):
        hammer = Hammer(busy)
        hammer.start()
        while time.monotonic() < hammer.end:
            idle.calls(late)
            idle.needs_no_daemon(late)
            late.call((E_TIMEOUT,), "a call beside others", lambda: Region(busy.client, 4096))
        p = subprocess.run([str(Path(d.binary).parent / "kvtierctl"), "--socket", d.admin, "--timeout", "0.4", "status"],
                           capture_output=True, text=True, timeout=10, check=False)
        equal(p.returncode, 4, f"kvtierctl's exit status ({p.stderr})")
        hammer.join(40)
    expect(not hammer.is_alive(), "a call did not come back")
    if hammer.error:
        raise hammer.error
    expect(hammer.full, "the socket never was full: the test proves less than it says")
    late.over += hammer.late.over
    late.calls += hammer.late.calls
    idle.goes_on()
    busy.goes_on()
    expect(d.alive(), "the daemon died")


def closing(d, late):
    """What ends things returns, too."""
    s = Seat(d, "closing")
    with at_rest(d, 10):
        late.call((0,), "kvtier_seq_close", s.cut.seq.close)
        late.call((E_TIMEOUT,), "kvtier_seq_drop", s.rows.seq.drop)
        late.call((0,), "kvtier_region_close", s.spare.close)
        late.call((0,), "kvtier_close", s.client.close)

    def gone():
        st = d.status()  # a drop that got no answer may happen or not: then a lease is left
        return not st["clients"] and st["sequences"] == st["orphans"] <= 1
    until(lambda: f"its client and sequences are gone: {d.status()}", gone, 20)


def main():
    tap, late = Tap(), Late()
    with World() as d:
        ok = tap.case(f"stopped for {SECONDS} s: every call returns in time with the right code; then all goes on", stopped, d, late)
    with World() as d:
        ok = tap.case("calls that end things, while it is stopped", closing, d, late) and ok
    if ok:
        print(f"# figure: {late.calls:,} calls to a daemon stopped for {SECONDS} s, all back; over their deadline of {DEADLINE * 1000:.0f} ms: "
              f"p50 {percentile(late.over, 50) * 1000:.1f} ms, p99 {percentile(late.over, 99) * 1000:.1f} ms, at most {max(late.over) * 1000:.0f} ms")
    tap.done()


if __name__ == "__main__":
    main()
