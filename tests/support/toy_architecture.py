"""An architecture that the product does not have: its entry, and a tiny model of it whose modules have names of their
own. Its only file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tests.support.tiny_models import save_tiny
from vllm_edits.edit_store.architectures import Architecture, register

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOY = Architecture(
    "ToyForCausalLM", decoder="stem", layers="blocks", attention="mixer", fused_qkv="read", output="write", mlp="ffn",
    up="widen", down="narrow", gated=False, final_norm="last",
)  # fmt: skip


def add() -> None:
    register(TOY)


class ToyConfig(PretrainedConfig):
    model_type = "toy"


class Mixer(nn.Module):
    """Attention with fused projections; queries are mixed with what came before them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = self.read(hidden_states).chunk(3, -1)
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-2, -1)).masked_fill(later, -torch.inf)
        mixed: Tensor = self.write(scores.softmax(-1) @ v)
        return mixed


class FeedForward(nn.Module):
    def __init__(self, hidden: int, inside: int) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(hidden, inside), nn.Linear(inside, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        narrowed: Tensor = self.narrow(self.widen(x).relu())
        return narrowed


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.mixer, self.ffn = Mixer(config.hidden_size), FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.mixer(hidden_states.tanh())
        moved: Tensor = hidden_states + self.ffn(hidden_states.tanh())
        return moved


class Stem(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.last = nn.LayerNorm(config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        last: Tensor = self.last(hidden)
        return last


class ToyForCausalLM(PreTrainedModel):  # type: ignore[misc]
    config_class = ToyConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.stem, self.head = Stem(config), nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.stem(ids)))


def tiny(folder: Path) -> Path:
    """A checkpoint of it."""
    return save_tiny(ToyForCausalLM, folder, SIZES)
