# SPDX-License-Identifier: MIT
"""A client made of nothing but a socket: every byte of ipc/wire.h and shm/ctl.h is the caller's to get wrong."""
import mmap
import os
import socket
import struct

MAGIC, VERSION, REPLY = 0x3154564B, 2, 0x8000
(HELLO, MODEL, REGION, REGION_CLOSE, SEQ_OPEN, SEQ_TRUNCATE, SEQ_CLOSE, SEQ_INFO, PLAN_REQUEST, FETCH,
 REGION_IMPORT) = range(1, 12)
ADMIN = 32
OPEN, RESUME, FORK = range(3)
Q_DIRTY = 1
ALL = 0xFFFFFFFF
U64 = (1 << 64) - 1

HDR = struct.Struct("<IHHII")
STATUS = struct.Struct("<iI200s")
BUDGET = struct.Struct("<10I32s")
LAYOUT = struct.Struct("<6Q4I")
LAYER = struct.Struct("<6I")
RING_HEAD, RING_TAIL, RING_WAKE, RING_ENTRY, ENTRY = 0, 128, 256, 384, 64
SLOT = 192
assert BUDGET.size == 72 and LAYOUT.size == ENTRY and HDR.size == 16


class HungUp(Exception):
    """The daemon closed the connection."""


class Refused(Exception):
    """A reply with an error status."""

    def __init__(self, status, text):
        self.status, self.text = status, text
        super().__init__(f"{status}: {text}")


def header(kind, length, cookie=7, magic=MAGIC, version=VERSION):
    return HDR.pack(magic, version, kind, length & 0xFFFFFFFF, cookie)


def message(kind, body, **kw):
    return header(kind, kw.pop("length", HDR.size + len(body)), **kw) + body


def hello(name=b"raw", features=0, max_seqs=8, entries=64, plan_bytes=1 << 20):
    return struct.pack("<4IQ64s", features, max_seqs, entries, os.getpid(), plan_bytes, name)


def model(name=b"raw", n_layers=2, dtype=0, head_dim=0, rope=0, post_rope=0, rank=0, world=1, first_head=0,
          theta=0.0, pad=0, layers=None):
    layers = [(0, 2, 64, 64, 0, 0)] * 2 if layers is None else layers
    return (struct.pack("<64s8IfI", name, n_layers, dtype, head_dim, rope, post_rope, rank, world, first_head, theta,
                        pad) + b"".join(LAYER.pack(*v) for v in layers))


def budget(kind=0, device=64, dram=64, nvme=ALL, slack=0, manual=1, table_n=0, given=1, policy=b"", through=0, pad=0):
    return BUDGET.pack(kind, device, dram, nvme, slack, manual, table_n, given, through, pad, policy)


def layout(k_off=0, v_off=None, head=None, row=64, cap=256, stage=64, score=0, score_head=0, v_head=None, v_row=None):
    """Two heads of 64-byte rows: K plane, then V plane."""
    head = (cap + stage) * row if head is None else head
    v_off = k_off + 2 * head if v_off is None else v_off
    return LAYOUT.pack(k_off & U64, v_off & U64, head & U64, (head if v_head is None else v_head) & U64, score & U64,
                       score_head & U64, row, row if v_row is None else v_row, cap, stage)


def plain(cap=256, stage=64):
    size = 4 * (cap + stage) * 64
    return [layout(0, cap=cap, stage=stage), layout(size, cap=cap, stage=stage)]


def seq_open(op=OPEN, lifetime=0, ttl=60, max_rows=1024, granularity=0, equal=0, n_layers=None, prefix=0, model=1,
             region=0, parent=0, key=None, secret=b"s" * 32, b=None, layouts=None, table=(), flags=0, pad=0,
             window=(0, 0, 0, 0), scorer=0):
    layouts = plain() if layouts is None else layouts
    return (struct.pack("<10I8Q16s32s", op, lifetime, ttl, max_rows, granularity, equal,
                        len(layouts) if n_layers is None else n_layers, prefix, flags, pad, *window, scorer, model,
                        region, parent,
                        os.urandom(16) if key is None else key, secret) +
            (budget() if b is None else b) + b"".join(layouts) + struct.pack(f"<{len(table)}I", *table))


class Raw:
    def __init__(self, path, timeout=5):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(timeout)
        self.sock.connect(str(path))
        self.fds, self.ctl, self.tail = [], None, 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        self.sock.close()

    # ---- messages

    def send(self, packet, fds=()):
        try:
            if fds:
                socket.send_fds(self.sock, [packet], list(fds))
            else:
                self.sock.send(packet)
        except (BrokenPipeError, ConnectionResetError):
            raise HungUp from None

    def recv(self):
        """(type, status, text, rest of the payload, fds)."""
        try:
            packet, fds, _, _ = socket.recv_fds(self.sock, 65536, 8)
        except ConnectionResetError:
            raise HungUp from None
        if not packet:
            raise HungUp
        self.fds += fds
        status, _, text = STATUS.unpack_from(packet, HDR.size)
        return (HDR.unpack_from(packet)[2], status, text.rstrip(b"\0").decode(), packet[HDR.size + STATUS.size:], fds)

    def ask(self, kind, body, fds=(), **kw):
        """Send a message, return (payload, fds) of the reply; Refused or HungUp."""
        self.send(message(kind, body, **kw), fds)
        _, status, text, payload, got = self.recv()
        if status:
            raise Refused(status, text)
        return payload, got

    def gone(self):
        """True when the daemon hangs up within the timeout; replies on the way are skipped."""
        try:
            while True:
                self.recv()
        except HungUp:
            return True
        except TimeoutError:
            return False

    def well(self):
        """Still served."""
        try:
            self.ask(REGION, struct.pack("<Q", 4096))
            return True
        except (HungUp, TimeoutError):
            return False

    # ---- the usual beginning

    def hello(self, **kw):
        payload, fds = self.ask(HELLO, hello(**kw))
        _, _, self.max_seqs, self.entries, ctl_bytes, self.plan_bytes = struct.unpack_from("<4I2Q", payload)
        self.ctl_fd, self.plan_fd, self.wake_fd, self.notify_fd = fds
        self.ctl = mmap.mmap(self.ctl_fd, ctl_bytes)
        # one store each: struct.pack_into() would clear the word first
        self.words32, self.words64 = memoryview(self.ctl).cast("I"), memoryview(self.ctl).cast("Q")
        self.cq = RING_ENTRY + self.entries * ENTRY
        self.slots = 2 * self.cq
        return self

    def model(self, **kw):
        return struct.unpack_from("<QI", self.ask(MODEL, model(**kw))[0])

    def region(self, nbytes=1 << 20):
        payload, fds = self.ask(REGION, struct.pack("<Q", nbytes))
        handle, size = struct.unpack("<2Q", payload)
        return handle, fds[0], mmap.mmap(fds[0], size)

    def seq(self, **kw):
        """Sets self.s (handle) and self.slot; returns (handle, plan_off, plan_bytes, slot, epoch, rows)."""
        v = struct.unpack_from("<3Q3I", self.ask(SEQ_OPEN, seq_open(**kw))[0])
        self.s, self.slot = v[0], self.slots + v[3] * SLOT
        return v

    def ready(self, **kw):
        """hello, model, region, sequence."""
        self.hello()
        self.model()
        self.region_handle, self.region_fd, self.mem = self.region()
        self.seq(region=self.region_handle, **kw)
        return self

    def request(self, seq=None, **kw):
        return struct.unpack("<Q", self.ask(PLAN_REQUEST, struct.pack("<Q", seq or self.s) + budget(**kw))[0])[0]

    # ---- the control segment

    def put32(self, off, v):
        self.words32[off // 4] = v & 0xFFFFFFFF

    def put64(self, off, v):
        self.words64[off // 8] = v & U64

    def len_word(self, epoch, rows):
        self.put64(self.slot, epoch << 32 | rows)

    def push(self, kind=Q_DIRTY, handle=None, raw=None):
        at = RING_ENTRY + (self.tail % self.entries) * ENTRY
        e = raw or struct.pack("<IIQ48x", kind, 0, self.s if handle is None else handle)
        self.ctl[at:at + ENTRY] = e
        self.tail = self.tail + 1 & 0xFFFFFFFF
        self.put32(RING_TAIL, self.tail)
        self.kick()

    def kick(self):
        os.write(self.wake_fd, struct.pack("<Q", 1))
