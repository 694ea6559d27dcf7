# SPDX-License-Identifier: MIT
"""A service manager as kvtierd sees systemd: listening sockets and an fd store that outlive the process."""
import array
import fcntl
import os
import select
import socket
import subprocess
import threading
import time

from .world import Failed, World

PASS = r'n=3; for f in $KVT_FDS; do eval "exec $n<&$f $f<&-"; n=$((n+1)); done; unset KVT_FDS; ' \
       r'export LISTEN_PID=$$; exec "$@"'
HIGH = 300  # descriptors to be passed are moved up here, out of the way of their final numbers


class Managed(World):
    """A World whose daemon is started as systemd starts it. `limit` is FileDescriptorStoreMax=."""

    def __init__(self, limit=4096, **kw):
        super().__init__(**kw)
        self.limit, self.store_fds, self.said = limit, [], []
        self.ready = threading.Event()
        self.stop_pipe = os.pipe()
        self.listening = {}
        for name, path in (("admin", self.admin), ("default", self.socket)):
            s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            s.bind(path)
            s.listen(64)
            self.listening[name] = s
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(os.path.join(self.run, "notify"))
        self.lock = threading.Lock()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    # ---- what the daemon says

    def read(self):
        while True:
            for fd in select.select([self.notify, self.stop_pipe[0]], [], [])[0]:
                if fd == self.stop_pipe[0]:
                    return
            data, anc, _, _ = self.notify.recvmsg(4096, socket.CMSG_SPACE(16 * 4))
            fds = array.array("i")
            for level, kind, payload in anc:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(payload[:len(payload) - len(payload) % 4])
            lines = dict(x.split("=", 1) for x in data.decode().splitlines() if "=" in x)
            with self.lock:
                self.heard(lines, list(fds))

    def heard(self, lines, fds):
        self.said.append(lines)
        name = lines.get("FDNAME", "stored")
        for fd in fds:
            if lines.get("FDSTORE") == "1" and len(self.store_fds) < self.limit:
                self.store_fds.append((name, fd))
            else:
                os.close(fd)
        if lines.get("FDSTOREREMOVE") == "1":
            for n, fd in self.store_fds:
                if n == name:
                    os.close(fd)
            self.store_fds = [(n, fd) for n, fd in self.store_fds if n != name]
        if lines.get("READY") == "1":
            self.ready.set()

    def settled(self):
        """Everything that the daemon sent before now was read."""
        while select.select([self.notify], [], [], 0)[0]:
            time.sleep(0.001)
        with self.lock:
            return list(self.store_fds)

    # ---- its life

    def start(self, wait_s=60, binary=None, env=None):
        kept = self.settled()
        passed = [(n, s.fileno()) for n, s in self.listening.items()] + kept
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, HIGH) for _, fd in passed]
        self.ready.clear()
        e = {**os.environ, "NOTIFY_SOCKET": self.notify.getsockname(), "KVT_FDS": " ".join(map(str, high)),
             "LISTEN_FDS": str(len(high)), "LISTEN_FDNAMES": ":".join(n for n, _ in passed), **(env or {})}
        try:
            with open(self.log, "ab") as log:
                self.proc = subprocess.Popen(["/bin/bash", "-c", PASS, "kvtierd", binary or self.binary, "--config",
                                              self.config], stdout=log, stderr=log, pass_fds=high, env=e)
        finally:
            for fd in high:
                os.close(fd)
        if not self.ready.wait(wait_s):
            raise Failed(f"the daemon is not ready after {wait_s} s (exit status {self.proc.poll()}): "
                         f"{self.log_lines()[-5:]}")
        return self

    def forget(self):
        """What a stop for good does: the store is emptied."""
        for _, fd in self.settled():
            os.close(fd)
        self.store_fds = []

    def term(self, timeout=40):
        self.proc.terminate()
        if self.proc.wait(timeout):
            raise Failed(f"exit status {self.proc.returncode} after SIGTERM: {self.log_lines()[-5:]}")

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc):
        try:
            super().__exit__(*exc)
        finally:
            os.write(self.stop_pipe[1], b"x")
            self.reader.join(5)
            for _, fd in self.store_fds:
                os.close(fd)
            for s in (*self.listening.values(), self.notify):
                s.close()
            for fd in self.stop_pipe:
                os.close(fd)
