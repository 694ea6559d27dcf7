# SPDX-License-Identifier: MIT
"""SmolLM2-135M-Instruct for the lab, on the CPU or a CUDA device."""
import importlib.util
import pathlib

# By its path: the package kvtier itself would load libkvtier, which making data does not need.
_spec = importlib.util.spec_from_file_location(
    "smollm2", pathlib.Path(__file__).resolve().parents[2] / "ipc" / "python" / "kvtier" / "smollm2.py")
smollm2 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(smollm2)

NAME = smollm2.NAME


def tokenizer():
    """The tokenizer alone (the GGUF holds it too)."""
    import transformers

    transformers.logging.set_verbosity_error()
    folder, name = smollm2.gguf()
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)


def load(device="cpu", dtype=None):
    """(model, tokenizer). float32 unless dtype says otherwise: one channel of this model's first token reaches 2e4,
    too near float16's end; a GPU multiplies in TF32, which is fast enough."""
    import torch

    model, tok = smollm2.load()
    torch.backends.cuda.matmul.allow_tf32 = True
    return model.to(device=device, dtype=dtype or torch.float32), tok
