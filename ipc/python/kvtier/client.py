# SPDX-License-Identifier: MIT
"""Objects over the C ABI: Client, Model, Region, Sequence. Names and meaning are those of ipc/kvtier.h."""
import ctypes as c
import secrets
import weakref

from ._lib import (ALL_LAYERS, BUDGET_PER_LANE, BUDGET_UNIFORM, DTYPE, EPHEMERAL, GRANULARITY, LEASED, PLAN_READY,
                   ROPE, ROWS_ALL, TIERS, Budget, LayerDesc, Layout, ModelDesc, OpenOpts, Plan, Recalled, RecallOpts,
                   SeqInfo, SeqOpts, Stats, check, lib, sized)


def budget(device=ROWS_ALL, dram=0, nvme=0, policy=None, slack=0, manual=False, write_through=False):
    """Rows per lane that each tier may hold; rows past the sum are dropped. device: one number, or one per lane
    (for sequences opened with equal_lanes=False). write_through: rows that stay get a copy below at once."""
    b = sized(Budget, kind=BUDGET_UNIFORM, dram_rows=dram, nvme_rows=nvme, slack_rows=slack, manual=int(manual),
              write_through=int(write_through), policy=policy.encode() if policy else None)
    if isinstance(device, int):
        b.device_rows = device
    else:
        b.kind, b.table_n = BUDGET_PER_LANE, len(device)
        b.device_table = (c.c_uint32 * len(device))(*device)
    return b


class _Link:
    """The C connection. It owns its regions and sequences: once it is closed they are gone too, whatever order
    Python drops the objects in."""

    def __init__(self, ptr):
        self.ptr, self.open = ptr, True

    def close(self):
        if self.open:
            self.open = False
            lib.close(self.ptr)

    def close_part(self, fn, ptr):
        if self.open:
            fn(ptr)


class Client:
    """A connection to kvtierd. Close it, or use it as a context manager. Closing ends its sequences and unmaps its
    regions: tensors over them must not be used afterwards."""

    def __init__(self, socket=None, name=None, timeout_ms=0, max_seqs=0, plan_bytes=0):
        self._keep = (socket and str(socket).encode(), name and name.encode())
        o = sized(OpenOpts, socket=self._keep[0], name=self._keep[1], timeout_ms=timeout_ms, max_seqs=max_seqs,
                  plan_bytes=plan_bytes)
        p = c.c_void_p()
        check(lib.open(c.byref(o), c.byref(p)), "open")
        self.ptr = p
        self.link = _Link(p)
        self._final = weakref.finalize(self, self.link.close)

    def close(self):
        self._final()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def process(self):
        return check(lib.process(self.ptr), "process")

    def event_fd(self):
        return check(lib.event_fd(self.ptr), "event_fd")

    def stats(self):
        s = sized(Stats)
        check(lib.stats(self.ptr, c.byref(s)), "stats")
        return {n: getattr(s, n) for n, _ in Stats._fields_[1:]}


class Model:
    """A registered description: `layers` layers of `heads` KV heads, rows of head_dim elements for K and for V."""

    def __init__(self, client, name, layers, heads, head_dim, dtype="float32", rope="half", rope_theta=10000.0):
        width = head_dim * {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]
        table = (LayerDesc * layers)(*[LayerDesc(kv_heads=heads, k_bytes=width, v_bytes=width)] * layers)
        d = sized(ModelDesc, name=name.encode(), layers=table, n_layers=layers, dtype=DTYPE[dtype],
                  head_dim=head_dim, rope=ROPE[rope], post_rope=1, rope_theta=rope_theta, world=1)
        p = c.c_void_p()
        check(lib.model_register(client.ptr, c.byref(d), c.byref(p)), "model_register")
        self.client, self.ptr = client, p
        self.layers, self.heads, self.head_dim, self.row_bytes = layers, heads, head_dim, 2 * width

    @property
    def lanes(self):
        return self.layers * self.heads

    def layout(self, cap, stage, score_rows=0):
        """The plain layout [layer][K|V][head][cap + stage][row]: (Layout array, bytes of region it needs).
        score_rows: positions of a float32 score plane per head, 0 for none (policy "client" needs max_rows)."""
        table = (Layout * self.layers)()
        n = c.c_uint64()
        check(lib.layout_plain(self.ptr, cap, stage, score_rows, 0, table, c.byref(n)), "layout_plain")
        return table, n.value


class Region:
    """Daemon-made memory for device rows. Memory appears on use and goes back as rows leave. With fd: the first
    nbytes of the runtime's own file on tmpfs (a memfd); the fd stays the caller's."""

    def __init__(self, client, nbytes, fd=None):
        p = c.c_void_p()
        if fd is None:
            check(lib.region_create(client.ptr, nbytes, c.byref(p)), "region_create")
        else:
            check(lib.region_import(client.ptr, fd, nbytes, c.byref(p)), "region_import")
        self.client, self.ptr = client, p
        self.nbytes = lib.region_bytes(p)
        self._final = weakref.finalize(self, client.link.close_part, lib.region_close, p)

    def close(self):
        self._final()

    def buffer(self):
        """A writable buffer over the whole region; do not use it after close()."""
        return (c.c_char * self.nbytes).from_address(lib.region_addr(self.ptr))

    def resident(self):
        """Bytes the kernel really holds for the region now."""
        return lib.region_resident(self.ptr)


class Sequence:
    """One conversation's cache. key (16 bytes) names it; leased ones need secret (32 bytes) to resume."""

    def __init__(self, client, model, region, layouts, max_rows, key=None, secret=None, leased=False, ttl_s=600,
                 equal_lanes=True, granularity="head", budget=None, resume=False, fork_of=None, prefix=0):
        self.region, self.layouts = region, layouts
        o = self._options(client, model, max_rows, key, secret, leased, ttl_s, equal_lanes, granularity, budget)
        o.region, o.layouts = region.ptr, layouts
        p, rows = c.c_void_p(), c.c_uint32()
        if resume:
            check(lib.seq_resume(client.ptr, model.ptr, c.byref(o), c.byref(p), c.byref(rows)), "seq_resume")
        elif fork_of is not None:
            check(lib.seq_fork(fork_of.ptr, prefix, c.byref(o), c.byref(p)), "seq_fork")
        else:
            check(lib.seq_open(client.ptr, model.ptr, c.byref(o), c.byref(p)), "seq_open")
        self._opened(p)

    def _options(self, client, model, max_rows, key=None, secret=None, leased=False, ttl_s=600, equal_lanes=True,
                 granularity="head", budget=None):
        """What every way to open one is told, except where the rows are."""
        self.client, self.model = client, model
        self.key = key or secrets.token_bytes(16)
        self.secret = secret or secrets.token_bytes(32)
        o = sized(SeqOpts, lifetime=LEASED if leased else EPHEMERAL, ttl_s=ttl_s, max_rows=max_rows,
                  granularity=GRANULARITY[granularity], equal_lanes=int(equal_lanes))
        o.key[:], o.secret[:] = self.key, self.secret
        if budget is not None:
            o.budget = c.pointer(budget)
        return o

    def _opened(self, ptr):
        self.ptr = ptr
        self._final = weakref.finalize(self, self.client.link.close_part, lib.seq_close, ptr)

    def close(self):
        self._final()

    def drop(self):
        """Close and free even when leased."""
        if self._final.detach() and self.client.link.open:
            check(lib.seq_drop(self.ptr), "seq_drop")

    @property
    def rows(self):
        return lib.seq_rows(self.ptr)

    def append(self, pos, n, layer=ALL_LAYERS):
        check(lib.seq_append(self.ptr, layer, pos, n), "seq_append")

    def truncate(self, n):
        check(lib.seq_truncate(self.ptr, n), "seq_truncate")

    def info(self):
        s = sized(SeqInfo)
        check(lib.seq_info(self.ptr, c.byref(s)), "seq_info")
        d = {n: getattr(s, n) for n, _ in SeqInfo._fields_[1:]}
        d["tier_rows"] = dict(zip(TIERS, s.tier_rows))
        d["tier_bytes"] = dict(zip(TIERS, s.tier_bytes))
        d["policy"] = s.policy.decode()
        return d

    def resident(self, lane):
        """Positions of the lane's rows in the device tier, ascending: row i of the lane is positions[i]."""
        n = check(lib.seq_resident(self.ptr, lane, None, 0), "seq_resident")
        out = (c.c_uint32 * n)()
        check(lib.seq_resident(self.ptr, lane, out, n), "seq_resident")
        return list(out)

    def resident_count(self, lane):
        """How many rows of the lane are in the device tier."""
        return check(lib.seq_resident(self.ptr, lane, None, 0), "seq_resident")

    def recall(self, layer, queries, tokens, rows, window, group=1, dtype="float32", token_stride=0, head_stride=0,
               scale=0.0, probe=0, flags=0, timeout_ms=0, before=0, after=0):
        """The rows in DRAM that this layer's queries (an address, after RoPE) attend to most, and `before` and `after`
        rows around each of them, copied to `window`: a Layout whose offsets and strides say where row 0 of head 0 goes
        and whose cap says how many rows there is room for. Returns (counts, positions, Recalled): ctypes arrays of [heads] and of [heads x rows]."""
        heads = self.model.heads
        counts, positions = (c.c_uint32 * heads)(), (c.c_uint32 * (heads * rows))()
        o = sized(RecallOpts, group=group, dtype=DTYPE[dtype], token_stride=token_stride, head_stride=head_stride,
                  scale=scale, rows=rows, probe=probe, flags=flags, timeout_ms=timeout_ms, window_rows=window.cap,
                  before=before, after=after, k_off=window.k_off, v_off=window.v_off, k_head_stride=window.k_head_stride,
                  v_head_stride=window.v_head_stride, k_row_stride=window.k_row_stride,
                  v_row_stride=window.v_row_stride)
        ret = sized(Recalled, counts=counts, positions=positions)
        check(lib.seq_recall(self.ptr, layer, queries, tokens, c.byref(o), c.byref(ret)), "seq_recall")
        return counts, positions, ret

    def recall_prepare(self):
        """Recalls will come: have summaries made for them in the background."""
        check(lib.seq_recall_prepare(self.ptr), "seq_recall_prepare")

    def recall_end(self):
        """Wait until the daemon touches no window of this sequence."""
        check(lib.seq_recall_end(self.ptr), "seq_recall_end")

    def request(self, b=None):
        """Ask for a plan (with a new sticky budget if given); returns the id from which plans reflect it."""
        ident = c.c_uint64()
        check(lib.plan_request(self.ptr, c.byref(b) if b is not None else None, c.byref(ident)), "plan_request")
        return ident.value

    def fetch(self, pos, n):
        """Want rows [pos, pos + n) back on the device in the next plan."""
        ident = c.c_uint64()
        check(lib.fetch(self.ptr, pos, n, c.byref(ident)), "fetch")
        return ident.value

    def peek(self):
        """The newest plan not yet acknowledged, or None. No lock, no system call."""
        p = sized(Plan)
        return p if check(lib.plan_peek(self.ptr, c.byref(p)), "plan_peek") else None

    def wait(self, ident, state=PLAN_READY, timeout_ms=10000):
        p = sized(Plan)
        check(lib.plan_wait(self.ptr, ident, state, timeout_ms, c.byref(p)), "plan_wait")
        return p

    def apply(self, plan):
        """Carry a READY plan out in the region and acknowledge it."""
        check(lib.plan_apply(self.ptr, c.byref(plan)), "plan_apply")
        check(lib.plan_ack(self.ptr, plan.id, None), "plan_ack")

    def promoted(self, plan, lane):
        n = check(lib.plan_promoted(c.byref(plan), lane, None, 0), "plan_promoted")
        out = (c.c_uint32 * max(n, 1))()
        check(lib.plan_promoted(c.byref(plan), lane, out, n), "plan_promoted")
        return list(out)[:n]
