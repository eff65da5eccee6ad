"""Factors of vectors, in slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_edits.edit_store.edits import EditsWithNumbers
from vllm_edits.edit_store.kinds.scale import Scale
from vllm_edits.plugin.graph.carried import Carried
from vllm_edits.plugin.graph.kinds import register
from vllm_edits.plugin.graph.slot_rows import Layout
from vllm_edits.plugin.graph.slot_tensors import Shape, SlotTensors
from vllm_edits.plugin.graph.stage import Stage
from vllm_edits.plugin.graph.step import Step


class Factors(Stage):
    """Multiplies factors, also of several scopes. The first of a site reads the vector as it is, which saves a sum."""

    def _with_groups(self, value: Tensor, added: Tensor, slots: Tensor, step: Step, carried: Carried) -> Tensor:
        del carried
        for number, group in enumerate(self.groups):
            here = value if self.first and number == 0 else value + added
            added = added + group(here, slots, step)
        return added


class ScaleSlots(SlotTensors):
    """change: [S, writes] = factor - 1, in float32."""

    stage = Factors

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__(shape, layout)
        self._keep("change", shape.writes, dtype=torch.float32)

    def _added(self, x: Tensor, slots: Tensor, token_scale: Tensor | None) -> Tensor:
        return scale(x, self.tensor("change"), slots)

    def _values(self, numbers: EditsWithNumbers) -> dict[str, Any]:
        factor = torch.ones(self._shape.writes.whole, dtype=torch.float64)
        for _, fields in numbers:
            each = torch.as_tensor(fields["factor"], dtype=torch.float64)
            factor *= each.repeat_interleave(len(factor) // len(each))
        return {"change": (factor - 1).float()}


def scale(x: Tensor, change: Tensor, slots: Tensor) -> Tensor:
    """x[t] * change[s], change = factor - 1.   x: [T, O], change: [S, O]"""
    return x * change[slots]


register(Scale, ScaleSlots)
