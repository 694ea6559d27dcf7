# SPDX-License-Identifier: MIT
"""A Hugging Face cache whose rows lie in GPU memory and are tiered by kvtierd, each KV head keeping its own.

    attention_cuda.register()
    model = AutoModelForCausalLM.from_pretrained(..., dtype=torch.bfloat16, attn_implementation="kvtier_cuda").cuda()
    cache = KvtierCudaCache(model.config, client, max_rows=32768, cap=4096, budget=budget(3300, dram=32768))
    model.generate(ids, past_key_values=cache)

The memory is LaneCache's (kvtier.lanes). Every so many rows they are scored and the daemon is told (push), between
steps plans are looked for (poll: one call of the library), and one that is READY is applied. Nothing waits for the GPU
or for the daemon unless its comment says so. DecodeGraph makes a CUDA graph of a decode step.
"""
import ctypes
import time

import torch

from ._lib import PLAN_NONE, PLAN_READY, Error
from .client import Model, budget
from .cuda import CudaLayer, CudaSequence, Gpu, RecallOpts, Scorer, Window
from .hf import _DTYPES, _GONE, within
from .lanes import DecodeGraph, LaneCache

AT_ONCE = 8  # sequences looked at in one step, and an eighth of larger batches: what a step pays stays small


class KvtierCudaCache(LaneCache):
    """`past_key_values` of one sequence of kvtierd, or of `batch` of them in step.

    max_rows     positions that a sequence may reach
    cap          rows that a lane has room for; None: max_rows. Give it the budget, its slack and `push_every`
                 more: a pass that would overflow it waits for the plan that makes room
    stage        slots behind them for rows that come back; the more, the more rows one plan can bring
    budget       a kvtier.budget(), or None for the daemon's default
    push_every   rows after which scoring is launched and the daemon told, in the pass that reaches them
    scorer       a Scorer, None for the one of the budget's policy (if it needs one), False for none
    gpu, window, model   shared ones; None: its own
    side         kvtier's kernels on a stream of their own, beside the model's; False: on the model's
    auto         look for plans and apply them when a pass begins
    recall_rows  rows per head that a question may bring back for its turn, on the GPU, from published DRAM; part of the
                 device budget. They stay until the next question or end_turn()
    recall_min   passes of at least so many tokens are questions
    recall_args  more for RecallOpts: probe, flags, before, after
    seq_args     as for Sequence: key, secret (batch 1), leased, ttl_s, equal_lanes, resume; out_bytes, in_bytes, direct
    """

    def __init__(self, model_config, client, max_rows, cap=None, batch=1, stage=256, name="model", model=None,
                 dtype=torch.bfloat16, device="cuda", memory=None, budget=None, push_every=256, scorer=None, gpu=None,
                 window=None, side=True, auto=True, recall_rows=0, recall_min=2, recall_args=None, **seq_args):
        super().__init__(model_config, min(cap or max_rows, max_rows), batch, stage, recall_rows, dtype, device, memory)
        if batch > 1 and (seq_args.get("key") or seq_args.get("resume")):
            raise ValueError(f"batch: {batch}, a key names one sequence")
        self.client, self.push_every, self.auto = client, push_every, auto
        self.detached = False  # the daemon went away: the rows held stay usable, tiering has ended
        self.recall_min, self.recall_args = recall_min, recall_args or {}
        self._asked = False    # recalls were launched and not looked at since
        self.turn = False      # there may be recalled rows: fronts [layers, batch, KV heads] says how many in each
        if recall_rows:        # lane, recalled_at [layers, batch, KV heads, room] of which positions
            self.fronts = self._tensor(self.counts.shape, torch.int32).zero_()
            self.recalled_at = self._tensor((*self.counts.shape, recall_rows), torch.int32).zero_()
        cuda = self.device.type == "cuda"
        self.side = torch.cuda.Stream(self.device) if cuda and side else None
        self.gpu = gpu or Gpu(self.device.index or 0)
        self._own = [] if gpu else [self.gpu]
        n_layers = len(self.layers)
        self.model = model or Model(client, name, n_layers, self.kv_heads, self.head_dim, _DTYPES[dtype],
                                    rope_theta=self.rope_theta)
        self.scorer = self._scorer(client, budget) if scorer is None else scorer or None
        if scorer is None and self.scorer:
            self._own.append(self.scorer)
        rings = {k: seq_args.get(k, 0) for k in ("out_bytes", "in_bytes")}
        coefs = self.scorer.coefs if self.scorer else 1
        self.window = window or Window(client, self.gpu,
                                       batch * Window.needed(self.model, max_rows, coefs, **rings))
        if not window:
            self._own.append(self.window)
        if recall_rows:
            seq_args["direct"] = True
        self.seqs = [CudaSequence(client, self.model, self.window, self._places(b), self.cap, stage, max_rows,
                                  scorer=self.scorer, budget=within(budget, recall_rows), **seq_args)
                     for b in range(batch)]
        self.seq = self.seqs[0]
        self._pinned = cuda
        self._manual = bool(budget and budget.manual)
        self._told = 0                  # rows that the library knows of
        self._lag = [0] * batch         # of each sequence: its fullest lane's rows, less self.seen
        self._applied = [0] * batch     # id of the last plan
        self._next = 0                  # sequence to look at first
        self._due = [self._after(0, b) for b in range(batch)]
        if seq_args.get("resume"):
            self.seen = self._told = self.seq.rows
            self._recount()

    def _scorer(self, client, b):
        policy = b.policy.decode() if b is not None and b.policy else None
        try:
            return Scorer(client, self.gpu, self.model, policy)
        except Error as e:
            if e.code != -2009:  # KVT_E_NOENT: a policy without a network
                raise
            return None

    def _places(self, b):
        table = (CudaLayer * len(self.layers))()
        for i, place in enumerate(table):
            k, v = self.layers[i].keys[b], self.layers[i].values[b]
            place.k, place.v = k.data_ptr(), v.data_ptr()
            place.k_head_stride = place.v_head_stride = k.stride(0) * k.element_size()
            place.k_row_stride = place.v_row_stride = k.stride(1) * k.element_size()
        return table

    # ---- streams ------------------------------------------------------------------------------

    def _stream(self):
        """The handle that kvtier's kernels go to."""
        if self.side is not None:
            return self.side.cuda_stream
        return torch.cuda.current_stream(self.device).cuda_stream if self._pinned else 0

    def _follow(self):
        """What kvtier launches from now on comes after what the model has launched."""
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.device))

    def _lead(self):
        """What the model launches from now on comes after what kvtier has launched. Returns the model's stream."""
        if not self._pinned:
            return 0
        main = torch.cuda.current_stream(self.device)
        if self.side is not None:
            main.wait_stream(self.side)
        return main.cuda_stream

    # ---- what a pass does ------------------------------------------------------------------------

    def before(self, n):
        if self.auto:
            self.poll()
        if self.most + n > self.cap:
            self._make_room(n)
        if self.room and n >= self.recall_min:
            self._question()
        super().before(n)

    def after(self, n):
        if self.detached:
            return
        for b, due in enumerate(self._due):
            if self.seen >= due:
                self.push(b)

    def _after(self, rows, b):
        """When sequence b is pushed next: sequences of a batch take turns."""
        every = self.push_every
        late = b * every // self.batch
        return (max(rows - late, 0) // every + 1) * every + late

    def push(self, b=None):
        """Have sequence b (None: all) scored and told of, as far as its rows have come."""
        self._try(self.client.process)  # sees the daemon's end
        self._tell()
        self._follow()
        for i in range(self.batch) if b is None else (b,):
            self._try(self.seqs[i].push, self._stream())
            self._due[i] = self._after(self.seen, i)

    def _tell(self):
        if self._told < self.seen:
            for seq in self.seqs:
                self._try(seq.append, self._told, self.seen - self._told)
            self._told = self.seen

    def _try(self, call, *args):
        """A dead daemon ends tiering, not generation; anything else is the caller's to see."""
        if self.detached:
            return None
        try:
            return call(*args)
        except Error as e:
            if e.code not in _GONE:
                raise
            self.detached = True
            return None

    # ---- plans -------------------------------------------------------------------------------------

    def poll(self, everyone=False):
        """Between passes: launch what plans need, apply those that are READY. Returns how many were."""
        applied, stream = 0, self._stream()
        count = self.batch if everyone else min(self.batch, max(AT_ONCE, self.batch // 8))
        for _ in range(count):
            b = self._next
            self._next = (b + 1) % self.batch
            if self._try(self.seqs[b].poll, stream) == PLAN_READY:
                applied += self._apply(b)
        return applied

    def _apply(self, b):
        """Carry out the newest plan, once. Returns whether it did."""
        state = self._try(self.seqs[b].state, self._stream())
        if state is None or state.state != PLAN_READY or state.plan == self._applied[b]:
            return False
        self._tell()
        counts = self._try(self.seqs[b].apply, state.plan, self._lead())
        self._follow()
        if counts is None:
            return False
        self._applied[b] = state.plan
        self._count(b, counts)
        self._hide_promoted(b)
        return True

    def _count(self, b, counts):
        """The library's counts of sequence b, to the kernels and to us."""
        host = torch.empty(len(self.layers), self.kv_heads, dtype=torch.int32, pin_memory=self._pinned)
        ctypes.memmove(host.data_ptr(), counts, host.nbytes)
        self.counts[:, b].copy_(host, non_blocking=True)
        self._lag[b] = int(host.max()) - self.seen
        self.most = self.seen + max(self._lag)

    def _recount(self):
        for b, seq in enumerate(self.seqs):
            self._count(b, seq.counts())

    def _make_room(self, n, timeout_s=30):
        """A lane would overflow: wait for the plan that was or will be decided."""
        end = time.monotonic() + timeout_s
        self.push()
        while self.most + n > self.cap and not self.detached and time.monotonic() < end:
            states = [seq.state(self._stream()) for seq in self.seqs]
            if not sum(self._apply(b) for b, s in enumerate(states) if s.state == PLAN_READY):
                if self._manual and all(s.state == PLAN_NONE and s.pushed == s.rows and not s.busy for s in states):
                    break  # none will come by itself
                time.sleep(0.0002)

    def _reach(self, idents, timeout_ms):
        """Apply plans until each sequence has one that reflects its request. Returns their states."""
        end, got = time.monotonic() + timeout_ms / 1000, {}
        while len(got) < self.batch:
            for b, ident in enumerate(idents):
                if b in got:
                    continue
                state = self.seqs[b].state(self._stream())
                if state.state == PLAN_READY and self._apply(b) and state.plan >= ident:
                    got[b] = state
            if time.monotonic() > end:
                raise TimeoutError(f"plan: not ready within {timeout_ms} ms")
            time.sleep(0.0001)
        self.settle(timeout_ms=timeout_ms)
        return [got[b] for b in range(self.batch)]

    def _known(self, timeout_ms):
        """Wait until the daemon knows of every row."""
        self.push()
        end = time.monotonic() + timeout_ms / 1000
        for seq in self.seqs:
            while (state := seq.state(self._stream())).pushed < state.rows:
                if time.monotonic() > end:
                    raise TimeoutError(f"push: {state.pushed} of {state.rows} rows within {timeout_ms} ms")

    def compress(self, b=None, timeout_ms=60000):
        """Ask for plans (under budget b), wait until they are READY, apply them. Waits."""
        self._known(timeout_ms)
        self._manual = bool(b.manual) if b else self._manual
        return self._reach([seq.request(within(b, self.room)) for seq in self.seqs], timeout_ms)

    def recall_rows(self, pos, n, timeout_ms=60000):
        """Bring rows [pos, pos + n) back within the budget, by plans. Not the recall of queries. Waits."""
        self._known(timeout_ms)
        return self._reach([seq.fetch(pos, n) for seq in self.seqs], timeout_ms)

    def settle(self, save=False, timeout_ms=60000):
        """Until everything decided is carried out and at rest; save: and all rows are stored below. Waits."""
        self.push()
        for seq in self.seqs:
            self._try(seq.settle, save, timeout_ms, self._stream())
        self._lead()
        self._recount()

    def truncate(self, n):
        """Roll back to n positions."""
        self._tell()
        for seq in self.seqs:
            seq.truncate(n)
        self._lead()
        self.seen = self._told = n
        self._recount()
        self._due = [self._after(n, b) for b in range(self.batch)]
        if self.turn:
            self._hide(self.recalled_at < n)

    # ---- recall ---------------------------------------------------------------------------------------

    def _question(self):
        """A new turn's queries are about to ask: make what lies below searchable."""
        self.end_turn()
        if self.detached or self.most >= self.seen:
            return
        stream = self._lead()
        for seq in self.seqs:
            self._try(seq.recall_prepare, stream)
        self.turn = True

    def ask(self, layer, query, scaling):
        n = query.shape[2]
        if not self.turn or n < self.recall_min or self.detached:
            return
        if query.stride(3) != 1:
            query = query.contiguous()
        size, i = query.element_size(), layer.index
        stream = torch.cuda.current_stream(self.device).cuda_stream if self._pinned else 0
        for b, seq in enumerate(self.seqs):
            k, v = (self.rows[i, plane, b, :, : self.room] for plane in (0, 1))
            o = RecallOpts(group=query.shape[1] // self.kv_heads, rows=self.room, scale=scaling or 0.0,
                           queries=query[b].data_ptr(), token_stride=query.stride(2) * size,
                           head_stride=query.stride(1) * size, k=k.data_ptr(), v=v.data_ptr(),
                           k_head_stride=k.stride(0) * size, v_head_stride=v.stride(0) * size,
                           k_row_stride=k.stride(1) * size, v_row_stride=v.stride(1) * size,
                           counts=self.fronts[i, b].data_ptr(), positions=self.recalled_at[i, b].data_ptr(),
                           **self.recall_args)
            o.size = ctypes.sizeof(o)
            self._try(seq.recall, i, n, o, stream)
        self._asked = True

    def front(self, index):
        if self.turn or self.captured and self.room:
            return self.fronts[index], self.room
        return None, 0

    def recalled_stood_still(self):
        """Once the GPU has done the question's pass: False when the daemon moved pages meanwhile, so that the pass has
        to be taken back (truncate) and run again. Waits for the stream."""
        if not self._asked or self.detached:
            return True
        self._asked = False
        if self._pinned:
            torch.cuda.current_stream(self.device).synchronize()
        return all([self._try(seq.recall_check) is not False for seq in self.seqs])

    def question(self, model, input_ids, tries=4, **kwargs):
        """Run a question, again when what it recalled was moved meanwhile. Returns the model's output. Waits."""
        start = self.seen
        for left in reversed(range(tries)):
            out = model(input_ids, past_key_values=self, use_cache=True, **kwargs)
            if self.recalled_stood_still():
                return out
            self.truncate(start)
            if not left:
                break
        raise TimeoutError(f"recall: pages moved under {tries} tries in a row")

    def end_turn(self):
        """The answer is complete: recalled rows are not seen any more."""
        if self.turn:
            self.turn = False
            self.fronts.zero_()

    def _hide_promoted(self, b):
        """Recalled rows that a plan brought to the device are not to be seen twice."""
        if not self.turn:
            return
        at = self.slots(b)
        there = torch.arange(at.shape[-1], device=self.device) < self.counts[:, b, :, None]
        resident = torch.zeros(*at.shape[:2], self.seen + 1, dtype=torch.bool, device=self.device)
        resident.scatter_(2, torch.where(there, at, self.seen).long().clamp_(max=self.seen), True)
        keep = torch.ones_like(self.recalled_at, dtype=torch.bool)
        keep[:, b] = ~resident.gather(2, self.recalled_at[:, b].long().clamp_(max=self.seen))
        self._hide(keep)

    def _hide(self, keep):
        """Of the recalled rows only those of `keep` [layers, batch, KV heads, room] stay; they move up."""
        keep = keep & (torch.arange(self.room, device=self.device) < self.fronts[..., None])
        order = torch.argsort(~keep, dim=-1, stable=True)
        room = self.rows[:, :, :, :, : self.room]
        index = order[:, None, ..., None].expand(room.shape)
        room.copy_(room.gather(4, index))
        self.recalled_at.copy_(self.recalled_at.gather(3, order))
        self.fronts.copy_(keep.sum(-1))

    # ---- looking -----------------------------------------------------------------------------------------

    def info(self, b=0):
        d = self.seqs[b].info()
        d["device_resident_bytes"] = self.memory_bytes() // self.batch
        return d

    def slots(self, b=0):
        """Positions of the rows in each slot, of pushed rows: int32 [layers, KV heads, slots], a view."""
        addr, stride = self.seqs[b].map()
        n = self.model.lanes * stride
        if self.device.type == "cuda":
            flat = torch.as_tensor(_Words(addr, n), device=self.device)
        else:
            flat = torch.frombuffer((ctypes.c_int32 * n).from_address(addr), dtype=torch.int32)
        return flat.view(len(self.layers), self.kv_heads, stride)

    def positions(self, layer, head, b=0):
        """Positions of the rows in that lane, ascending."""
        self._tell()
        return self.seqs[b].resident(layer * self.kv_heads + head)

    def close(self):
        if self._pinned:
            torch.cuda.synchronize(self.device)
        for part in self.seqs + self._own[::-1]:
            part.close()
        super().close()


class _Words:
    """int32 words in GPU memory, for torch.as_tensor."""

    def __init__(self, addr, n):
        self.__cuda_array_interface__ = {"shape": (n,), "typestr": "<i4", "data": (addr, False), "version": 3}


__all__ = ["LaneCache", "KvtierCudaCache", "DecodeGraph", "budget"]
