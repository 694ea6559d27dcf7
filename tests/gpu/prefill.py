#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What a session that cannot be resumed costs: a prefill of 32,768 tokens by a model of the shape of Qwen2.5-7B with
random weights, bf16, with torch's attention; and what a resumed one costs beside its rows: a decode step with a fifth of
them in the cache, as a CUDA graph over the package's own cache. Prints {"prefill_ms", "step_ms"}.

Exit status 77, with the reason, without a GPU or without torch and transformers.
"""
import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "ipc", "python"))


def skip(why):
    print(f"1..0 # SKIP {why}")
    sys.exit(77)


try:
    import torch
    import transformers
except ImportError as e:
    skip(f"no {e.name}")
if not torch.cuda.is_available():
    skip("torch sees no GPU")

from kvtier import attention_cuda  # noqa: E402
from kvtier.hf_cuda import DecodeGraph, LaneCache  # noqa: E402

ROWS, SHARE = 32768, 5


def model(layers):
    config = transformers.Qwen2Config(hidden_size=3584, num_hidden_layers=layers, num_attention_heads=28,
                                      num_key_value_heads=4, intermediate_size=18944, vocab_size=152064,
                                      max_position_embeddings=2 * ROWS, tie_word_embeddings=False)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return transformers.Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def timed(run, times):
    out = []
    for i in range(times + 1):
        torch.cuda.synchronize()
        t = time.perf_counter()
        run()
        torch.cuda.synchronize()
        out.append((time.perf_counter() - t) * 1e3)
    return statistics.median(out[1:])  # the first one warms up


@torch.inference_mode()
def main():
    m = model(int(sys.argv[1]) if len(sys.argv) > 1 else 28)
    ids = torch.randint(0, 152064, (1, ROWS), device="cuda")

    def prefill():
        return m(ids, use_cache=True, logits_to_keep=1).past_key_values

    prefill_ms = timed(prefill, 3)
    attention_cuda.register()
    m.set_attn_implementation(attention_cuda.NAME)
    cache = LaneCache(m.config, ROWS // SHARE + 64)
    m(ids[:, : ROWS // SHARE], past_key_values=cache, use_cache=True, logits_to_keep=1)
    graph, one = DecodeGraph(m, cache), ids[:, :1]
    step_ms = timed(lambda: graph(one), 16)
    print(json.dumps({"prefill_ms": round(prefill_ms, 2), "step_ms": round(step_ms, 2)}))


main()
