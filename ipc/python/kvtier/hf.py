# SPDX-License-Identifier: MIT
"""A Hugging Face `Cache` whose rows live in a kvtier region.

Every layer's K and V are views of one shared region, [heads, slots, head_dim]. Plans are carried out
between forward passes: each KV head keeps its own tokens, all heads the same number of them (stock
attention needs that; attn_implementation="kvtier" does not), and the pages of evicted rows go back to the kernel. RoPE
is already in the keys, so a kept row keeps its position; masks are built from the number of slots, positions from the
number seen.

A new turn's queries may bring demoted rows back for that turn (recall_rows, see KvtierCache): they lie before the first
slot, and no plan knows of them.
"""
import ctypes

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from . import attention
from ._lib import BUDGET_UNIFORM, PLAN_READY, ROWS_ALL, Budget, Error, Layout
from .client import Model, Region, Sequence, budget

_BUSY = -2017  # KVT_E_BUSY: an earlier plan is READY and must be applied first
_GONE = (-2003, -2004, -2006)  # KVT_E_DAEMON, KVT_E_TIMEOUT, KVT_E_STALE
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def within(b, room):
    """The budget of plans when recalled rows may take `room` of it: what they take is not the plans'."""
    if b is None or not room:
        return b
    less = Budget.from_buffer_copy(b)
    less._table = b  # the strings and tables stay the original's
    if b.kind == BUDGET_UNIFORM:
        rows = [b.device_rows]
    else:
        rows = [b.device_table[i] for i in range(b.table_n)]
    if min(rows) < room:
        raise ValueError(f"budget: {min(rows)} device rows, recall_rows alone are {room}")
    rows = [r if r == ROWS_ALL else r - room for r in rows]
    if b.kind == BUDGET_UNIFORM:
        less.device_rows = rows[0]
    else:
        less.device_table = (ctypes.c_uint32 * len(rows))(*rows)
    return less


class KvtierLayer(CacheLayerMixin):
    """One layer: views of the region and nothing of its own.

    Memory of a head: `room` slots for recalled rows, then the slots of the rows it holds. Recalled rows are what
    attention sees before slot 0."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache, index, keys, values, room=0):
        super().__init__()
        self.cache, self.index, self.room = cache, index, room
        self.k_slots, self.v_slots = keys, values  # [heads, room + cap + stage, head_dim]
        self.dtype, self.device = keys.dtype, keys.device
        self.counts = [0] * keys.shape[0]  # rows now in the device tier, per head
        self.seen = 0      # rows ever appended and not rolled back: the logical length
        self.front = 0     # slots before slot 0 that attention sees
        self.recalled = None   # bool [heads, front]: those that hold a row, ...
        self.recalled_at = None  # ... and int64 [heads, front]: its position
        self.is_initialized = True

    @property
    def slots(self):
        """Rows in the device tier, of the head that holds most."""
        return max(self.counts)

    def lazy_initialization(self, key_states, value_states):
        pass

    def _view(self, plane):
        return plane[None, :, self.room - self.front : self.room + self.slots]

    @property
    def keys(self):
        return self._view(self.k_slots)

    @keys.setter
    def keys(self, value):
        if value is not None:
            raise AttributeError("a kvtier layer's keys live in its region and cannot be replaced")

    @property
    def values(self):
        return self._view(self.v_slots)

    @values.setter
    def values(self, value):
        if value is not None:
            raise AttributeError("a kvtier layer's values live in its region and cannot be replaced")

    def update(self, key_states, value_states, *args, **kwargs):
        batch, _, n, _ = key_states.shape
        if batch != 1:
            raise ValueError(f"batch size: {batch}, a kvtier sequence holds 1")
        if self.index == 0 and self.cache.hooked and self.cache.auto:
            self.cache.poll()  # no mask is made for our own attention, so nobody asked for its size
        if self.slots + n > self.cache.cap:
            raise ValueError(f"rows: {self.slots + n}, the region holds {self.cache.cap} (max_rows)")
        for plane, rows in ((self.k_slots, key_states[0]), (self.v_slots, value_states[0])):
            if min(self.counts) == self.slots:
                plane[:, self.room + self.slots : self.room + self.slots + n] = rows
            else:
                for head, at in enumerate(self.counts):
                    plane[head, self.room + at : self.room + at + n] = rows[head]
        self.counts = [have + n for have in self.counts]
        self.seen += n
        self.cache.layer_done(self.index, n)
        keys = self.keys
        if self.cache.hooked:
            attention.arrived(self, keys)
        return keys, self.values

    def take_recalled(self, counts, positions, rows):
        """`rows` slots right before slot 0 hold what was recalled: counts[h] rows of head h, from the left."""
        heads = len(self.counts)
        self.front = rows if any(counts) else 0
        if not self.front:
            return
        self.recalled_at = torch.frombuffer(positions, dtype=torch.int32).view(heads, rows).long()
        self.recalled = torch.arange(rows)[None] < torch.frombuffer(counts, dtype=torch.int32)[:, None]

    def hide_recalled(self, hidden):
        """Rows at positions for which hidden(positions, head) is true are not to be seen any more."""
        if self.front:
            for head in range(len(self.counts)):
                self.recalled[head] &= ~hidden(self.recalled_at[head], head)

    def forget_recalled(self):
        self.front, self.recalled, self.recalled_at = 0, None, None

    def get_seq_length(self):
        return self.seen

    def get_mask_sizes(self, query_length):
        held = self.front + self.slots
        return held + query_length, self.seen - held

    def get_max_length(self):
        return -1

    def crop(self, tokens_to_remove):
        # each layer is asked in turn; the sequence is rolled back once, by the first
        if self.index == 0:
            keep = self.seen + tokens_to_remove if tokens_to_remove < 0 else tokens_to_remove
            if keep < self.seen:
                self.cache.truncate(max(keep, 0))

    def reset(self):
        if self.index == 0:
            self.cache.truncate(0)

    def reorder_cache(self, beam_idx):
        raise NotImplementedError("beam search reorders batches; a kvtier sequence holds one")


class KvtierCache(Cache):
    """`past_key_values` for one sequence.

    model_config  the model's config (layers, KV heads, head size are read from it)
    client        a connected Client; model: a shared Model, or None to register one under `name`
    max_rows      positions the sequence may reach
    budget        a kvtier.budget(), or None for the daemon's default
    auto          apply READY plans by itself when a forward pass begins
    resume        take over a leased sequence by key and secret
    recall_rows   rows per head that a question may bring back for its turn; they are part of the device budget, so
                  plans keep that many less (a budget below it is refused). By itself with
                  attn_implementation="kvtier" (see kvtier.attention), else by recall_two_pass(). They stay until the
                  next question or end_turn(). The method of that name is something else: it promotes by position
    recall_min    steps of at least so many tokens are questions and recall; shorter ones go on with what is there
    recall_args   more for Sequence.recall(): before, after, probe, flags, timeout_ms
    equal_lanes   False: heads may hold different numbers of rows; needs attn_implementation="kvtier"
    """

    def __init__(self, model_config, client, max_rows, name="model", model=None, dtype=torch.float32, budget=None,
                 auto=True, recall_rows=0, recall_min=2, recall_args=None, **seq_args):
        cfg = model_config.get_text_config(decoder=True)
        head_dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
        self.client, self.cap, self.auto = client, max_rows, auto
        self.hooked = getattr(cfg, "_attn_implementation", None) == attention.NAME
        self.recall_room, self.recall_min, self.recall_args = recall_rows, recall_min, recall_args or {}
        self.recall_stats = {"calls": 0, "rows": 0, "searched": 0, "skipped": 0, "missed": 0, "daemon_ns": 0}
        self.equal = seq_args.get("equal_lanes", True)
        self._dtype, self._hold, self._mask = _DTYPES[dtype], False, (None, None)
        if not seq_args.get("equal_lanes", True) and not self.hooked:
            raise ValueError('equal_lanes: False needs a model with attn_implementation="kvtier"')
        rope = getattr(cfg, "rope_parameters", None) or {}
        self.model = model or Model(client, name, cfg.num_hidden_layers, cfg.num_key_value_heads, head_dim,
                                    _DTYPES[dtype], rope_theta=rope.get("rope_theta", 10000.0))
        layouts, nbytes = self.model.layout(max_rows, max_rows + recall_rows)
        self.windows = [self._front_window(lay, recall_rows) for lay in layouts]
        self.region = Region(client, nbytes)
        self.seq = Sequence(client, self.model, self.region, layouts, max_rows, budget=within(budget, recall_rows),
                            **seq_args)
        flat = torch.frombuffer(self.region.buffer(), dtype=dtype)
        self._memory = flat
        layers = []
        for i, lay in enumerate(layouts):
            front = self.windows[i]
            k, v = (self._plane(flat, off, hs, rs, recall_rows + lay.cap + lay.stage, head_dim)
                    for off, hs, rs in ((front.k_off, lay.k_head_stride, lay.k_row_stride),
                                        (front.v_off, lay.v_head_stride, lay.v_row_stride)))
            layers.append(KvtierLayer(self, i, k, v, recall_rows))
        super().__init__(layers=layers)
        self.detached = False  # the daemon went away: the rows held stay usable, tiering has ended
        if seq_args.get("resume"):
            for layer in self.layers:
                layer.seen = self.seq.rows
        if recall_rows:
            self.seq.recall_prepare()

    @staticmethod
    def _front_window(lay, rows):
        """Take the first `rows` slots of a layout for recalled rows. Returns where they are."""
        window = Layout.from_buffer_copy(lay)
        window.cap = rows
        lay.k_off += rows * lay.k_row_stride
        lay.v_off += rows * lay.v_row_stride
        lay.stage -= rows
        return window

    def _plane(self, flat, off, head_stride, row_stride, slots, head_dim):
        size = flat.element_size()
        return flat.as_strided((self.model.heads, slots, head_dim), (head_stride // size, row_stride // size, 1),
                               off // size)

    # ---- what the layers report -------------------------------------------------

    def layer_done(self, index, n):
        """The last layer of a forward pass completes its rows: one append for all."""
        if index == len(self.layers) - 1 and not self.detached:
            try:
                self.seq.append(self.layers[0].seen - n, n)
            except Error as e:
                self._gone(e)

    def _gone(self, error):
        """A dead daemon ends tiering, not generation; anything else is the caller's to see."""
        if error.code not in _GONE:
            raise error
        self.detached = True

    def get_mask_sizes(self, query_length, layer_idx=0):
        if self.auto:
            self.poll()
        return super().get_mask_sizes(query_length, layer_idx)

    # ---- plans --------------------------------------------------------------------

    def idle(self):
        """Between forward passes: every layer holds the same rows."""
        return all(layer.seen == self.layers[0].seen for layer in self.layers)

    def poll(self):
        """Apply the newest plan if it is READY. Returns it, or None."""
        if self.detached or not self.idle():
            return None
        try:
            plan = self.seq.peek()
        except Error as e:
            self._gone(e)
            return None
        if plan is None or plan.state != PLAN_READY:
            return None
        self._apply(plan)
        return plan

    def _apply(self, plan):
        self.seq.apply(plan)
        self._count()
        for layer in self.layers:  # rows that the plan promoted are not to be seen twice
            layer.hide_recalled(lambda pos, head: torch.isin(pos, torch.tensor(self.positions(layer.index, head),
                                                                              dtype=torch.int64)))

    def _count(self):
        """Slots per layer and head as the library counts them."""
        heads = self.model.heads
        for layer in self.layers:
            layer.counts = [self.seq.resident_count(layer.index * heads + h) for h in range(heads)]

    def _reach(self, ident, timeout_ms=60000):
        """Apply plans until one that reflects request `ident` is applied. Returns that one."""
        while True:
            try:
                plan = self.seq.wait(ident, timeout_ms=timeout_ms)
            except Error as e:
                if e.code != _BUSY or self.poll() is None:
                    raise
                continue
            self._apply(plan)
            return plan

    def compress(self, b=None, timeout_ms=60000):
        """Ask for a plan (under budget b), wait until it is READY, apply it. Returns the plan."""
        return self._reach(self.seq.request(within(b, self.recall_room)), timeout_ms)

    def recall_rows(self, pos, n, timeout_ms=60000):
        """Bring rows [pos, pos + n) back within the budget, by a plan. Not the recall of queries: see `ask`."""
        return self._reach(self.seq.fetch(pos, n), timeout_ms)

    def truncate(self, n):
        """Roll back to n rows. Rows of the prefix that some heads keep and others do not are levelled by a plan."""
        self.seq.truncate(n)
        counts = {self.seq.resident_count(lane) for lane in range(self.model.lanes)}
        if len(counts) > 1 and self.equal:
            self._reach(self.seq.request())
        for layer in self.layers:
            layer.seen = n
            layer.hide_recalled(lambda pos, head: pos >= n)
        self._count()

    # ---- recall ---------------------------------------------------------------------

    def ask(self, layer, query, scaling=None):
        """Our attention, before it attends: `query` [1, heads, n, head_dim] are the newest n rows' queries after RoPE.
        A question brings rows back; a decode step goes on with what its turn has."""
        n = query.shape[2]
        if not self.recall_room or self._hold or self.detached or n < self.recall_min:
            return
        if min(layer.counts) == layer.seen:
            return  # nothing is missing
        try:
            self._recall(layer, query, self.recall_room, scaling)
        except Error as e:
            if e.code != _BUSY:
                self._gone(e)

    def _recall(self, layer, query, rows, scaling=None):
        """Fill the `rows` slots before slot 0. Returns how many each head got."""
        if query.stride(-1) != 1:
            query = query.contiguous()
        size, full = query.element_size(), self.windows[layer.index]
        window = Layout.from_buffer_copy(full)
        window.cap = rows
        window.k_off += (full.cap - rows) * full.k_row_stride
        window.v_off += (full.cap - rows) * full.v_row_stride
        layer.forget_recalled()
        counts, positions, seen = self.seq.recall(
            layer.index, query.data_ptr(), query.shape[2], rows, window, group=query.shape[1] // self.model.heads,
            dtype=_DTYPES[query.dtype], token_stride=query.stride(2) * size, head_stride=query.stride(1) * size,
            scale=scaling or 0.0, **self.recall_args)
        layer.take_recalled(counts, positions, rows)
        for name in ("searched", "skipped", "missed", "daemon_ns"):
            self.recall_stats[name] += getattr(seen, name)
        self.recall_stats["calls"] += 1
        self.recall_stats["rows"] += sum(counts)
        return list(counts)

    def recall_two_pass(self, model, input_ids, **kwargs):
        """For models whose attention cannot be hooked: run the question once for its queries, take it back, recall for
        all layers, run it again. Every head gets equally many rows, as stock attention needs. Returns the second
        pass's output; the first one's time is part of the price."""
        start, queries = self.get_seq_length(), {}
        handles = attention.capture_queries(model, queries)
        self.end_turn()
        self._hold = True
        try:
            model(input_ids, past_key_values=self, use_cache=True, **kwargs)
            for handle in handles:
                handle.remove()
            self.truncate(start)
            rows = self.recall_room
            while rows:
                got = min(min(self._recall(layer, queries[layer.index], rows)) for layer in self.layers)
                if got == rows:
                    break
                rows = got
            if not rows:
                self.end_turn()
            return model(input_ids, past_key_values=self, use_cache=True, **kwargs)
        finally:
            self._hold = False
            for handle in handles:
                handle.remove()

    def end_turn(self):
        """The answer is complete: recalled rows are not seen any more."""
        for layer in self.layers:
            layer.forget_recalled()

    def shared_mask(self, n, total):
        """The causal mask of layers in which every head holds the same number of rows; made once a step."""
        if self._mask[0] != (n, total):
            self._mask = ((n, total), attention._causal(n, total, self._memory.device))
        return self._mask[1]

    # ---- looking ---------------------------------------------------------------------

    def info(self):
        d = self.seq.info()
        d["device_resident_bytes"] = self.region.resident()
        return d

    def positions(self, layer, head):
        """Positions of the rows in that lane, in slot order."""
        return self.seq.resident(layer * self.model.heads + head)

    def close(self):
        self.layers.clear()
        self._memory = None
        self.seq.close()
        self.region.close()


__all__ = ["KvtierCache", "KvtierLayer", "budget"]
