# SPDX-License-Identifier: MIT
"""A Hugging Face `Cache` whose rows live in a kvtier region.

Every layer's K and V are views of one shared region, [heads, slots, head_dim]. Plans are carried out
between forward passes: each KV head keeps its own tokens, all heads the same number of them (stock
attention needs that), and the pages of evicted rows go back to the kernel. RoPE is already in the keys, so
a kept row keeps its position; masks are built from the number of slots, positions from the number seen.
"""
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ._lib import PLAN_READY, Error
from .client import Model, Region, Sequence, budget

_BUSY = -2017  # KVT_E_BUSY: an earlier plan is READY and must be applied first
_GONE = (-2003, -2004, -2006)  # KVT_E_DAEMON, KVT_E_TIMEOUT, KVT_E_STALE
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class KvtierLayer(CacheLayerMixin):
    """One layer: views of the region and nothing of its own."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache, index, keys, values):
        super().__init__()
        self.cache, self.index = cache, index
        self.k_slots, self.v_slots = keys, values  # [heads, cap + stage, head_dim]
        self.dtype, self.device = keys.dtype, keys.device
        self.slots = 0  # rows now in the device tier, per head
        self.seen = 0   # rows ever appended and not rolled back: the logical length
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        pass

    @property
    def keys(self):
        return self.k_slots[None, :, : self.slots]

    @keys.setter
    def keys(self, value):
        if value is not None:
            raise AttributeError("a kvtier layer's keys live in its region and cannot be replaced")

    @property
    def values(self):
        return self.v_slots[None, :, : self.slots]

    @values.setter
    def values(self, value):
        if value is not None:
            raise AttributeError("a kvtier layer's values live in its region and cannot be replaced")

    def update(self, key_states, value_states, *args, **kwargs):
        batch, _, n, _ = key_states.shape
        if batch != 1:
            raise ValueError(f"batch size: {batch}, a kvtier sequence holds 1")
        if self.slots + n > self.cache.cap:
            raise ValueError(f"rows: {self.slots + n}, the region holds {self.cache.cap} (max_rows)")
        self.k_slots[:, self.slots : self.slots + n] = key_states[0]
        self.v_slots[:, self.slots : self.slots + n] = value_states[0]
        self.slots += n
        self.seen += n
        self.cache.layer_done(self.index, n)
        return self.keys, self.values

    def get_seq_length(self):
        return self.seen

    def get_mask_sizes(self, query_length):
        return self.slots + query_length, self.seen - self.slots

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
    """

    def __init__(self, model_config, client, max_rows, name="model", model=None, dtype=torch.float32, budget=None,
                 auto=True, **seq_args):
        cfg = model_config.get_text_config(decoder=True)
        head_dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
        self.client, self.cap, self.auto = client, max_rows, auto
        rope = getattr(cfg, "rope_parameters", None) or {}
        self.model = model or Model(client, name, cfg.num_hidden_layers, cfg.num_key_value_heads, head_dim,
                                    _DTYPES[dtype], rope_theta=rope.get("rope_theta", 10000.0))
        layouts, nbytes = self.model.layout(max_rows, max_rows)
        self.region = Region(client, nbytes)
        self.seq = Sequence(client, self.model, self.region, layouts, max_rows, budget=budget, **seq_args)
        flat = torch.frombuffer(self.region.buffer(), dtype=dtype)
        self._memory = flat
        layers = []
        for i, lay in enumerate(layouts):
            k, v = (self._plane(flat, off, hs, rs, lay.cap + lay.stage, head_dim)
                    for off, hs, rs in ((lay.k_off, lay.k_head_stride, lay.k_row_stride),
                                        (lay.v_off, lay.v_head_stride, lay.v_row_stride)))
            layers.append(KvtierLayer(self, i, k, v))
        super().__init__(layers=layers)
        self.detached = False  # the daemon went away: the rows held stay usable, tiering has ended
        if seq_args.get("resume"):
            for layer in self.layers:
                layer.seen = self.seq.rows

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

    def _count(self):
        """Slots per layer as the library counts them; all lanes are equal by the plan's promise."""
        n = len(self.seq.resident(0))
        for layer in self.layers:
            layer.slots = n

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
        return self._reach(self.seq.request(b), timeout_ms)

    def recall_rows(self, pos, n, timeout_ms=60000):
        """Bring rows [pos, pos + n) back within the budget."""
        return self._reach(self.seq.fetch(pos, n), timeout_ms)

    def truncate(self, n):
        """Roll back to n rows. Rows of the prefix that some heads keep and others do not are levelled by a plan."""
        self.seq.truncate(n)
        counts = {len(self.seq.resident(lane)) for lane in range(self.model.lanes)}
        if len(counts) > 1:
            self._reach(self.seq.request())
        for layer in self.layers:
            layer.seen = n
        self._count()

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
