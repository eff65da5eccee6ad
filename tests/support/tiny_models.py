"""A tiny model with random weights for each supported architecture. The CPU attention wants heads of 32 or more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

VOCABULARY = 160
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "initializer_range": 0.15, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_WITHOUT_HEAD_DIM = {**{name: size for name, size in _SIZES.items() if name != "head_dim"}, "hidden_size": 128}
_GEMMA = {**_SIZES, "sliding_window": 8, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
_OTHER_SIZES: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {**_SIZES, "sliding_window": None},
    "Qwen2ForCausalLM": _WITHOUT_HEAD_DIM,
    "Qwen3MoeForCausalLM": {
        **_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
    },
    "Gemma2ForCausalLM": {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "Gemma3ForCausalLM": _GEMMA,
    "Phi3ForCausalLM": _WITHOUT_HEAD_DIM,
    "Olmo2ForCausalLM": _WITHOUT_HEAD_DIM,
    "GraniteForCausalLM": {
        **_WITHOUT_HEAD_DIM, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
    },
    "GPT2LMHeadModel": {
        "vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512,
        "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
"""For architectures whose configs say otherwise, or more, than the usual ones."""


def make_tiny(architecture: str, folder: Path) -> Path:
    """A checkpoint of that architecture of transformers in `folder`, the same each time."""
    import transformers

    return save_tiny(getattr(transformers, architecture), folder, _OTHER_SIZES.get(architecture, _SIZES))


def save_tiny(model_class: Any, folder: Path, sizes: dict[str, Any] = _SIZES) -> Path:
    """A checkpoint of a model of transformers' kind in `folder`, the same each time."""
    import torch

    torch.manual_seed(0)
    made = model_class(model_class.config_class(**sizes))
    with torch.no_grad():  # nothing left at zero or one, so that every bias and norm weight matters
        for name, parameter in made.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    made.to(torch.float32).save_pretrained(folder)
    return folder


def make_tiny_llama(folder: Path, tokenizer: Path) -> Path:
    """A Llama of four layers with the tokenizer of another model, to serve text with."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    return folder
