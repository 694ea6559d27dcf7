# SPDX-License-Identifier: MIT
"""Writing .kvtr traces (shm/trace.h) from Python, by build/libkvtier-lab.so.

    header = kvtr.header(model="m", source="book.txt", domain="prose", layers=30, heads=3, group=3, k_dim=64,
                         v_dim=64, dtype="float16", rows=T, rope="half", rope_theta=1e5, keys="cached", split="train")
    with kvtr.Writer(path, header, [kvtr.Cut(prompt=900, queries=128)]) as w:
        w.tokens(ids)
        w.lanes(kvtr.K, k)                # every lane at once: [lanes, T, k_dim]
        w.lanes(kvtr.UMAX, u, cut=0)      # [lanes, P] float32

Tensors (numpy or torch on the CPU; any leading shape, of the header's dtype) or (address, bytes) pairs are
taken. The file appears under its name when the block ends without an exception, and not otherwise. One writer
belongs to one thread; several threads write several files in parallel, for the calls let the interpreter go.
"""
import ctypes as c
import os
from pathlib import Path

CUTS, TOKENS, K, V, Q, UMAX, UMEAN, VNORM, GRAM = range(1, 10)
DTYPE = {"float32": 1, "float16": 2, "bfloat16": 3}
ROPE = {None: 0, "none": 0, "half": 1, "interleaved": 2, "pairs": 2}
KEYS = {"cached": 0, "unrotated": 1}
SPLIT = {"train": 0, "valid": 1, "test": 2, "calib": 3}
BEFORE, BRANCH = 1, 2


class Header(c.Structure):
    """struct trace_header; magic, sizes, table and checksum are the writer's."""

    _fields_ = [("magic", c.c_char * 8), ("version", c.c_uint32), ("header_size", c.c_uint32),
                ("file_size", c.c_uint64), ("table_off", c.c_uint64), ("chunks", c.c_uint32), ("crc", c.c_uint32),
                ("model", c.c_char * 64), ("source", c.c_char * 96), ("domain", c.c_char * 24), ("task", c.c_char * 24),
                ("layers", c.c_uint32), ("heads", c.c_uint32), ("group", c.c_uint32), ("k_dim", c.c_uint32),
                ("v_dim", c.c_uint32), ("dtype", c.c_uint32), ("rope_type", c.c_uint32), ("rope_theta", c.c_float),
                ("keys", c.c_uint32), ("rows", c.c_uint32), ("cuts", c.c_uint32), ("split", c.c_uint32),
                ("seed", c.c_uint64), ("reserved", c.c_uint8 * 208)]


class Cut(c.Structure):
    """struct trace_cut: rows [0, prompt) are ranked by `queries` future queries."""

    _fields_ = [("prompt", c.c_uint32), ("queries", c.c_uint32), ("context", c.c_uint32), ("flags", c.c_uint32)]


assert c.sizeof(Header) == 512 and c.sizeof(Cut) == 16


class TraceError(OSError):
    """A trace that could not be written, with the writer's line."""


def _text(value, size):
    """UTF-8 that fits, cut between characters."""
    return value.encode()[: size - 1].decode(errors="ignore").encode()


def header(*, model, layers, heads, group, k_dim, rows, v_dim=None, source="", domain="", task="", dtype="float16",
           rope="half", rope_theta=10000.0, keys="cached", split="train", seed=0):
    """A Header; names are those of kvtier (float16, half, cached, train)."""
    return Header(model=_text(model, 64), source=_text(source, 96), domain=_text(domain, 24), task=_text(task, 24),
                  layers=layers, heads=heads, group=group, k_dim=k_dim, v_dim=k_dim if v_dim is None else v_dim,
                  dtype=DTYPE[dtype], rope_type=ROPE[rope], rope_theta=rope_theta, keys=KEYS[keys], rows=rows,
                  split=SPLIT[split], seed=seed)


_P, _U32, _U64 = c.c_void_p, c.c_uint32, c.c_uint64
_PROTOTYPES = {
    "error": (c.c_char_p, []),
    "open": (_P, [c.c_char_p, _P, _P, _U32]),
    "chunk": (c.c_int, [_P, _U32, _U32, _U32, _P, _U64]),
    "lanes": (c.c_int, [_P, _U32, _U32, _U32, _U32, _P, _U64, _U64]),
    "size": (_U64, [_P]),
    "finish": (c.c_int, [_P, c.c_int]),
    "abort": (None, [_P]),
}
_so = None


def library():
    """$KVTIER_LAB, or libkvtier-lab.so of $KVT_BUILD, or of the build folder of this tree."""
    global _so
    if _so is None:
        build = os.environ.get("KVT_BUILD") or Path(__file__).resolve().parents[2] / "build"
        so = c.CDLL(os.environ.get("KVTIER_LAB") or str(Path(build) / "libkvtier-lab.so"))
        for name, (res, args) in _PROTOTYPES.items():
            f = getattr(so, "lab_trace_" + name)
            f.restype, f.argtypes = res, args
        _so = so
    return _so


def _memory(data):
    """(address, bytes, keep-alive) of a contiguous numpy array, torch tensor on the CPU, or (address, bytes)."""
    if isinstance(data, tuple):
        return (*data, None)
    if hasattr(data, "data_ptr"):
        if data.device.type != "cpu":
            raise ValueError(f"device: {data.device}, a chunk must be in host memory")
        data = data.contiguous()
        return data.data_ptr(), data.numel() * data.element_size(), data
    import numpy
    data = numpy.ascontiguousarray(data)
    return data.ctypes.data, data.nbytes, data


class Writer:
    """One trace file; its chunks in any order, none twice."""

    def __init__(self, path, head, cuts=(), sync=False):
        self.path, self.sync = os.fspath(path), sync
        self.header = Header.from_buffer_copy(head)
        self.header.cuts = len(cuts)
        table = (Cut * len(cuts))(*cuts)
        self._so = library()
        self._w = self._so.lab_trace_open(os.fsencode(self.path), c.byref(self.header), table, len(cuts))
        if not self._w:
            raise TraceError(self._so.lab_trace_error().decode(errors="replace"))

    @property
    def _open(self):
        if not self._w:
            raise ValueError(f"{self.path}: the writer is finished")
        return self._w

    def _check(self, rc):
        if rc < 0:
            raise TraceError(-rc, f"{self.path}: {self._so.lab_trace_error().decode(errors='replace')}")

    def chunk(self, kind, data, lane=0, cut=0):
        """One chunk: all of `data`."""
        at, nbytes, keep = _memory(data)
        self._check(self._so.lab_trace_chunk(self._open, kind, lane, cut, at, nbytes))
        del keep

    def lanes(self, kind, data, cut=0, first=0, n=None):
        """One chunk for each of n lanes from `first` on (n: all that are left), equal parts of `data` in order."""
        n = self.header.layers * self.header.heads - first if n is None else n
        at, nbytes, keep = _memory(data)
        if n <= 0 or nbytes % n:
            raise ValueError(f"data: {nbytes} bytes, must be {n} equal lanes")
        self._check(self._so.lab_trace_lanes(self._open, kind, first, n, cut, at, nbytes // n, nbytes // n))
        del keep

    def tokens(self, ids):
        """The token of each row."""
        import numpy
        self.chunk(TOKENS, numpy.asarray(ids, dtype=numpy.uint32))

    @property
    def size(self):
        """Bytes of the file so far."""
        return self._so.lab_trace_size(self._open)

    def finish(self):
        """Complete the file and give it its name."""
        w, self._w = self._open, None
        self._check(self._so.lab_trace_finish(w, int(self.sync)))

    def abort(self):
        """Leave nothing behind."""
        w, self._w = getattr(self, "_w", None), None
        if w:
            self._so.lab_trace_abort(w)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, tb):
        if kind is None and self._w:
            self.finish()
        else:
            self.abort()

    __del__ = abort
