# SPDX-License-Identifier: MIT
"""A neighbour that measures, those who bother it, and those who only burn as much time: tests/torture/*.c as processes."""
import json
import os
import subprocess
import time

from kvtier.daemon import build_dir

from .world import Failed, expect

FULL = os.environ.get("KVT_TORTURE") == "full"


def program(name, *args, **kw):
    return subprocess.Popen([str(build_dir() / "tests" / "torture" / name), *map(str, args)], text=True, **kw)


def seconds(quick, full_minutes):
    """How long a test that runs for a time does: KVT_MINUTES cuts it."""
    m = float(os.environ.get("KVT_MINUTES", full_minutes if FULL else quick / 60))
    return 60 * min(m, full_minutes)


class Pulse:
    """tests/torture/pulse.c. `with Pulse(socket) as p:` the sum of its rows and samples is in p.end afterwards."""

    def __init__(self, socket, period_us=4000, ident=1):
        self.p = program("pulse", socket, period_us, ident, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        expect(self.p.stdout.readline() == "ready\n", "the neighbour did not get ready")
        self.end = None

    def say(self, line):
        try:
            print(line, file=self.p.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(f"the neighbour ended: exit status {self.p.wait()}") from None

    def tell(self):
        self.say("tell")
        return self._read()

    def _read(self):
        line = self.p.stdout.readline()
        expect(line, "the neighbour ended without a word")
        return json.loads(line)

    def well(self):
        """Alive, and no row was wrong so far."""
        equal = self.tell()
        expect(self.p.poll() is None and not equal["wrong"], f"neighbour: {equal}")
        return equal

    def stop(self):
        if self.end is None:
            self.p.stdin.close()
            self.end = self._read()
            rc = self.p.wait(30)
            expect(rc == 0 and not self.end["wrong"], f"neighbour: exit status {rc}, {self.end}")
        return self.end

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if exc[0] is None:
            self.stop()
        elif self.p.poll() is None:
            self.p.kill()
            self.p.wait()


def cpu_seconds(pid):
    """User and system time of a process, all threads."""
    f = open(f"/proc/{pid}/stat", encoding="ascii").read().rsplit(")", 1)[1].split()
    return (int(f[11]) + int(f[12])) / os.sysconf("SC_CLK_TCK")


class Busy:
    """Processes that somebody else is bothered by; what they used is known at the end, in `share` of one core."""

    def __init__(self, start):
        self.start, self.procs, self.share, self.said = start, [], 0.0, []

    def __enter__(self):
        self.procs, self.since = self.start(), time.monotonic()
        return self

    def __exit__(self, *exc):
        took = time.monotonic() - self.since
        used = sum(cpu_seconds(p.pid) for p in self.procs if p.poll() is None)
        for p in self.procs:
            p.terminate()
        for p in self.procs:
            try:
                out, _ = p.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                p.kill()
                out, _ = p.communicate()
            self.said += (out or "").splitlines()
        self.share = used / took


def burners(share, threads):
    """As much time as `share` cores, in that many threads."""
    if share < 0.005:
        return Busy(lambda: [])
    percent = min(100.0, 100 * share / threads)
    return Busy(lambda: [program("burn", threads, f"{percent:.1f}")])


def compare(pulse, attack, threads, total_s, rounds=4, pause=0.3, during=None, said=None, name="attack"):
    """Attack and its burner by turns, so that a host that gets slower makes both slower. A short first attack tells how
    much time it takes. `during(name, busy)` is called all the while; `said` gets what the attackers print. Returns the
    samples beside the attack, those beside the burner, and the attack's share of a core."""
    def spell(who, busy, s):
        pulse.say("as " + who)
        with busy as b:
            time.sleep(pause)
            end = time.monotonic() + s
            while time.monotonic() < end:
                if during:
                    during(who, b)
                time.sleep(0.05)
            pulse.say("as pause")
        pulse.well()
        if said is not None:
            said.extend(b.said)
        return b.share

    each = total_s / (2 * rounds)
    share = spell(name + ".first", Busy(attack), min(each, 3))
    for _ in range(rounds):
        spell(name + ".burn", burners(share, threads), each)
        share = 0.5 * share + 0.5 * spell(name, Busy(attack), each)
    w = pulse.tell()["windows"]
    return w[name], w[name + ".burn"], share
