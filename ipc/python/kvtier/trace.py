# SPDX-License-Identifier: MIT
"""Record what a Hugging Face model's attention heads see, as .kvtr files (kvtr(5)). Needs no daemon.

    with kvtier.trace.record(model, "traces", source="support", domain="chat") as rec:
        model.generate(...)
    print(rec.stats())

A sequence begins with a forward pass into an empty cache and ends where the next one begins, or the block does.
If it went on after its first pass, it gets a cut there: prompt, and the queries of what followed. Batches of one
without padding are recorded; others are counted as skipped. Rows are copied to the host and into a bounded buffer,
and written by a thread of libkvtier: a slow or full disk costs samples, never a forward pass. Leaving the block waits
for the disk, at most a minute.
"""
import contextlib
import ctypes as c
import logging
import os
import sys

from ._lib import (AGAIN, DTYPE, LOG_FN, ROPE, Error, TraceCut, TraceModel, TraceOpts, TraceSpan, TraceStats, check,
                   lib, sized)

_log = logging.getLogger("kvtier")


class Recorder:
    """A recorder of libkvtier. `on` is false when no folder is given, here or by $KVTIER_TRACE_DIR: then nothing is
    recorded and every call does nothing."""

    def __init__(self, dir=None, max_bytes=0, buffer_bytes=0, every=1, source=None, domain=""):
        self._line = LOG_FN(lambda arg, level, line: _log.warning("%s", line.decode(errors="replace")))
        o = sized(TraceOpts, dir=os.fsencode(dir) if dir else None, max_bytes=max_bytes, buffer_bytes=buffer_bytes,
                  every_n=every, source=source and source.encode(), domain=domain.encode(), log=self._line)
        self.ptr = c.c_void_p()
        self.on = check(lib.trace_open(c.byref(o), c.byref(self.ptr)), "trace_open") != AGAIN

    def begin(self, model, source=None):
        """A sequence of `model` (a TraceModel), or None when it is not to be recorded."""
        p = c.c_void_p()
        rc = check(lib.trace_begin(self.ptr, c.byref(model), source and source.encode(), c.byref(p)), "trace_begin")
        return None if rc == AGAIN else p

    def flush(self, timeout_ms=60000):
        """Wait until what was handed over is written."""
        check(lib.trace_flush(self.ptr, timeout_ms), "trace_flush")

    def stats(self):
        s = sized(TraceStats)
        check(lib.trace_stats(self.ptr, c.byref(s)), "trace_stats")
        return {n: getattr(s, n) for n, _ in TraceStats._fields_[1:-1]}

    def close(self):
        ptr, self.ptr = self.ptr, c.c_void_p()
        lib.trace_close(ptr)


def describe(config, dtype, name=None, rope=None):
    """The shape of a model as a TraceModel. rope None: as the config says; scaled kinds are recorded as "none"."""
    cfg = config.get_text_config(decoder=True)
    dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    heads = getattr(cfg, "num_key_value_heads", None) or cfg.num_attention_heads
    par = getattr(cfg, "rope_parameters", None) or {}
    if rope is None and par.get("rope_type", "default") == "default" and par.get("partial_rotary_factor", 1.0) == 1.0:
        rope = "half" if "rope_theta" in par else None
    name = name or os.path.basename(str(getattr(config, "_name_or_path", "") or "").rstrip("/")) or cfg.model_type
    return sized(TraceModel, name=name.encode()[:63], layers=cfg.num_hidden_layers, heads=heads,
                 group=cfg.num_attention_heads // heads, k_dim=dim, v_dim=dim, dtype=DTYPE[dtype], rope=ROPE[rope],
                 post_rope=1, rope_theta=par.get("rope_theta", 10000.0))


class Recording:
    """One model under record(). `source` may be set between sequences. `skipped`: passes that cannot be recorded."""

    def __init__(self, recorder, shape, dtype):
        self.recorder, self.shape, self.dtype = recorder, shape, dtype
        self.source, self.skipped, self._last = None, 0, None
        self._seq, self._rows, self._prompt = None, 0, 0
        self._start, self._n, self._live = 0, 0, False  # of the forward pass in progress

    def stats(self):
        return {**(self._last or self.recorder.stats()), "skipped": self.skipped}

    def _close(self):
        """Complete what is in progress, wait for the disk, at most a minute, and stop."""
        self._end()
        try:
            self.recorder.flush()
        except Error as e:
            _log.warning("%s", e)
        self._last = self.recorder.stats()
        self.recorder.close()

    def _end(self):
        """Hand the sequence over."""
        seq, self._seq = self._seq, None
        if seq is None:
            return
        cuts = (TraceCut * 1)(TraceCut(self._prompt, self._rows - self._prompt, 0, 0))
        try:
            check(lib.trace_end(seq, cuts, int(self._rows > self._prompt)), "trace_end")
        except Error as e:
            _log.warning("%s", e)

    def _drop(self):
        seq, self._seq = self._seq, None
        self._live = False
        self.skipped += 1
        lib.trace_discard(seq)

    def _begin_pass(self, module, args, kwargs):
        """Before a forward pass: which rows it makes, and whether they begin, go on with or leave the sequence."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        x = ids if ids is not None else kwargs.get("inputs_embeds")
        past, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        self._live = False
        if x is None:
            return
        start = int(past.get_seq_length()) if past is not None else 0
        self._start, self._n = start, x.shape[1]
        if start == 0:
            self._end()
        if x.shape[0] != 1 or (getattr(mask, "ndim", 0) == 2 and not bool((mask != 0).all())):
            self._drop()
            return
        try:
            if start == 0:
                self._seq, self._rows, self._prompt = self.recorder.begin(self.shape, self.source), 0, self._n
            elif self._seq is not None and start != self._rows:  # rolled back: what was recorded is not what was said
                self._drop()
            if self._seq is not None and ids is not None:
                flat = ids[0].to("cpu").numpy().astype("uint32")
                check(lib.trace_tokens(self._seq, start, flat.ctypes.data, self._n), "trace_tokens")
        except Error as e:
            _log.warning("%s", e)
            self._drop()
            return
        self._live = self._seq is not None

    def _end_pass(self, *unused):
        if self._live:
            self._rows += self._n
        self._live = False

    def rows(self, layer, query, key, value):
        """The attention of one layer is about to be computed: [1, heads, n or cached rows, dim] each."""
        if not self._live:
            return
        n, at = self._n, self._start
        if key.shape[2] < at + n:  # the cache evicts: new rows are the last
            at = key.shape[2] - n
        if query.shape[2] != n or at < 0:
            self._drop()
            return
        k, v, q = (self._host(x) for x in (key[0, :, at : at + n], value[0, :, at : at + n], query[0]))
        size = k.element_size()
        span = sized(TraceSpan, layer=layer, pos=self._start, n=n, k=k.data_ptr(), v=v.data_ptr(), q=q.data_ptr(),
                     k_head=k.stride(0) * size, k_row=k.stride(1) * size, v_head=v.stride(0) * size,
                     v_row=v.stride(1) * size, q_head=q.stride(0) * size, q_row=q.stride(1) * size)
        try:
            check(lib.trace_rows(self._seq, c.byref(span)), "trace_rows")
        except Error as e:
            _log.warning("%s", e)
            self._drop()

    def _host(self, x):
        x = x.detach().to("cpu", self.dtype)
        return x if x.stride(-1) == 1 else x.contiguous()


# ---- the hook: the attention functions that models look up by name, wrapped while something is recorded -----------

_layers = {}   # attention module -> (Recording, layer index)
_wrapped = {}  # name -> the function before, None for eager, which models bring along


def _wrap(name):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
    if name in _wrapped:
        return
    before = functions[name] if name in functions else None

    def recording(module, query, key, value, *args, **kwargs):
        seen = _layers.get(module)
        if seen:
            seen[0].rows(seen[1], query, key, value)
        attention = before or sys.modules[type(module).__module__].eager_attention_forward
        return attention(module, query, key, value, *args, **kwargs)

    _wrapped[name] = before
    functions[name] = recording


def _unwrap():
    """Back to what was there: a name that only the global table had is taken out of the instance's own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
    for name, before in _wrapped.items():
        del functions[name]
        if before is not None and (name not in functions or functions[name] is not before):
            functions[name] = before
    _wrapped.clear()


@contextlib.contextmanager
def record(model, dir=None, *, name=None, every=1, max_bytes=0, buffer_bytes=0, source=None, domain="", dtype=None,
           rope=None):
    """Record the sequences that `model` computes inside the block. Yields a Recording.

    dir           an existing folder; None: $KVTIER_TRACE_DIR, and without that nothing is recorded
    name          of the model in the files; None: from its config
    every         record one of so many sequences, any of them
    max_bytes     that all files in dir may have together, then the recording ends (0: 4 GiB)
    buffer_bytes  host memory for rows not yet written (0: 512 MiB)
    source        document or service that the text comes from; domain: "chat", "code", ...
    dtype         "float32", "float16" or "bfloat16" in the files; None: as the model computes
    rope          "half" or "interleaved"; None: from the config
    """
    import torch
    dtype = dtype or str(model.dtype).removeprefix("torch.")
    recorder = Recorder(dir, max_bytes, buffer_bytes, every, source, domain)
    rec = Recording(recorder, describe(model.config, dtype, name, rope), getattr(torch, dtype))
    mine = {m: (rec, m.layer_idx) for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)}
    if any(m in _layers for m in mine):
        recorder.close()
        raise ValueError("model: it is being recorded already")
    hooks = []
    try:
        if recorder.on:
            _layers.update(mine)
            hooks.append(model.register_forward_pre_hook(rec._begin_pass, with_kwargs=True))
            hooks.append(model.register_forward_hook(rec._end_pass))
            _wrap(model.config.get_text_config(decoder=True)._attn_implementation)
        yield rec
    finally:
        for h in hooks:
            h.remove()
        if recorder.on:
            for m in mine:
                _layers.pop(m, None)
        if not _layers:
            _unwrap()
        rec._close()
