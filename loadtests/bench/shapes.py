"""Checkpoints of larger shapes with random weights: their speed is that of trained ones, and nothing is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtests.harness.model import made_whole

_LLAMA_3 = {
    "vocab_size": 128256, "head_dim": 64, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-1b": {**_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                 "tie_word_embeddings": True},
    "llama-8b": {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                 "head_dim": 128, "tie_word_embeddings": False},
}  # fmt: skip
"""The sizes of Llama 3.2 1B and Llama 3.1 8B."""


def ensure_shape(name: str, tokenizer: Path, folder: Path = Path(".cache/models")) -> Path:
    """The checkpoint of that shape in bfloat16, made first if it is not there, with the tokenizer of another model."""
    shape = folder / name
    if shape.is_dir():
        return shape
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name], dtype=torch.bfloat16)).to(torch.bfloat16)
    with made_whole(shape) as made:
        model.save_pretrained(made)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tokenizer / file, made / file)
    return shape
