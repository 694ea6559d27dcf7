# SPDX-License-Identifier: MIT
"""What every integration test needs: TAP on stdout, a private daemon with its own configuration, its log."""
import json
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

from kvtier.daemon import PrivateDaemon, build_dir

(E_INVAL, E_NOMEM, E_DAEMON, E_TIMEOUT, E_VERSION, E_STALE, E_LIMIT, E_EXISTS, E_NOENT, E_NOSPC, E_PERM, E_PROTO,
 E_MODEL, E_FORKED, E_IO, E_CORRUPT, E_BUSY, E_INTERNAL) = range(-2001, -2019, -1)


SEED = int(os.environ.get("KVT_SEED", "11"))  # of everything that is random in these tests


class Skip(Exception):
    """This host cannot run the case; the text says why."""


class Failed(AssertionError):
    """A property does not hold."""


def expect(cond, text):
    if not cond:
        raise Failed(text)


def equal(got, want, what):
    if got != want:
        raise Failed(f"{what}: {got!r}, must be {want!r}")


def matches(text, pattern, what):
    if not re.search(pattern, text):
        raise Failed(f"{what}: {text!r}, must match {pattern!r}")


def until(what, fn, seconds):
    """Poll fn() until it is true; returns its value. Fails after `seconds` with the last value of what()."""
    end = time.monotonic() + seconds
    while True:
        v = fn()
        if v:
            return v
        if time.monotonic() > end:
            raise Failed(f"{what() if callable(what) else what}: not within {seconds} s")
        time.sleep(0.01)


class Tap:
    """Results one by one, the plan at the end; main() is the exit status."""

    def __init__(self):
        self.n = self.bad = 0

    def case(self, name, fn, *args):
        self.n += 1
        try:
            fn(*args)
            print(f"ok {self.n} - {name}", flush=True)
            return True
        except Skip as e:
            print(f"ok {self.n} - {name} # SKIP {e}", flush=True)
            return True
        except Exception as e:  # noqa: BLE001: whatever it is, the next case runs
            self.bad += 1
            print(f"not ok {self.n} - {name}", flush=True)
            lines = [str(e)] if isinstance(e, Failed) else []
            lines += traceback.format_exc().splitlines()[-8:]
            for line in lines:
                print(f"#   {line}", flush=True)
            return False

    def done(self):
        print(f"1..{self.n}", flush=True)
        sys.exit(1 if self.bad else 0)


def config_text(run, store, sections):
    """Small and quick by default; sections = {"dram": {"size": "8M"}, ...} override."""
    base = {
        "kvtierd": {"run_dir": run, "workers": 2},
        "dram": {"size": "64M", "segment": "4M", "huge_pages": "no"},
        "nvme": {"enabled": "yes", "path": store, "size": "64M", "segment": "1M", "staging": "4M",
                 "io_uring": "no" if os.environ.get("KVT_IO") == "threads" else "yes"},
        "policy": {"default": "random", "fallback": "streaming", "model_dir": os.path.join(run, "models")},
        "tenant default": {},
    }
    for name, keys in sections.items():
        base.setdefault(name, {}).update(keys)
    return "".join(f"[{s}]\n" + "".join(f"{k}={v}\n" for k, v in keys.items()) for s, keys in base.items())


class World(PrivateDaemon):
    """A private daemon; `with World(nvme={"size": "16M"}) as d:`. Prints its log when a sanitizer spoke."""

    def __init__(self, store=None, **sections):
        super().__init__()
        self.own_store = self.store
        if store:
            self.store = str(store)
        self.models = Path(self.run) / "models"
        self.models.mkdir()
        self.configure(**sections)

    def configure(self, **sections):
        sections = {k.replace("_", " "): v for k, v in sections.items()}
        Path(self.config).write_text(config_text(self.run, self.store, sections))

    def __exit__(self, *exc):
        if self.proc and self.proc.poll() is None:
            os.kill(self.proc.pid, 18)  # SIGCONT: a case may have failed between stop and continue
        if exc[0] is not None or os.environ.get("KVT_SHOW_LOG"):
            for line in self.log_lines()[-60:]:
                print(f"# log: {line}")
        self.stop()
        bad = [x for x in self.log_lines() if "Sanitizer" in x or "runtime error:" in x]
        self.store = self.own_store
        super().__exit__(*exc)
        if bad:
            raise Failed(f"the daemon's log: {bad}")

    # ---- looking at it

    @property
    def pid(self):
        return self.proc.pid

    def alive(self):
        return self.proc is not None and self.proc.poll() is None

    def dram_held(self):
        """Bytes that the kernel holds for the segments of its DRAM tier."""
        n = 0
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                if "memfd:kvtier-dram" in os.readlink(f"/proc/{self.pid}/fd/{fd}"):
                    n += os.stat(f"/proc/{self.pid}/fd/{fd}").st_blocks * 512
            except FileNotFoundError:
                pass
        return n

    def fds(self):
        """Descriptors the daemon holds, but for the segments of its DRAM tier: an empty one may stay warm."""
        n = 0
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                n += "memfd:kvtier-dram" not in os.readlink(f"/proc/{self.pid}/fd/{fd}")
            except FileNotFoundError:
                pass
        return n

    def log_lines(self):
        return Path(self.log).read_text(errors="replace").splitlines() if os.path.exists(self.log) else []

    def ctl(self, *argv, socket=None, timeout=20):
        """kvtierctl --json: the answer, or Failed with its line."""
        p = subprocess.run([str(build_dir() / "kvtierctl"), "--json", "--socket", str(socket or self.admin), *argv],
                           capture_output=True, text=True, timeout=timeout, check=False)
        if p.returncode:
            raise Failed(f"kvtierctl {' '.join(argv)}: exit {p.returncode}: {p.stderr.strip()}")
        return json.loads(p.stdout)

    def status(self):
        return self.ctl("status")

    def tier(self, name):
        return next(t for t in self.status()["tiers"] if t["name"] == name)

    def seqs(self):
        return self.ctl("ls")["seqs"]

    def refuses_to_start(self, pattern, codes=(1, 2), seconds=30, **popen):
        """Start it: it must end by itself with one line of error that matches. Returns the line."""
        with open(self.log, "wb") as log:
            p = subprocess.Popen([self.binary, "--config", self.config], stdout=log, stderr=log, **popen)
        try:
            rc = p.wait(seconds)
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()
            raise Failed(f"kvtierd runs, must refuse: {pattern}") from None
        lines = self.log_lines()
        expect(rc in codes, f"exit status {rc}, must be one of {codes}; log: {lines}")
        equal(len(lines), 1, f"lines of the log ({lines})")
        matches(lines[0], pattern, "the line")
        return lines[0]
