#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A client that lies in every way it can, beside one that must not notice.

After every attack the daemon is the same process and serves; the attacker was at most hung up on, with
one line that names the reason; and a neighbour working all the while has every byte of its rows right.
"""
import os

from lib import chaos, memory, raw
from lib.attacks import MALFORMED, REFUSED, REGION_BODY, Q, QII, bad_layouts, handles_of
from lib.raw import ALL, FETCH, HELLO, PLAN_REQUEST, REGION, REGION_CLOSE, SEQ_CLOSE, SEQ_INFO, SEQ_OPEN, SEQ_TRUNCATE
from lib.raw import HungUp, Raw, Refused, message
from lib.rows import Neighbour
from lib.world import E_INVAL, E_LIMIT, E_STALE, E_VERSION, Tap, World, equal, expect, matches, until


class Arena:
    """A daemon, a neighbour, and attacks on them."""

    def __init__(self, d, tap):
        self.d, self.tap, self.pid = d, tap, d.pid
        self.near = Neighbour(d.socket)

    def attack(self, name, fn, ended=None, well=True):
        """fn(client) attacks. ended: the reason that the log must give; None: it must still be served."""
        self.tap.case(name, self._attack, fn, ended, well)

    def _attack(self, fn, ended, well):
        before = len(self.d.log_lines())
        with Raw(self.d.socket) as r:
            try:
                fn(r)
            except HungUp:
                expect(ended, f"hung up on: {self.d.log_lines()[before:]}")
            if ended:
                expect(r.gone(), "still connected")
            elif well:
                expect(r.well(), "not served any more")
        lines = [line for line in self.d.log_lines()[before:] if " ended: " in line]
        equal(len(lines), 1 if ended else 0, f"lines about the end of a client ({lines})")
        if ended:
            matches(lines[0], ended, "the line")
        expect(self.d.alive() and self.d.pid == self.pid, "the daemon died")
        self.near.well()


# ---- messages ----------------------------------------------------------------------


def malformed(a):
    def send(packet, n):
        def fn(r):
            r.hello()
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(n or 0)]
            try:
                r.send(packet, fds)
            finally:
                for fd in fds:
                    os.close(fd)
        return fn

    for name, packet, n, line in MALFORMED:
        a.attack(name, send(packet, n), ended=line)
    a.attack("an empty packet", lambda r: (r.hello(), r.send(b"")), well=False)
    a.attack("a request before hello", lambda r: r.send(message(REGION, REGION_BODY)), ended=r"region before hello")
    a.attack("a short packet before hello", lambda r: r.send(b"x"), ended=r"message: 1 bytes")
    a.attack("a silent client", lambda r: r.hello())


def versions(a):
    def other(r):
        for v in (0, 1, 65535):
            try:
                r.ask(HELLO, raw.hello(), version=v)
                raise AssertionError("another version was accepted")
            except Refused as e:
                equal(e.status, E_VERSION, "status")
                equal(e.text, f"version: {v}, must be 2", "text")
        r.hello()

    def hello_values(r):
        for kw, pattern in (({"max_seqs": 0}, "max_seqs: 0"), ({"max_seqs": ALL}, "max_seqs"),
                            ({"entries": 63}, "ring_entries: 63"), ({"entries": 96}, "power of two"),
                            ({"entries": 1 << 31}, "ring_entries"), ({"plan_bytes": 0}, "plan_bytes: 0"),
                            ({"plan_bytes": 1 << 60}, "plan_bytes")):
            try:
                r.ask(HELLO, raw.hello(**kw))
                raise AssertionError(f"{kw} was accepted")
            except Refused as e:
                equal(e.status, E_INVAL, f"status for {kw}")
                matches(e.text, pattern, "text")
        r.hello()

    a.attack("other protocol versions: one clear line", other)
    a.attack("hello with impossible sizes", hello_values)


def refusal(r, kind, body, status, pattern):
    try:
        r.ask(kind, body)
    except Refused as e:
        equal(e.status, status, f"status ({e.text})")
        matches(e.text, pattern, "text")
        expect("\n" not in e.text and e.text, "one line")
        return
    raise AssertionError("accepted")


def refused(a):
    for name, kind, body, status, pattern in REFUSED:
        a.attack(name, lambda r, k=kind, b=body, s=status, p=pattern: refusal(r.ready(), k, b(r), s, p))
    for name, layouts, pattern in bad_layouts():
        a.attack(f"a layout: {name}", lambda r, v=layouts, p=pattern: refusal(
            r.ready(), SEQ_OPEN, raw.seq_open(region=r.region_handle, layouts=v), E_INVAL, p))


# ---- handles of others ----------------------------------------------------------------


def handles(a):
    def others(r):
        r.ready()
        stolen = handles_of(a.d, "neighbour")
        expect(stolen, "the neighbour's sequence is not in ls")
        for h in stolen:
            for kind, body in ((SEQ_INFO, Q.pack(h)), (SEQ_TRUNCATE, QII.pack(h, 0, 0)), (SEQ_CLOSE, QII.pack(h, 1, 0)),
                               (PLAN_REQUEST, Q.pack(h) + raw.budget(device=0)), (FETCH, QII.pack(h, 0, 1)),
                               (SEQ_OPEN, raw.seq_open(op=2, parent=h, region=r.region_handle))):
                refusal(r, kind, body, E_STALE, r"is gone")

    def guess_regions(r):
        r.ready()
        for index in range(64):
            for generation in range(1, 5):
                h = generation << 32 | index
                if h != r.region_handle:
                    refusal(r, REGION_CLOSE, Q.pack(h), E_STALE, r"is no region")
                    refusal(r, SEQ_OPEN, raw.seq_open(region=h), E_STALE, r"^region: ")

    def closed(r):
        r.ready()
        old = r.s
        r.ask(SEQ_CLOSE, QII.pack(old, 0, 0))
        for kind, body in ((SEQ_INFO, Q.pack(old)), (SEQ_CLOSE, QII.pack(old, 0, 0)), (FETCH, QII.pack(old, 0, 1))):
            refusal(r, kind, body, E_STALE, r"is gone")
        r.push(handle=old)
        r.ask(REGION_CLOSE, Q.pack(r.region_handle))
        refusal(r, REGION_CLOSE, Q.pack(r.region_handle), E_STALE, r"is no region")

    def hoards(r):
        r.ready()
        for n in range(1, 100):
            try:
                r.ask(REGION, REGION_BODY)
            except Refused as e:
                equal((n, e.status), (32, E_LIMIT), f"the first region that is one too many ({e.text})")
                matches(e.text, r"regions: this client has 32, limit 2 x max_seqs \+ 16", "text")
                r.ask(REGION_CLOSE, Q.pack(r.region_handle))
                return
        raise AssertionError("a hundred regions")

    a.attack("regions without end: descriptors are everybody's", hoards)
    a.attack("a neighbour's sequence in every message", others)
    a.attack("regions guessed by number", guess_regions)
    a.attack("its own closed sequence and region", closed)
    a.attack("a neighbour's sequence in the ring", lambda r: r.ready().push(handle=handles_of(a.d, "neighbour")[0]),
             ended=r"submit ring: handle [0-9a-f]{16} is not its own")
    a.attack("handle 0 in the ring", lambda r: r.ready().push(handle=0), ended=r"is not its own")
    a.attack("handle 2^64-1 in the ring", lambda r: r.ready().push(handle=raw.U64), ended=r"is not its own")


def leaks(a, fds):
    until(lambda: f"{a.d.fds()} descriptors, {fds} before the attacks", lambda: a.d.fds() <= fds, 5)
    until(lambda: f"{a.d.status()['sequences']} sequences", lambda: a.d.status()["sequences"] == 1, 5)
    s = a.d.status()
    equal(s["clients"], 1, "clients")
    equal(s["misses"]["corrupt"], 0, "corrupt pages")


def main():
    tap = Tap()
    with World(tenant_default={"max_clients_per_uid": 256}) as d:
        a = Arena(d, tap)
        a.near.well()
        fds = d.fds()
        for part in (malformed, versions, refused, handles, memory.rings, memory.slots, memory.scribble,
                     memory.published):
            part(a)
        tap.case("correct requests in any order, by clients that come and go", chaos.any_order, d)
        tap.case("nothing is left of any of them", leaks, a, fds)
        tap.case("the neighbour's rows to the end", a.near.stop)
    tap.done()


if __name__ == "__main__":
    main()
