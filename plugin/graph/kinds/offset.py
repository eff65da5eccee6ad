"""Offsets, in slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_edits.edit_store.edits import EditsWithNumbers
from vllm_edits.edit_store.kinds.offset import Offset
from vllm_edits.plugin.graph.carried import Carried
from vllm_edits.plugin.graph.kinds import register
from vllm_edits.plugin.graph.slot_rows import Layout
from vllm_edits.plugin.graph.slot_tensors import Shape, SlotTensors
from vllm_edits.plugin.graph.stage import Stage
from vllm_edits.plugin.graph.step import Step
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, identity


class Moves(Stage):
    """Adds vectors, and restores the norm once, after all of them."""

    def _with_groups(self, value: Tensor, added: Tensor, slots: Tensor, step: Step, carried: Carried) -> Tensor:
        del carried
        before = value + added
        moved, keeps = torch.zeros_like(before), None
        group: Any
        for group in self.groups:
            moved = moved + group(before, slots, step)
            asked = group.keeps_norm(slots, step)
            if asked is not None:
                keeps = asked if keeps is None else keeps | asked
        return added + (moved if keeps is None else renormed(before, moved, keeps, self.total))


class OffsetSlots(SlotTensors):
    """vector: [S, writes]; with capacity for norm-preserving ones also renorm: [S]."""

    stage = Moves

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__(shape, layout)
        self._keep("vector", shape.writes)
        self._keep("renorm", dtype=torch.float32, feature="renorm")

    def _added(self, x: Tensor, slots: Tensor, token_scale: Tensor | None) -> Tensor:
        return self.tensor("vector")[slots].float()

    def keeps_norm(self, slots: Tensor, step: Step) -> Tensor | None:
        """[T, 1]: the tokens whose norm is to be restored; None if no slot has such edits."""
        if not self.has("renorm"):
            return None
        asked, token_scale = self.tensor("renorm")[slots].unsqueeze(-1) != 0, self.token_scale(step, slots)
        return asked if token_scale is None else asked & (token_scale != 0)

    def _values(self, numbers: EditsWithNumbers) -> dict[str, Any]:
        return {
            "vector": sum(torch.as_tensor(fields["vector"]) for _, fields in numbers),
            "renorm": any(isinstance(edit, Offset) and edit.renorm for edit, _ in numbers),
        }


def renormed(x: Tensor, step: Tensor, renorm: Tensor, total: AllReduce = identity) -> Tensor:
    """step[t]; where renorm[t], such that x[t] + step[t] has the norm of x[t].   x, step: [T, O], renorm: [T, 1]"""
    moved = x + step
    before, after = (total((each * each).sum(-1, keepdim=True)).sqrt() for each in (x, moved))
    ratio = before / after
    # Where nothing moves the norms are equal; 0 / 0 of an empty row must not reach it.
    return torch.where(renorm & (ratio > 0), moved * ratio - x, step)


register(Offset, OffsetSlots)
