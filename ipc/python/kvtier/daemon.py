# SPDX-License-Identifier: MIT
"""A private kvtierd for demos and tests: own run directory, own NVMe store, gone at the end."""
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from .client import Client


def build_dir():
    env = os.environ.get("KVT_BUILD")
    return Path(env) if env else Path(__file__).resolve().parents[3] / "build"


class PrivateDaemon:
    """Context manager. `store` lies on a real disk (O_DIRECT); sizes are config strings such as "512M"."""

    def __init__(self, dram="1G", nvme="1G", extra="", policy=None, model_dir=None, kvtierd=None, log=None):
        self.run = tempfile.mkdtemp(prefix="kvt.")
        build_dir().mkdir(exist_ok=True)
        self.store = tempfile.mkdtemp(prefix="store.", dir=build_dir())
        self.binary = str(kvtierd or shutil.which("kvtierd") if not (build_dir() / "kvtierd").exists()
                          else build_dir() / "kvtierd")
        models = model_dir or Path(__file__).resolve().parents[3] / "policy" / "models"
        pol = f"default={policy}\n" if policy else ""
        self.config = os.path.join(self.run, "kvtierd.conf")
        Path(self.config).write_text(
            f"[kvtierd]\nrun_dir={self.run}\n[dram]\nsize={dram}\n[nvme]\nenabled=yes\npath={self.store}\nsize={nvme}\n"
            f"[policy]\n{pol}model_dir={models}\n{extra}")
        self.log = log or os.path.join(self.run, "log")
        self.proc = None

    @property
    def socket(self):
        return os.path.join(self.run, "kvtierd.sock")

    @property
    def admin(self):
        return os.path.join(self.run, "admin.sock")

    def start(self, wait_s=60):
        with open(self.log, "ab") as log:
            self.proc = subprocess.Popen([self.binary, "--config", self.config], stdout=log, stderr=log)
        end = time.monotonic() + wait_s
        while True:
            if self.proc.poll() is not None:
                raise RuntimeError(f"kvtierd exited with {self.proc.returncode}: " + Path(self.log).read_text()[-800:])
            try:
                Client(self.socket, timeout_ms=500).close()
                return self
            except Exception:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def stop(self, timeout=20):
        if self.proc and self.proc.poll() is None:
            self.proc.terminate()
            try:
                self.proc.wait(timeout)
            except subprocess.TimeoutExpired:
                self.proc.kill()
                self.proc.wait()

    def kill(self):
        self.proc.kill()
        self.proc.wait()

    __enter__ = start

    def __exit__(self, *exc):
        self.stop()
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.rmtree(self.store, ignore_errors=True)
