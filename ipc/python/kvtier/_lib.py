# SPDX-License-Identifier: MIT
"""libkvtier's C ABI (ipc/kvtier.h) through ctypes: structures, prototypes, errors. Nothing else."""
import ctypes as c
import os
from pathlib import Path

TIERS = ("device", "dram", "nvme")
AGAIN = 1000
ROWS_ALL = 0xFFFFFFFF
ALL_LAYERS = -1
PLAN_NONE, PLAN_DECIDED, PLAN_READY, PLAN_CANCELLED = range(4)
EPHEMERAL, LEASED = 0, 1
BUDGET_UNIFORM, BUDGET_PER_LAYER, BUDGET_PER_LANE = range(3)
GRANULARITY = {"head": 0, "token": 1, "block": 2}
DTYPE = {"opaque": 0, "float32": 1, "float16": 2, "bfloat16": 3}
RECALL_LOGITS, RECALL_NO_RESIDENT, RECALL_ALONE = 1, 2, 4
ROPE = {None: 0, "half": 1, "interleaved": 2}

LOG_FN = c.CFUNCTYPE(None, c.c_void_p, c.c_int, c.c_char_p)


class OpenOpts(c.Structure):
    _fields_ = [("size", c.c_size_t), ("socket", c.c_char_p), ("name", c.c_char_p), ("timeout_ms", c.c_uint32),
                ("max_seqs", c.c_uint32), ("plan_bytes", c.c_uint64), ("log", LOG_FN), ("log_arg", c.c_void_p)]


class Stats(c.Structure):
    _fields_ = [("size", c.c_size_t)] + [(n, c.c_uint64) for n in (
        "connects", "reconnects", "calls", "timeouts", "plans_seen", "plans_applied", "plans_nacked",
        "plans_cancelled", "rows_appended", "rows_promoted", "rows_evicted", "bytes_released", "wakeups")]


class LayerDesc(c.Structure):
    _fields_ = [(n, c.c_uint32) for n in ("kind", "kv_heads", "k_bytes", "v_bytes", "side_bytes", "window")]


class ModelDesc(c.Structure):
    _fields_ = [("size", c.c_size_t), ("name", c.c_char_p), ("layers", c.POINTER(LayerDesc)),
                ("n_layers", c.c_uint32), ("dtype", c.c_uint32), ("head_dim", c.c_uint32), ("rope", c.c_uint32),
                ("post_rope", c.c_uint32), ("rope_theta", c.c_float), ("rank", c.c_uint32), ("world", c.c_uint32),
                ("first_head", c.c_uint32)]


class Layout(c.Structure):
    _fields_ = [(n, c.c_uint64) for n in ("k_off", "v_off", "k_head_stride", "v_head_stride", "score_off",
                                          "score_head_stride")] + \
               [(n, c.c_uint32) for n in ("k_row_stride", "v_row_stride", "cap", "stage")]


class Budget(c.Structure):
    _fields_ = [("size", c.c_size_t), ("kind", c.c_uint32), ("device_rows", c.c_uint32), ("dram_rows", c.c_uint32),
                ("nvme_rows", c.c_uint32), ("device_table", c.POINTER(c.c_uint32)), ("table_n", c.c_uint32),
                ("slack_rows", c.c_uint32), ("manual", c.c_uint32), ("policy", c.c_char_p),
                ("write_through", c.c_uint32), ("reserved", c.c_uint32)]


class SeqOpts(c.Structure):
    _fields_ = [("size", c.c_size_t), ("key", c.c_uint8 * 16), ("secret", c.c_uint8 * 32), ("lifetime", c.c_uint32),
                ("ttl_s", c.c_uint32), ("max_rows", c.c_uint32), ("granularity", c.c_uint32),
                ("equal_lanes", c.c_uint32), ("region", c.c_void_p), ("layouts", c.POINTER(Layout)),
                ("budget", c.POINTER(Budget))]


class SeqInfo(c.Structure):
    _fields_ = [("size", c.c_size_t), ("handle", c.c_uint64), ("rows", c.c_uint32), ("epoch", c.c_uint32),
                ("lanes", c.c_uint32), ("resident_max", c.c_uint32), ("tier_rows", c.c_uint64 * 3),
                ("tier_bytes", c.c_uint64 * 3), ("dropped_rows", c.c_uint64), ("plans", c.c_uint64),
                ("plan_ns_last", c.c_uint64), ("refaults", c.c_uint64), ("misses", c.c_uint64),
                ("index_bytes", c.c_uint64), ("policy", c.c_char * 32), ("unsaved_rows", c.c_uint64)]


class Plan(c.Structure):
    _fields_ = [("size", c.c_size_t), ("id", c.c_uint64), ("state", c.c_uint32), ("epoch", c.c_uint32),
                ("watermark", c.c_uint32), ("lanes", c.c_uint32), ("words", c.c_uint32), ("flags", c.c_uint32),
                ("decided_ns", c.c_uint64), ("rows_out", c.c_uint64), ("rows_in", c.c_uint64),
                ("rows_drop", c.c_uint64), ("resident_after", c.POINTER(c.c_uint64)),
                ("copy_out", c.POINTER(c.c_uint64)), ("bring_in", c.POINTER(c.c_uint64))]


class TraceOpts(c.Structure):
    _fields_ = [("size", c.c_size_t), ("dir", c.c_char_p), ("max_bytes", c.c_uint64), ("buffer_bytes", c.c_uint64),
                ("every_n", c.c_uint32), ("source", c.c_char_p), ("domain", c.c_char_p), ("log", LOG_FN),
                ("log_arg", c.c_void_p)]


class TraceStats(c.Structure):
    _fields_ = [("size", c.c_size_t)] + [(n, c.c_uint64) for n in ("seen", "picked", "recorded", "dropped", "bytes",
                                                                   "buffered")] + \
               [("ended", c.c_int32), ("reserved", c.c_uint32)]


class TraceModel(c.Structure):
    _fields_ = [("size", c.c_size_t), ("name", c.c_char_p)] + \
               [(n, c.c_uint32) for n in ("layers", "heads", "group", "k_dim", "v_dim", "dtype", "rope",
                                          "post_rope")] + \
               [("rope_theta", c.c_float)]


class TraceSpan(c.Structure):
    _fields_ = [("size", c.c_size_t)] + [(n, c.c_uint32) for n in ("layer", "pos", "n", "reserved")] + \
               [(n, c.c_void_p) for n in "kvq"] + \
               [(n, c.c_uint64) for n in ("k_head", "k_row", "v_head", "v_row", "q_head", "q_row")]


class TraceCut(c.Structure):
    _fields_ = [(n, c.c_uint32) for n in ("prompt", "queries", "context", "flags")]


class RecallOpts(c.Structure):
    _fields_ = [("size", c.c_size_t), ("group", c.c_uint32), ("dtype", c.c_uint32), ("token_stride", c.c_uint64),
                ("head_stride", c.c_uint64), ("scale", c.c_float)] + \
               [(n, c.c_uint32) for n in ("rows", "probe", "flags", "timeout_ms", "window_rows")] + \
               [(n, c.c_uint64) for n in ("k_off", "v_off", "k_head_stride", "v_head_stride")] + \
               [(n, c.c_uint32) for n in ("k_row_stride", "v_row_stride", "before", "after")]


class Recalled(c.Structure):
    _fields_ = [("size", c.c_size_t), ("counts", c.POINTER(c.c_uint32)), ("positions", c.POINTER(c.c_uint32))] + \
               [(n, c.c_uint64) for n in ("searched", "skipped", "missed", "daemon_ns")]


def sized(cls, **values):
    """An option struct with its size set and the rest zero."""
    s = cls(**values)
    s.size = c.sizeof(cls)
    return s


class Error(Exception):
    """A KVT_E_* code with the library's line (field, value, limit)."""

    def __init__(self, code, what, line):
        self.code = code
        super().__init__(f"{what}: {line}")


P, U32, U64, INT = c.c_void_p, c.c_uint32, c.c_uint64, c.c_int
_PROTOTYPES = {
    "open": (INT, [c.POINTER(OpenOpts), c.POINTER(P)]),
    "close": (None, [P]),
    "event_fd": (INT, [P]),
    "process": (INT, [P]),
    "strerror": (c.c_char_p, [INT]),
    "last_error": (c.c_char_p, []),
    "abi_version": (U32, []),
    "stats": (INT, [P, c.POINTER(Stats)]),
    "model_register": (INT, [P, c.POINTER(ModelDesc), c.POINTER(P)]),
    "model_release": (None, [P]),
    "region_create": (INT, [P, U64, c.POINTER(P)]),
    "region_import": (INT, [P, INT, U64, c.POINTER(P)]),
    "region_addr": (P, [P]),
    "region_bytes": (U64, [P]),
    "region_resident": (U64, [P]),
    "region_close": (None, [P]),
    "layout_plain": (INT, [P, U32, U32, U32, U64, c.POINTER(Layout), c.POINTER(U64)]),
    "seq_open": (INT, [P, P, c.POINTER(SeqOpts), c.POINTER(P)]),
    "seq_resume": (INT, [P, P, c.POINTER(SeqOpts), c.POINTER(P), c.POINTER(U32)]),
    "seq_append": (INT, [P, INT, U32, U32]),
    "seq_truncate": (INT, [P, U32]),
    "seq_fork": (INT, [P, U32, c.POINTER(SeqOpts), c.POINTER(P)]),
    "seq_close": (None, [P]),
    "seq_drop": (INT, [P]),
    "seq_info": (INT, [P, c.POINTER(SeqInfo)]),
    "seq_recall": (INT, [P, U32, P, U32, c.POINTER(RecallOpts), c.POINTER(Recalled)]),
    "seq_recall_prepare": (INT, [P]),
    "seq_recall_end": (INT, [P]),
    "seq_resident": (INT, [P, U32, c.POINTER(U32), U32]),
    "seq_rows": (U32, [P]),
    "plan_request": (INT, [P, c.POINTER(Budget), c.POINTER(U64)]),
    "plan_peek": (INT, [P, c.POINTER(Plan)]),
    "plan_wait": (INT, [P, U64, U32, U32, c.POINTER(Plan)]),
    "plan_kept": (INT, [c.POINTER(Plan), U32, c.POINTER(U32), U32]),
    "plan_promoted": (INT, [c.POINTER(Plan), U32, c.POINTER(U32), U32]),
    "plan_apply": (INT, [P, c.POINTER(Plan)]),
    "plan_ack": (INT, [P, U64, c.POINTER(U64)]),
    "fetch": (INT, [P, U32, U32, c.POINTER(U64)]),
    "trace_open": (INT, [c.POINTER(TraceOpts), c.POINTER(P)]),
    "trace_close": (None, [P]),
    "trace_flush": (INT, [P, U32]),
    "trace_stats": (INT, [P, c.POINTER(TraceStats)]),
    "trace_begin": (INT, [P, c.POINTER(TraceModel), c.c_char_p, c.POINTER(P)]),
    "trace_rows": (INT, [P, c.POINTER(TraceSpan)]),
    "trace_tokens": (INT, [P, U32, P, U32]),
    "trace_end": (INT, [P, c.POINTER(TraceCut), U32]),
    "trace_discard": (None, [P]),
}


def _find():
    """$KVTIER_LIB, the build tree this package lies in, then the system's library."""
    if os.environ.get("KVTIER_LIB"):
        return os.environ["KVTIER_LIB"]
    root = Path(__file__).resolve().parents[3]
    for build in (os.environ.get("KVT_BUILD"), root / "build"):
        if build and (Path(build) / "libkvtier.so.0").exists():
            return str(Path(build) / "libkvtier.so.0")
    return "libkvtier.so.0"


def declare(prototypes):
    """More of the library's functions, for the module that uses them."""
    _PROTOTYPES.update(prototypes)


class _Library:
    """The library, opened at the first use of a function; functions keep their prototypes."""

    def __init__(self):
        self._so = None

    def __getattr__(self, name):
        if self._so is None:
            self._so = c.CDLL(_find())
        f = getattr(self._so, "kvtier_" + name)
        f.restype, f.argtypes = _PROTOTYPES[name]
        setattr(self, name, f)
        return f


lib = _Library()


def check(rc, what):
    """Pass a result through, or raise Error with the library's own words."""
    if rc < 0:
        line = (lib.last_error() or b"").decode(errors="replace") or lib.strerror(rc).decode()
        raise Error(rc, what, line)
    return rc
