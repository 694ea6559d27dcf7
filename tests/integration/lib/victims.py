#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Clients to be killed, as processes of their own (this file is their program), and clients that watch the daemon die."""
import ctypes
import hashlib
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvtier import ROWS_ALL, Client, Error, budget
from kvtier._lib import check, lib
from lib.rows import Rows, cycle
from lib.world import E_BUSY, SEED, Failed, equal

SECRET = bytes(range(32))
RND = random.Random(SEED)


def leased(tag):
    """Named by its tag, so that any process can resume it. Lanes may differ, so that all that is left can come back."""
    return {"leased": True, "key": hashlib.md5(tag.encode()).digest(), "secret": SECRET, "equal_lanes": False}


def say(text):
    print(text, flush=True)


def work(socket, kind, tag, ttl):
    """idle: leased, at rest with rows in every tier. torn: that, but a plan was applied and the daemon not told. busy:
    leased, in the middle of everything."""
    c = Client(socket, name=tag)
    r = Rows(c, tag, ttl_s=ttl, **leased(tag))
    r.append(600)
    r.plan(device=200, dram=150, nvme=ROWS_ALL)
    r.append(77)
    if kind == "torn":
        plan = r.seq.wait(r.seq.request(budget(100, 100, ROWS_ALL, manual=True)))
        check(lib.plan_apply(r.seq.ptr, ctypes.byref(plan)), "plan_apply")
    say("ready")
    while kind == "busy":
        r.plan(device=RND.randrange(50, 700), dram=RND.randrange(0, 300), nvme=ROWS_ALL)
        if r.rows < 760:
            r.append(1)
    time.sleep(600)


class Victim:
    def __init__(self, d, kind, tag="victim", ttl=60, socket=None):
        self.p = subprocess.Popen([sys.executable, __file__, socket or d.socket, kind, tag, str(ttl)],
                                  stdout=subprocess.PIPE, text=True)
        for line in self.p.stdout:
            if line == "ready\n":
                return
        raise Failed(f"the {kind} client did not get ready: exit status {self.p.wait()}")

    def kill(self):
        self.p.kill()
        self.p.wait()
        self.p.stdout.close()


def resume(d, tag, client, seconds=5, **kw):
    """The daemon may still be saving what the dead client left: BUSY is an answer, for a while."""
    end = time.monotonic() + seconds
    while True:
        try:
            return Rows(client, tag, resume=True, **{**leased(tag), **kw})
        except Error as e:
            if e.code != E_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.02)


def usage(d):
    """All that a client can leave behind in the daemon."""
    s = d.status()
    lower = {t["name"]: (t["rows"], t["used_bytes"]) for t in s["tiers"][1:]}
    device = s["tiers"][0]
    return {"clients": s["clients"], "sequences": s["sequences"], "orphans": s["orphans"], "models": s["models"],
            "device": (device["rows"], device["bytes"]), "plan_bytes": s["plan_bytes"], "fds": d.fds(), **lower}


def refused(code, fn, what):
    try:
        fn()
    except Error as e:
        equal(e.code, code, f"{what}: code ({e})")
        return str(e)
    raise Failed(f"{what}: it was accepted")


class Worker(threading.Thread):
    """Cycles until a call fails; remembers when and how."""

    def __init__(self, d, i, timeout_ms=1500):
        super().__init__(daemon=True)
        self.client = Client(d.socket, name=f"worker{i}", timeout_ms=timeout_ms)
        self.rows = Rows(self.client, f"worker{i}")
        self.error, self.ended = None, 0
        self.start()

    def run(self):
        try:
            while True:
                cycle(self.rows)
        except Exception as e:  # noqa: BLE001: looked at by the case
            self.error, self.ended = e, time.monotonic()


if __name__ == "__main__":
    try:
        work(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
    except Error:
        sys.exit(3)  # the daemon went first
