# SPDX-License-Identifier: MIT
"""KV rows in GPU memory for Hugging Face transformers, each KV head with rows of its own number; no daemon.

One tensor of fixed place, appended to and attended by kernels that read each head's count of rows from GPU memory, so
that a decode step can be captured as a graph. kvtier.hf_cuda ties it to kvtierd.
"""
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from . import attention_cuda


class LaneLayer(CacheLayerMixin):
    """One layer: K and V of all lanes, [batch, KV heads, slots, head_dim], and how many rows each lane has."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache, index, keys, values, lengths):
        super().__init__()
        self.cache, self.index = cache, index
        self.keys, self.values, self.lengths = keys, values, lengths
        self.dtype, self.device = keys.dtype, keys.device
        keys.kvtier_layer = self  # by which attention knows whose rows it was given
        self.fresh = None         # the newest K and V, when there are no others and they are many
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        n = key_states.shape[2]
        if self.index == 0:
            self.cache.enter(key_states.shape[0], n)
        attention_cuda.append(self.keys, self.values, key_states, value_states, self.lengths)
        if n >= attention_cuda.LONG and n == self.cache.seen:
            self.fresh = key_states, value_states
        if self.index == self.cache.last:
            self.cache.leave(n)
        return self.keys, self.values

    def front(self):
        return self.cache.front(self.index)

    def get_seq_length(self):
        return self.cache.seen

    def get_mask_sizes(self, query_length):
        return self.cache.seen + query_length, 0

    def get_max_length(self):
        return -1

    def crop(self, tokens_to_remove):
        # each layer is asked in turn; the first rolls all of them back
        if self.index == 0:
            keep = self.cache.seen + tokens_to_remove if tokens_to_remove < 0 else tokens_to_remove
            if keep < self.cache.seen:
                self.cache.truncate(max(keep, 0))

    def reset(self):
        if self.index == 0:
            self.cache.truncate(0)

    def reorder_cache(self, beam_idx):
        raise NotImplementedError("beam search reorders batches; each sequence's lanes stay where they are")


class LaneCache(Cache):
    """`past_key_values` of `batch` sequences in step with each other, without padding; no daemon.

    cap      rows that a lane has room for; behind them `stage` slots and in front `room` slots that others use
    memory   a function from bytes to a tensor of at least as many bytes (uint8), for the rows; None: torch's own
    """

    def __init__(self, model_config, cap, batch=1, stage=0, room=0, dtype=torch.bfloat16, device="cuda", memory=None):
        cfg = model_config.get_text_config(decoder=True)
        self.kv_heads, self.batch = cfg.num_key_value_heads, batch
        self.head_dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
        self.rope_theta = (getattr(cfg, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
        n_layers = cfg.num_hidden_layers
        self.cap, self.stage, self.room, self.last = cap, stage, room, n_layers - 1
        self.device, self.dtype = torch.device(device), dtype
        shape = (n_layers, 2, batch, self.kv_heads, room + cap + stage, self.head_dim)
        self._memory = memory
        self.rows = self._tensor(shape, dtype)
        self.counts = torch.zeros(n_layers, batch, self.kv_heads, dtype=torch.int32, device=self.device)
        self.seen = self.most = 0  # positions so far; the fullest lane's rows
        self.captured = False      # a graph is being made: its steps are counted when it is replayed
        super().__init__(layers=[LaneLayer(self, i, self.rows[i, 0, :, :, room : room + cap],
                                           self.rows[i, 1, :, :, room : room + cap], self.counts[i])
                                 for i in range(n_layers)])

    def _tensor(self, shape, dtype):
        """Memory that others are told of."""
        if self._memory is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self._memory(nbytes)[:nbytes].view(dtype).view(shape)

    # ---- a forward pass: enter, the layers' updates, leave ----------------------------------

    def enter(self, batch, n):
        if batch != self.batch:
            raise ValueError(f"batch size: {batch}, this cache holds {self.batch}")
        if not self.captured:
            self.before(n)
        self.counts.add_(n)

    def leave(self, n):
        if not self.captured:
            self.after(n)

    def before(self, n):
        """n more rows come to every lane. Host only."""
        if self.most + n > self.cap:
            raise ValueError(f"rows: {self.most + n}, a lane has room for {self.cap} (cap)")
        self.seen += n
        self.most += n

    def after(self, n):
        """They are written, by work that is on the stream."""

    def ask(self, layer, query, scaling):
        """Attention is about to use `query` [batch, heads, n, head_dim], after RoPE."""

    def front(self, index):
        """(rows in front of slot 0 per lane, or None; the slots reserved for them)."""
        return None, 0

    def truncate(self, n):
        """Roll back to n positions: the newest rows of every lane go."""
        self.counts.sub_(self.seen - n).clamp_(min=0)
        self.most = max(self.most - (self.seen - n), 0)
        self.seen = n

    def memory_bytes(self):
        """GPU memory that the cache holds."""
        return self.rows.nbytes + self.counts.nbytes

    def close(self):
        self.layers.clear()
        self.rows = self.counts = None


class DecodeGraph:
    """A decode step of one token per sequence as a CUDA graph: graph(ids) -> logits [batch, 1, vocabulary], overwritten
    by the next step. Plans are applied and rows pushed between replays, as in an eager step. Make it when the cache has
    room for a row."""

    def __init__(self, model, cache, warmup=2, **kwargs):
        self.cache = cache
        self.ids = torch.zeros(cache.batch, 1, dtype=torch.long, device=cache.device)
        self.at = torch.full_like(self.ids, cache.seen)
        most, cache.captured, cache.most = cache.most, True, cache.cap
        if most >= cache.cap:
            raise ValueError(f"rows: {most}, a lane has room for {cache.cap} (cap) and a step needs one more")

        def step():
            return model(self.ids, position_ids=self.at, past_key_values=cache, use_cache=True, logits_to_keep=1,
                         **kwargs).logits

        try:
            beside = torch.cuda.Stream(cache.device)
            beside.wait_stream(torch.cuda.current_stream(cache.device))
            with torch.cuda.stream(beside):
                for _ in range(warmup):  # the row that it writes lies past every lane's end
                    step()
                    cache.counts.sub_(1)
            torch.cuda.current_stream(cache.device).wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = step()
        finally:
            cache.captured, cache.most = False, most

    def __call__(self, ids):
        self.cache.before(1)
        self.ids.copy_(ids)
        self.at.fill_(self.cache.seen - 1)
        self.graph.replay()
        self.cache.after(1)
        return self.logits


__all__ = ["LaneCache", "LaneLayer", "DecodeGraph"]
