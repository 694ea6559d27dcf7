# SPDX-License-Identifier: MIT
"""Riders (tests/torture/rider.c): busy clients that compare every byte, as processes, and what they count."""
import mmap
import os
import signal
import struct
import subprocess
from pathlib import Path

from kvtier.daemon import build_dir

from .world import Failed, expect, until

FIELDS = ("compared", "wrong", "lost", "resumed", "gone", "cuts", "forks", "losses", "served_ns", "steps", "began_ns")
HEAD = struct.Struct(f"<{len(FIELDS)}Q")
BYTES = HEAD.size + 8 * (16 + 4 * 1024)  # struct state: counters, eight records


class Rider:
    """One of them. Its state outlives the process: spawn() again and another one goes on from there."""

    def __init__(self, d, ident, seqs=3, *words):
        self.d, self.ident, self.seqs, self.words = d, ident, seqs, words
        self.path = Path(d.run) / f"rider{ident}.state"
        self.path.write_bytes(bytes(BYTES))
        with open(self.path, "r+b") as f:
            self.state = mmap.mmap(f.fileno(), BYTES)
        self.out = open(Path(d.run) / f"rider{ident}.out", "a+", encoding="utf-8")
        self.p = None

    def spawn(self, *words):
        self.p = subprocess.Popen([str(build_dir() / "tests" / "torture" / "rider"), self.d.socket, str(self.path),
                                   str(self.seqs), str(self.ident), *self.words, *words], stdout=self.out,
                                  stderr=self.out, start_new_session=True)
        return self

    def count(self):
        return dict(zip(FIELDS, HEAD.unpack_from(self.state)))

    def said(self):
        self.out.seek(0)
        return self.out.read().splitlines()

    def served(self, losses, seconds=30):
        """Wait until it has taken up its sequences for the `losses`th time; when that was."""
        def there():
            expect(self.p.poll() is None, f"rider {self.ident} ended with {self.p.returncode}: {self.said()[-8:]}")
            return self.count()["losses"] >= losses
        until(lambda: f"rider {self.ident} goes on: {self.count()} {self.said()[-8:]}", there, seconds)
        return self.count()["served_ns"]

    def child(self):
        """The process that it forked last."""
        return int([x for x in self.said() if x.startswith("child ")][-1].split()[1])

    def kill(self):
        """With its children."""
        try:
            os.killpg(self.p.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.p.wait()

    def stop(self, seconds=20):
        """End it well."""
        if self.p.poll() is None:
            self.p.send_signal(signal.SIGTERM)
        try:
            self.p.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failed(f"rider {self.ident} does not end") from None
        self.well()

    def well(self):
        """Nothing was wrong; status 0 when it has ended."""
        c = self.count()
        expect(not c["wrong"] and self.p.poll() in (None, 0, -signal.SIGKILL),
               f"rider {self.ident}: {c['wrong']} wrong of {c['compared']}, exit status {self.p.poll()}: "
               f"{self.said()[:12]}")
        return c

    def close(self):
        if self.p:
            self.kill()
        self.state.close()
        self.out.close()


def added(counts):
    return {f: sum(c[f] for c in counts) for f in FIELDS}


def total(riders):
    return added([r.count() for r in riders])


def percentile(values, p):
    v = sorted(values)
    return v[min(len(v) - 1, int(len(v) * p / 100))] if v else 0.0


def full():
    return os.environ.get("KVT_TORTURE") == "full"
