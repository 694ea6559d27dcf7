# SPDX-License-Identifier: MIT
"""kvtierd-bpf beside a daemon: its process, and what the daemon says of it."""
import os
import subprocess

from kvtier.daemon import build_dir

from .world import Skip, World, expect, until

LOADER = str(build_dir() / "kvtierd-bpf")
GROUPS = {"disk", "uring", "reclaim", "memcg_reclaim", "fault", "sched"}


class Loader:
    def __init__(self, path, *args, **popen):
        self.path = path
        self.p = subprocess.Popen([LOADER, "--socket", path, "--user", str(os.getuid()), *args], stderr=subprocess.PIPE,
                                  text=True, **popen)
        until("the loader's socket", lambda: os.path.exists(path) or self.p.poll() is not None, 10)
        expect(self.p.poll() is None, f"the loader ended: {self.p.stderr.read() if self.p.poll() is not None else ''}")

    def kill(self):
        self.p.kill()
        self.p.wait()
        self.p.stderr.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.kill()


def need():
    if not os.path.exists(LOADER):
        raise Skip("kvtierd-bpf was not built: no clang, bpftool or libbpf, or a sanitizer's build")
    if os.getuid():
        raise Skip("BPF programs are loaded by root")
    p = subprocess.run([LOADER, "--check"], capture_output=True, text=True, check=False)
    if p.returncode:
        raise Skip(f"no BPF here: {(p.stderr or p.stdout).strip().splitlines()[0]}")
    return {line.split()[0] for line in p.stdout.splitlines() if line.split()[1] == "on"}


def probes(d):
    return d.status()["probes"]


def wait_on(d):
    return until(lambda: f"probes on ({probes(d)})", lambda: (lambda p: p["on"] and p)(probes(d)), 5)


def world(path, **sections):
    return World(kvtierd={"bpf_socket": path}, **sections)
