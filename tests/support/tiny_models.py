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
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", _SIZES),
    "MistralForCausalLM": ("MistralConfig", {**_SIZES, "sliding_window": None}),
    "Qwen2ForCausalLM": ("Qwen2Config", _WITHOUT_HEAD_DIM),
    "Qwen3ForCausalLM": ("Qwen3Config", _SIZES),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _GEMMA),
    "Phi3ForCausalLM": ("Phi3Config", _WITHOUT_HEAD_DIM),
    "Olmo2ForCausalLM": ("Olmo2Config", _WITHOUT_HEAD_DIM),
    "GraniteForCausalLM": (
        "GraniteConfig",
        {**_WITHOUT_HEAD_DIM, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0,
         "attention_multiplier": 0.2},
    ),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512,
         "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2},
    ),
}  # fmt: skip


def make_tiny(architecture: str, folder: Path) -> Path:
    """A checkpoint of that architecture in `folder`, the same each time."""
    import torch
    import transformers

    config, sizes = _CONFIGS[architecture]
    torch.manual_seed(0)
    made = getattr(transformers, architecture)(getattr(transformers, config)(**sizes))
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
