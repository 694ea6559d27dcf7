# SPDX-License-Identifier: MIT
"""Scores of kvtier's own policies for Python: build/libkvtier-lab.so by ctypes.

    with scores.open("knorm", None, Shape(30, 3, 64, 64)) as policy:
        s = policy.score(k, v, positions, total, threads=16)     # float32 [lanes, n]

K and V are contiguous CPU tensors or arrays [lanes, n, d] (or [layers, heads, n, d]) of float32, float16 or
bfloat16, keys as cached (after RoPE). Scores rank the rows of a lane: higher is kept. The calls release the GIL.
"""
import ctypes
import os
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_size_t, c_uint32, c_uint64, c_void_p
from typing import NamedTuple

import numpy as np

DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3}
_ERR = 512


class Shape(NamedTuple):
    """What rows look like. dtype: a name of DTYPES, or a torch or numpy dtype of that name."""
    layers: int
    heads: int
    k_dim: int
    v_dim: int
    dtype: object = "float16"


class _Shape(Structure):
    _fields_ = [("layers", c_uint32), ("heads", c_uint32), ("k_dim", c_uint32), ("v_dim", c_uint32),
                ("dtype", c_uint32), ("seed", c_uint64)]


class _Rows(Structure):
    _fields_ = [("n", c_uint32), ("k", c_void_p), ("v", c_void_p), ("k_lane", c_size_t), ("v_lane", c_size_t),
                ("pos", POINTER(c_uint32)), ("pos_lane", c_size_t), ("total", c_uint32), ("nonce", c_uint64),
                ("threads", c_uint32), ("scores", POINTER(c_float))]


def library(path=None):
    """The shared object of $KVT_BUILD, or of build/ in the repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    build = os.environ.get("KVT_BUILD", os.path.join(here, "..", "..", "build"))
    lib = ctypes.CDLL(path or os.path.join(build, "libkvtier-lab.so"))
    lib.lab_score_open.argtypes = [POINTER(c_void_p), c_char_p, c_char_p, c_char_p, POINTER(_Shape), c_char_p, c_size_t]
    lib.lab_score_run.argtypes = [c_void_p, POINTER(_Rows), c_char_p, c_size_t]
    lib.lab_score_close.argtypes = [c_void_p]
    lib.lab_score_close.restype = None
    return lib


def _dtype_name(dtype):
    return str(np.dtype(dtype)) if isinstance(dtype, type) else str(dtype).rpartition(".")[2]


def _memory(x, lanes, dim, dtype, what):
    """Address, rows per lane and the object that keeps the memory alive."""
    if _dtype_name(x.dtype) != dtype:
        raise ValueError(f"{what}: dtype {x.dtype}, the policy was opened for {dtype}")
    n = x.shape[-2]
    size = int(np.prod(x.shape))
    if x.shape[-1] != dim or size != lanes * n * dim:
        raise ValueError(f"{what}: shape {tuple(x.shape)}, must be {lanes} lanes of n rows of {dim}")
    if hasattr(x, "data_ptr"):
        x = x.detach().contiguous()
        if x.device.type != "cpu":
            raise ValueError(f"{what}: on {x.device}, must be on the CPU")
        return x.data_ptr(), n, x
    x = np.ascontiguousarray(x)
    return x.ctypes.data, n, x


class Policy:
    """An open policy; close() it or use it in a with statement. Threads may share it."""

    def __init__(self, lib, handle, shape):
        self._lib, self._handle, self.shape = lib, handle, shape
        self.lanes = shape.layers * shape.heads

    def score(self, k, v, positions=None, total=None, threads=0, nonce=0):
        """Scores [lanes, n]. positions: [n] for all lanes or [lanes, n], ascending (None: 0 ... n - 1);
        total: rows of the sequence so far, evicted ones included (None: n, or the last position + 1)."""
        if not self._handle:
            raise ValueError("the policy is closed")
        dtype = _dtype_name(self.shape.dtype)
        size = 4 if dtype == "float32" else 2
        k_at, n, k_alive = _memory(k, self.lanes, self.shape.k_dim, dtype, "k")
        v_at, v_n, v_alive = _memory(v, self.lanes, self.shape.v_dim, dtype, "v")
        if v_n != n:
            raise ValueError(f"v: {v_n} rows, k has {n}")
        rows = _Rows(n=n, k=k_at, v=v_at, k_lane=n * self.shape.k_dim * size, v_lane=n * self.shape.v_dim * size,
                     nonce=nonce, threads=threads or os.cpu_count() or 1)
        if positions is not None:
            positions = np.ascontiguousarray(positions, dtype=np.uint32)
            if positions.shape not in ((n,), (self.lanes, n)):
                raise ValueError(f"positions: shape {positions.shape}, must be {(n,)} or {(self.lanes, n)}")
            rows.pos = positions.ctypes.data_as(POINTER(c_uint32))
            rows.pos_lane = n if positions.ndim == 2 else 0
        last = int(positions.max()) + 1 if positions is not None and n else n
        rows.total = last if total is None else total
        if rows.total < last:
            raise ValueError(f"total: {rows.total}, must be at least {last}")
        out = np.empty((self.lanes, n), np.float32)
        rows.scores = out.ctypes.data_as(POINTER(c_float))
        err = ctypes.create_string_buffer(_ERR)
        if self._lib.lab_score_run(self._handle, byref(rows), err, _ERR) < 0:
            raise RuntimeError(err.value.decode(errors="replace"))
        del k_alive, v_alive
        return out

    def close(self):
        if self._handle:
            self._lib.lab_score_close(self._handle)
            self._handle = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        self.close()


def open(policy, weights, shape, model=None, seed=0, lib=None):  # noqa: A001 (scores.open reads well)
    """Open a policy by name, or by its weight file when policy is None. ValueError says what is wrong."""
    lib = lib or library()
    c_shape = _Shape(shape.layers, shape.heads, shape.k_dim, shape.v_dim, DTYPES.get(_dtype_name(shape.dtype), 0), seed)
    handle, err = c_void_p(), ctypes.create_string_buffer(_ERR)
    names = [os.fsencode(x) if x else None for x in (policy, weights, model)]
    if lib.lab_score_open(byref(handle), *names, byref(c_shape), err, _ERR) < 0:
        raise ValueError(err.value.decode(errors="replace"))
    return Policy(lib, handle.value, shape)
