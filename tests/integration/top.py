#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""kvtierctl top as an operator sees it: in a terminal that pyte plays, before a real daemon with real clients."""
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

from kvtier import ROWS_ALL, Client
from kvtier.daemon import build_dir

from lib import raw
from lib.rows import Rows
from lib.world import Failed, Skip, Tap, World, equal, expect, matches, until

try:
    import pyte
except ImportError:
    pyte = None

CTL = str(build_dir() / "kvtierctl")


class Terminal:
    """top on a pty of this size. screen() is what stands there now; pyte cannot repeat characters, as xterm does."""

    def __init__(self, socket, cols=80, rows=24, term="screen", args=()):
        if not pyte:
            raise Skip("needs pyte")
        self.term = term
        self.master, self.slave = pty.openpty()
        self.vt = pyte.Screen(cols, rows)
        self.stream = pyte.ByteStream(self.vt)
        self.seen = b""
        self.size(cols, rows)
        self.before = termios.tcgetattr(self.slave)
        env = {k: v for k, v in os.environ.items() if k not in ("LINES", "COLUMNS")}
        self.p = subprocess.Popen([CTL, "--socket", str(socket), "--interval", "0.2", *args, "top"], stdin=self.slave,
                                  stdout=self.slave, stderr=self.slave, env={**env, "TERM": term},
                                  start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if exc[0] is not None:
            for line in self.vt.display:
                print(f"# | {line.rstrip()}")
        if self.p.poll() is None:
            self.p.kill()
        self.p.wait()
        os.close(self.master)
        os.close(self.slave)

    def size(self, cols, rows):
        self.vt.resize(rows, cols)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("<4H", rows, cols, 0, 0))

    def screen(self):
        while select.select([self.master], [], [], 0.02)[0]:
            got = os.read(self.master, 65536)
            self.seen += got
            self.stream.feed(got)
        return [line.rstrip() for line in self.vt.display]

    def keys(self, text):
        os.write(self.master, text.encode())

    def shows(self, pattern, seconds=8):
        """Wait until a line matches; returns the screen."""
        def look():
            now = self.screen()
            return now if any(re.search(pattern, x) for x in now) else None
        try:
            return until(f"{pattern!r} on the screen", look, seconds)
        except Failed:
            expect(self.p.poll() is None, f"top ended with {self.p.poll()}")
            raise

    def ends(self, status=0):
        end = time.monotonic() + 5
        while self.p.poll() is None and time.monotonic() < end:
            self.screen()
        equal(self.p.poll(), status, "top's exit status")
        self.screen()
        equal(termios.tcgetattr(self.slave), self.before, "the terminal's modes")
        if self.term != "vt100":
            expect(b"\x1b[?25h" in self.seen[-200:], "the cursor stays hidden")
        if self.term == "xterm":
            expect(b"\x1b[?1049l" in self.seen[-200:], "its screen stays")


def table(screen):
    """The lines of the table of sequences, as lists of cells."""
    at = next(i for i, x in enumerate(screen) if x.startswith("HANDLE"))
    return [x.split() for x in screen[at + 1:] if x.startswith("0x")]


class Load:
    """Three clients: of 300, 200 and 100 rows; the first keeps 50 of them on the device."""

    def __init__(self, d):
        self.clients = [Client(d.socket, name=n) for n in ("alpha", "bravo", "charlie")]
        self.rows = [Rows(c, n) for c, n in zip(self.clients, ("a", "b", "c"))]
        for r, n in zip(self.rows, (300, 200, 100)):
            r.append(n)
        self.rows[0].plan(device=50, dram=100, nvme=ROWS_ALL)
        self.handle = {s["client"].split("[")[0]: s["handle"] for s in d.seqs()}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for r in self.rows:
            try:
                r.close()
            except Exception:  # noqa: BLE001: the daemon may be another by now
                pass
        for c in self.clients:
            c.close()


def stands_there(d):
    with Load(d) as load, Terminal(d.admin) as t:
        s = t.shows("^0x")
        matches(s[0], r"^kvtierd \S+ up .*clients 3, seqs 3, orphans 0, policy random", "the host line")
        matches(s[1], r"^plans \d+/s p99 \S+ \S+ last .* max .* refaults \d+/s drops 0/s miss 0/s", "the plans")
        matches(s[2], r"dram r .* nvme r .* loop max", "latencies")
        for name in ("device", "dram", "nvme"):
            expect(any(x.startswith(name + " ") for x in s), f"no tier {name}")
        matches(next(x for x in s if x.startswith("dram ")), r"^dram +\d+ .*64.0 MiB +\d+\.\d +\S+/\S+/\S+ ", "dram")
        expect(any(x.startswith("default ") for x in s), "no tenant")
        equal([r[0] for r in table(s)], [load.handle[n] for n in ("alpha", "bravo", "charlie")], "by rows, down")
        equal(table(s)[0][2], "300", "rows")
        t.shows(r"^\d\d:\d\d:\d\d\.\d{3} ack ")
        expect(all(len(x) <= 80 for x in s), "wider than 80")
        matches(s[23], "^s sort .* q quit$", "the line of keys")
        print("# a frame of 80x24:", *(f"# |{x}" for x in t.screen()), sep="\n")
        t.size(200, 50)
        s = t.shows("HANDLE .*MODEL .*POLICY")
        matches("\n".join(s), r"REFLT/s +READ50", "wide tiers")
        equal(sum(x.startswith("HANDLE") for x in s), 1, "tables after a resize")
        expect(s[49].startswith("s sort"), f"the line of keys is last: {s[49]!r}")
        t.size(50, 10)
        s = t.shows("^needs 60x16, is 50x10")
        equal([x for x in s[1:] if x], [], "the rest of a screen that is too small")
        t.size(80, 24)
        t.shows("^0x")
        t.keys("q")
        t.ends()


def order_and_filter(d):
    with Load(d) as load, Terminal(d.admin) as t:
        t.shows("^0x")
        t.keys("r")
        s = t.shows("by ROWS up")
        equal(table(s)[0][0], load.handle["charlie"], "the least rows first")
        t.keys("s")
        s = t.shows("SEQUENCES 3 of 3, by DEV down")
        equal(table(s)[-1][0], load.handle["alpha"], "the fewest on the device last")
        t.keys("/brav")
        s = t.shows('SEQUENCES 1 of 3.*filter "brav"')
        equal([r[0] for r in table(s)], [load.handle["bravo"]], "what passes")
        t.keys("\r")
        t.shows("s sort")
        t.keys("\x1b")
        t.shows("SEQUENCES 3 of 3, by DEV down$")
        t.keys("h")
        t.shows("keys$")
        t.keys("h")
        t.shows("^0x")
        t.keys("i0.5\r")
        t.shows("a look every 0.5 s")


def choose(t, d, name, handle):
    t.keys(f"/{name}\r")
    t.shows(f'1 of 3.*filter "{name}"')
    t.shows(f"^{handle}")


def steer(d):
    def budget(handle):
        return next((s for s in d.seqs() if s["handle"] == handle), None)

    with Load(d) as load, Terminal(d.admin) as t:
        t.shows("^0x")
        choose(t, d, "bravo", load.handle["bravo"])
        before = d.status()["admin_mutations"]
        t.keys("D")
        t.shows(rf"^drop {load.handle['bravo']}\?  *y/n")
        t.keys("n")
        t.shows("^drop: not done")
        t.keys("d20\r")
        t.shows(rf"^demote {load.handle['bravo']} 20\? y/n")
        t.keys("\x1b")
        t.shows("^demote: not done")
        equal(d.status()["admin_mutations"], before, "mutations after n and Esc")
        t.keys("p0 16\r")
        t.shows(r"^pin 0x\S+ 0 16\? y/n")
        t.keys("y")
        t.shows("^done: pin")
        expect(budget(load.handle["bravo"])["rows_pinned"] > 0, "nothing is pinned")
        t.keys("d20\r")
        t.shows(r"^demote 0x\S+ 20\? y/n")
        t.keys("y")
        t.shows("^done: demote")
        equal(d.status()["admin_mutations"], before + 2, "mutations after pin and demote")
        t.keys("p0 99999999\r")
        t.shows(r"\? y/n")
        t.keys("y")
        t.shows("^refused: .*ROWS")
        t.keys("D")
        t.shows(r"y/n")
        t.keys("y")
        t.shows("^done: drop")
        until("the sequence is gone", lambda: not budget(load.handle["bravo"]), 5)
        t.shows("SEQUENCES 0 of 2")


def comes_back(d):
    with Terminal(d.admin) as t:
        t.shows("^kvtierd ")
        d.stop()
        s = t.shows("^daemon gone, retrying: ")
        expect(t.p.poll() is None, "top ended")
        expect(any(x.startswith("dram ") for x in s), "what was last known is shown on")
        d.start()
        t.shows("^kvtierd .* clients 0, seqs 0")
        t.p.send_signal(signal.SIGTERM)
        t.ends()


def interrupted(d):
    for sig in (signal.SIGINT, signal.SIGTERM):
        for term in ("xterm", "screen", "linux", "vt100"):
            with Terminal(d.admin, term=term) as t:
                t.shows("^kvtierd ")
                t.p.send_signal(sig)
                t.ends()


def ctl(*argv, socket, **kw):
    return subprocess.run([CTL, "--socket", str(socket), *argv], capture_output=True, text=True, timeout=20,
                          stdin=subprocess.DEVNULL, check=False, **kw)


def once(d):
    with Load(d) as load:
        p = ctl("--once", "--interval", "0.1", "top", socket=d.admin)
        equal((p.returncode, p.stderr), (0, ""), "top --once")
        expect("\x1b" not in p.stdout, "escape sequences in plain text")
        equal([r[0] for r in table(p.stdout.splitlines())], [load.handle[n] for n in ("alpha", "bravo", "charlie")],
              "sequences")
        matches(p.stdout, r"(?m)^DECISIONS", "the stream")
        j = json.loads(ctl("--once", "--json", "--interval", "0.1", "top", socket=d.admin).stdout)
        equal(sorted(s["handle"] for s in j["seqs"]), sorted(load.handle.values()), "sequences in JSON")
        equal(j["tenants"][0]["rows"], 600, "the tenant's rows")
        told = j["status"]["tenants"][0]
        equal([j["tenants"][0][k] for k in ("name", "sequences", "region_bytes", "dram_bytes", "nvme_bytes")],
              [told[k] for k in ("name", "sequences", "region_bytes", "dram_bytes", "nvme_bytes")], "what it is charged")
        expect(told["dram_bytes"] and told["region_bytes"], f"charges: {told}")
        equal(set(j["rates_per_s"]["tiers"]), {"device", "dram", "nvme"}, "rates")
        expect(any(e["type"] == "ack" for e in j["events"]), "no plan was acked")
        p = ctl("--once", "top", socket=d.admin + ".not")
        equal(p.returncode, 3, "--once without a daemon")


def no_terminal(d):
    p = ctl("top", socket=d.admin)
    equal((p.returncode, p.stdout), (2, ""), "without a terminal")
    matches(p.stderr, r"^kvtierctl: top: needs a terminal; kvtierctl top --once .*\n$", "its line")
    with Terminal(d.admin, term="dumb") as t:
        t.shows(r"cannot place a cursor; kvtierctl$|top --once")
        equal(t.p.wait(5), 2, "TERM=dumb")


def tenants_socket(d):
    with Load(d), Terminal(d.socket) as t:
        s = t.shows("^0x")
        matches(s[0], r"^kvtierd .*, tenant default, seqs 3", "the host line")
        expect(not any(x.startswith(("DECISIONS", "p99", "kernel")) for x in s), f"the host's business: {s}")


def hostile_names(d):
    """The daemon refuses control bytes but C1 ones and text that is no UTF-8 go through: top must not."""
    name = b"evil\xc2\x9b2J\x9b31m\xe2\x80\xae"
    with raw.Raw(d.socket).hello(name=name) as r:
        r.model()
        region = struct.unpack("<2Q", r.ask(raw.REGION, struct.pack("<Q", 1 << 20))[0])[0]
        r.ask(raw.SEQ_OPEN, raw.seq_open(region=region))
        with Terminal(d.admin, 160, 30) as t:
            t.shows(r"^0x.* evil\?")
            expect(all(b == 0x1b or b < 0x7f for b in t.seen), "bytes over 0x7e reached the terminal")
        p = ctl("--once", "--interval", "0.1", "top", socket=d.admin)
        expect(p.stdout.isascii() and "\x1b" not in p.stdout, f"not plain: {p.stdout!r}")
        matches(p.stdout, r"evil\?", "the name")


def many(d):
    """Some pages of ls: complete, and scrolled to the end."""
    with raw.Raw(d.socket).hello(max_seqs=300, plan_bytes=32 << 20) as r:
        r.model()
        region = struct.unpack("<2Q", r.ask(raw.REGION, struct.pack("<Q", 1 << 20))[0])[0]
        for _ in range(300):
            r.ask(raw.SEQ_OPEN, raw.seq_open(region=region, max_rows=64))
        with Terminal(d.admin) as t:
            s = t.shows("SEQUENCES 300 of 300")
            first = table(s)
            t.keys("G")
            until("the end of the list", lambda: table(t.screen()) != first, 5)
            t.keys("g")
            until("its begin", lambda: table(t.screen()) == first, 5)


def main():
    tap = Tap()
    with World() as d:
        for name, fn in (("what stands at 80x24, 200x50 and after resizes", stands_there),
                         ("sorted, turned round, filtered, helped", order_and_filter),
                         ("pin, demote and drop after y, nothing after n or Esc", steer),
                         ("--once, as text and as JSON", once),
                         ("no terminal, or a dumb one: one line", no_terminal),
                         ("a tenant's socket shows the tenant's share", tenants_socket),
                         ("names with control sequences", hostile_names),
                         ("300 sequences, page by page", many),
                         ("signals leave the terminal as it was", interrupted),
                         ("the daemon goes and comes back", comes_back)):
            tap.case(name, fn, d)
    tap.done()


if __name__ == "__main__":
    main()
