# SPDX-License-Identifier: MIT
"""A cgroup of the memory controller with a limit, and a daemon that lives in it."""
import os
import time
from contextlib import contextmanager
from pathlib import Path

from .world import Skip, World

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class Group:
    """A cgroup with a limit, of whichever version has the memory controller here."""

    def __init__(self):
        self.v2 = not V1.is_dir()
        self.path = (V2 if self.v2 else V1) / f"kvt-pressure-{os.getpid()}"
        try:
            if self.v2 and "memory" not in (V2 / "cgroup.subtree_control").read_text():
                raise Skip("the memory controller is not delegated here")
            self.path.mkdir()
        except OSError as e:
            raise Skip(f"no cgroup of our own: {e}") from None

    def put(self, name_v1, name_v2, v):
        (self.path / (name_v2 if self.v2 else name_v1)).write_text(str(v))

    def get(self, name_v1, name_v2):
        return (self.path / (name_v2 if self.v2 else name_v1)).read_text()

    def used(self):
        return int(self.get("memory.usage_in_bytes", "memory.current"))

    def killed(self):
        text = self.get("memory.oom_control", "memory.events")
        return int(next(x.split()[1] for x in text.splitlines() if x.startswith("oom_kill ")))

    def limit(self, v):
        self.put("memory.limit_in_bytes", "memory.max", v)

    def add(self, pid):
        (self.path / "cgroup.procs").write_text(str(pid))

    @contextmanager
    def inside(self):
        """What is started here begins in the group."""
        key = "0::" if self.v2 else ":memory:"
        line = next(x for x in Path("/proc/self/cgroup").read_text().splitlines() if key in x)
        home = (V2 if self.v2 else V1) / line.split(":", 2)[2].lstrip("/") / "cgroup.procs"
        self.add(os.getpid())
        try:
            yield
        finally:
            home.write_text(str(os.getpid()))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                return self.path.rmdir()
            except OSError:
                time.sleep(0.05)


class Within(World):
    """A daemon that begins in the group."""

    def __init__(self, group, sections):
        super().__init__(**sections)
        self.group = group

    def __enter__(self):
        with self.group.inside():
            return super().__enter__()
