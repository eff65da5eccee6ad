"""A kind that the product does not have, in slots. The last of its three files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.toy_kind.store import Clamp
from vllm_edits.edit_store.edits import EditsWithNumbers
from vllm_edits.plugin.graph.kinds import register
from vllm_edits.plugin.graph.slot_rows import Layout
from vllm_edits.plugin.graph.slot_tensors import Shape, SlotTensors


class ClampSlots(SlotTensors):
    """bound: [S] in float32; 0 is none."""

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__(shape, layout)
        self._keep("bound", dtype=torch.float32)

    def _added(self, x: Tensor, slots: Tensor, token_scale: Tensor | None) -> Tensor:
        bound = self.tensor("bound")[slots].unsqueeze(-1)
        return torch.where(bound > 0, x.clamp(-bound, bound) - x, 0.0)

    def _values(self, numbers: EditsWithNumbers) -> dict[str, Any]:
        return {"bound": min(float(fields["bound"][0]) for _, fields in numbers)}


def add() -> None:
    register(Clamp, ClampSlots)
