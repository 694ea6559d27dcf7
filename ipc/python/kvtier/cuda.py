# SPDX-License-Identifier: MIT
"""libkvtier's CUDA side as objects: Gpu, Window, Scorer, CudaSequence, Pool. Names and meaning are those of
ipc/kvtier_cuda.h; neither torch nor CUDA is needed to import it. Streams are handles as integers, 0 the default one."""
import ctypes as c
import functools
import weakref

from . import _lib
from ._lib import DTYPE, ROWS_ALL, check, sized
from .client import Sequence

DIRECT = 1  # KVT_CUDA_DIRECT


class _Opts(c.Structure):
    _fields_ = [("size", c.c_size_t), ("device", c.c_int32), ("kernels", c.c_char_p)]


class _Info(c.Structure):
    _fields_ = [("size", c.c_size_t)] + \
               [(n, c.c_int32) for n in ("device", "major", "minor", "numa_node", "multiprocessors", "driver")] + \
               [("bytes", c.c_uint64), ("free_bytes", c.c_uint64), ("name", c.c_char * 64), ("pci", c.c_char * 16)]


class CudaLayer(c.Structure):
    """Where one layer's rows are: struct kvtier_cuda_layer."""
    _fields_ = [(n, c.c_uint64) for n in ("k", "v", "k_head_stride", "v_head_stride")] + \
               [(n, c.c_uint32) for n in ("k_row_stride", "v_row_stride")]


class _SeqOpts(c.Structure):
    _fields_ = [("size", c.c_size_t), ("window", c.c_void_p), ("scorer", c.c_void_p), ("layers", c.POINTER(CudaLayer)),
                ("cap", c.c_uint32), ("stage", c.c_uint32), ("out_bytes", c.c_uint64), ("in_bytes", c.c_uint64),
                ("flags", c.c_uint32)]


class State(c.Structure):
    _fields_ = [("size", c.c_size_t), ("plan", c.c_uint64)] + \
               [(n, c.c_uint32) for n in ("state", "rows", "pushed", "busy")] + \
               [("bytes_out", c.c_uint64), ("bytes_in", c.c_uint64)]


class RecallOpts(c.Structure):
    _fields_ = [("size", c.c_size_t)] + [(n, c.c_uint32) for n in ("group", "rows", "probe", "flags")] + \
               [("scale", c.c_float), ("before", c.c_uint32), ("after", c.c_uint32)] + \
               [(n, c.c_uint64) for n in ("queries", "token_stride", "head_stride", "k", "v", "k_head_stride",
                                          "v_head_stride")] + \
               [("k_row_stride", c.c_uint32), ("v_row_stride", c.c_uint32), ("counts", c.c_uint64),
                ("positions", c.c_uint64)]


P, U32, U64, INT = c.c_void_p, c.c_uint32, c.c_uint64, c.c_int
_lib.declare({
    "cuda_open": (INT, [c.POINTER(_Opts), c.POINTER(P)]),
    "cuda_close": (None, [P]),
    "cuda_info": (INT, [P, c.POINTER(_Info)]),
    "cuda_window_create": (INT, [P, P, U64, c.POINTER(P)]),
    "cuda_window_close": (None, [P]),
    "cuda_scorer_get": (INT, [P, P, P, c.c_char_p, c.POINTER(P)]),
    "cuda_scorer_put": (None, [P]),
    "cuda_scorer_coefs": (U32, [P]),
    "cuda_scorer_policy": (c.c_char_p, [P]),
    "cuda_scorer_run": (INT, [P, U32, U32, U64, U64, U64, U64, U32, U32, U32, U32, U32, U64, U64, P]),
    "cuda_seq_open": (INT, [P, P, c.POINTER(_lib.SeqOpts), c.POINTER(_SeqOpts), c.POINTER(P)]),
    "cuda_seq_resume": (INT, [P, P, c.POINTER(_lib.SeqOpts), c.POINTER(_SeqOpts), c.POINTER(P), c.POINTER(U32)]),
    "cuda_append": (INT, [P, U32, U32]),
    "cuda_push": (INT, [P, P]),
    "cuda_poll": (INT, [P, P, c.POINTER(State)]),
    "cuda_apply": (INT, [P, U64, c.POINTER(CudaLayer), c.POINTER(U32), P]),
    "cuda_counts": (INT, [P, c.POINTER(U32)]),
    "cuda_map": (INT, [P, c.POINTER(U64), c.POINTER(U32)]),
    "cuda_settle": (INT, [P, INT, U32, P]),
    "cuda_recall_prepare": (INT, [P, P]),
    "cuda_recall": (INT, [P, U32, U32, c.POINTER(RecallOpts), P]),
    "cuda_recall_check": (INT, [P]),
    "cuda_pool_create": (INT, [P, U64, c.POINTER(P)]),
    "cuda_pool_import": (INT, [P, INT, U64, c.POINTER(P)]),
    "cuda_pool_addr": (U64, [P]),
    "cuda_pool_bytes": (U64, [P]),
    "cuda_pool_fd": (INT, [P]),
    "cuda_pool_close": (None, [P]),
})
lib = _lib.lib


class _Handle:
    """Closed in an order that the library can live with, whatever order Python drops the objects in: an object stays
    open while one made with it is."""

    def _made(self, ptr, close, *parents):
        self.ptr = ptr
        self._final = weakref.finalize(self, self._end, close, ptr, parents)

    @staticmethod
    def _end(close, ptr, parents):
        close(ptr)

    def close(self):
        self._final()


class Gpu(_Handle):
    """One GPU of this process, by the driver's ordinal. kernels: the fatbin, None for the library's own."""

    def __init__(self, device=0, kernels=None):
        o = sized(_Opts, device=device, kernels=str(kernels).encode() if kernels else None)
        p = P()
        check(lib.cuda_open(c.byref(o), c.byref(p)), "cuda_open")
        self._made(p, lib.cuda_close)

    def info(self):
        s = sized(_Info)
        check(lib.cuda_info(self.ptr, c.byref(s)), "cuda_info")
        d = {n: getattr(s, n) for n, _ in _Info._fields_[1:]}
        d["name"], d["pci"] = s.name.decode(), s.pci.decode()
        return d


class Window(_Handle):
    """Exchange memory registered with the GPU; rings and score planes of sequences are taken from it."""

    def __init__(self, client, gpu, nbytes):
        p = P()
        check(lib.cuda_window_create(client.ptr, gpu.ptr, nbytes, c.byref(p)), "cuda_window_create")
        self.client, self.gpu, self.nbytes = client, gpu, nbytes
        self._made(p, functools.partial(client.link.close_part, lib.cuda_window_close), gpu)

    @staticmethod
    def needed(model, max_rows, coefs=2, out_bytes=0, in_bytes=0):
        """Bytes that one sequence takes."""
        rings = (out_bytes or 32 << 20) + (in_bytes or 32 << 20)
        return rings + (4 * coefs * model.lanes * max_rows + 4095 & ~4095) + (64 << 10)


class Scorer(_Handle):
    """A policy's network in GPU memory; policy None: the one that new sequences get."""

    def __init__(self, client, gpu, model, policy=None):
        p = P()
        check(lib.cuda_scorer_get(client.ptr, gpu.ptr, model.ptr, policy.encode() if policy else None, c.byref(p)),
              "cuda_scorer_get")
        self.client, self.gpu, self.model = client, gpu, model
        self.coefs = lib.cuda_scorer_coefs(p)
        self.policy = lib.cuda_scorer_policy(p).decode()
        self._made(p, lib.cuda_scorer_put, gpu)

    def run(self, rows, heads, pos, n, out, out_stride, dtype="bfloat16", lane=0, stream=0):
        """Scores of n rows of `heads` lanes from `lane` on; rows: a CudaLayer. out: device address, see the header."""
        check(lib.cuda_scorer_run(self.ptr, lane, heads, rows.k, rows.v, rows.k_head_stride, rows.v_head_stride,
                                  rows.k_row_stride, rows.v_row_stride, DTYPE[dtype], pos, n, out, out_stride, stream),
              "cuda_scorer_run")


class CudaSequence(Sequence):
    """A sequence whose rows are in GPU memory. layers: a CudaLayer array; the memory is the caller's and outlives it.
    What Sequence does with a region (append, apply, recall) is replaced by the calls below."""

    def __init__(self, client, model, window, layers, cap, stage, max_rows, scorer=None, out_bytes=0, in_bytes=0,
                 direct=False, resume=False, **seq_args):
        self.window, self.scorer, self.layers, self.cap, self.stage = window, scorer, layers, cap, stage
        g = sized(_SeqOpts, window=window.ptr, scorer=scorer.ptr if scorer else None, layers=layers, cap=cap,
                  stage=stage, out_bytes=out_bytes, in_bytes=in_bytes, flags=DIRECT if direct else 0)
        o = self._options(client, model, max_rows, **seq_args)
        p, rows = P(), U32()
        if resume:
            check(lib.cuda_seq_resume(client.ptr, model.ptr, c.byref(o), c.byref(g), c.byref(p), c.byref(rows)),
                  "cuda_seq_resume")
        else:
            check(lib.cuda_seq_open(client.ptr, model.ptr, c.byref(o), c.byref(g), c.byref(p)), "cuda_seq_open")
        self._opened(p)
        self._counts = (U32 * model.lanes)()
        self._append, self._poll = lib.cuda_append, lib.cuda_poll

    def append(self, pos, n):
        """Rows [pos, pos + n) of all layers are written, by work before this on the stream. Host only."""
        rc = self._append(self.ptr, pos, n)
        if rc < 0:
            check(rc, "cuda_append")

    def push(self, stream=0):
        """Score all appended rows and have the daemon told, once the stream has come this far."""
        check(lib.cuda_push(self.ptr, stream), "cuda_push")

    def poll(self, stream=0):
        """Look, and launch what the newest plan needs next; never blocks. Returns the plan's state: PLAN_*."""
        rc = self._poll(self.ptr, stream, None)
        return rc if rc >= 0 else check(rc, "cuda_poll")

    def state(self, stream=0):
        """The same, and a State."""
        s = sized(State)
        check(lib.cuda_poll(self.ptr, stream, c.byref(s)), "cuda_poll")
        return s

    def apply(self, plan, stream=0, to=None):
        """Carry out READY plan `plan` (an id). Returns the rows of each lane from then on: a ctypes array, reused."""
        check(lib.cuda_apply(self.ptr, plan, to, self._counts, stream), "cuda_apply")
        if to is not None:
            self.layers = to
        return self._counts

    def counts(self):
        """Rows of each lane in the device tier: a ctypes array, reused."""
        check(lib.cuda_counts(self.ptr, self._counts), "cuda_counts")
        return self._counts

    def map(self):
        """(device address of uint32 position[lanes][stride], stride): the row in each slot."""
        addr, stride = U64(), U32()
        check(lib.cuda_map(self.ptr, c.byref(addr), c.byref(stride)), "cuda_map")
        return addr.value, stride.value

    def settle(self, save=False, timeout_ms=10000, stream=0):
        """Carry out everything decided so far; with save: have all rows stored below first. Waits."""
        return check(lib.cuda_settle(self.ptr, int(save), timeout_ms, stream), "cuda_settle")

    def recall_prepare(self, stream=0):
        """Make what the directory lists searchable."""
        return check(lib.cuda_recall_prepare(self.ptr, stream), "cuda_recall_prepare")

    def recall(self, layer, tokens, opts, stream=0):
        """Launch the search of one layer; opts: RecallOpts."""
        check(lib.cuda_recall(self.ptr, layer, tokens, c.byref(opts), stream), "cuda_recall")

    def recall_check(self):
        """Once the stream has passed the recalls: True, what they read stood still; False, recall again."""
        return check(lib.cuda_recall_check(self.ptr), "cuda_recall_check") != _lib.AGAIN


class Pool(_Handle):
    """GPU memory that other processes can map by descriptor. fd: import one; it stays the caller's."""

    def __init__(self, gpu, nbytes, fd=None):
        p = P()
        if fd is None:
            check(lib.cuda_pool_create(gpu.ptr, nbytes, c.byref(p)), "cuda_pool_create")
        else:
            check(lib.cuda_pool_import(gpu.ptr, fd, nbytes, c.byref(p)), "cuda_pool_import")
        self.gpu, self.addr, self.nbytes = gpu, lib.cuda_pool_addr(p), lib.cuda_pool_bytes(p)
        self._made(p, lib.cuda_pool_close, gpu)

    def fd(self):
        """A new descriptor, the caller's to send and close."""
        return check(lib.cuda_pool_fd(self.ptr), "cuda_pool_fd")

    @property
    def __cuda_array_interface__(self):
        """torch.as_tensor(pool, device="cuda") is a view of it, as bytes."""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.addr, False), "version": 3}


__all__ = ["Gpu", "Window", "Scorer", "CudaSequence", "CudaLayer", "Pool", "State", "RecallOpts", "DIRECT", "ROWS_ALL"]
