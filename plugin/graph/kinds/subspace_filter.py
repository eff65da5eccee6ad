"""Subspace filters, in slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_edits.edit_store.edits import EditsWithNumbers
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter
from vllm_edits.plugin.graph.kinds import register
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts
from vllm_edits.plugin.graph.slot_rows import Layout
from vllm_edits.plugin.graph.slot_tensors import Shape, SlotTensors
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, identity


class SubspaceFilterSlots(SlotTensors):
    """read: [S, rank, writes], shift: [S, rank] in float32; write: [S, rank, writes] where it may differ from -read.

    With capacity for projections onto a subspace also drop: [S], constant: [S, writes], in float32.
    """

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__(shape, layout)
        rank = shape.capacity.rank
        self._keep("read", rank, shape.writes)
        self._keep("shift", rank, dtype=torch.float32)
        self._keep("write", rank, shape.writes, feature="dual")
        self._keep("drop", dtype=torch.float32, feature="onto")
        self._keep("constant", shape.writes, dtype=torch.float32, feature="onto")

    def _added(self, x: Tensor, slots: Tensor, token_scale: Tensor | None) -> Tensor:
        write = self.tensor("write") if self.has("write") else None
        added = subspace_filter(
            x, slots, read=self.tensor("read"), write=write, shift=self.tensor("shift"), **self._sums()
        )
        if self.has("drop"):
            added = added + pull(x, self.tensor("drop"), self.tensor("constant"), slots)
        return added

    def _values(self, numbers: EditsWithNumbers) -> dict[str, Any]:
        filters = [(edit, fields) for edit, fields in numbers if isinstance(edit, SubspaceFilter)]
        folded = SubspaceFilter.linear(filters, self._shape.writes.whole)
        drop = 1 - folded.factor[0]
        return {"drop": drop, **{name: getattr(folded, name) for name in ("read", "shift", "write", "constant")}}


def subspace_filter(
    x: Tensor, slots: Tensor, *, read: Tensor, write: Tensor | None, shift: Tensor,
    total: AllReduce = identity, products: SlotProducts = EXPRESSIONS,
) -> Tensor:  # fmt: skip
    """sum_k write[s, k] (read[s, k] . x[t] - shift[s, k]); without `write` it is -read.

    x: [T, O], read and write: [S, K, O], shift: [S, K]
    """
    excess = total(products.dots(x, read, slots)) - shift[slots]
    return products.combine(-excess, read, slots) if write is None else products.combine(excess, write, slots)


def pull(x: Tensor, drop: Tensor, constant: Tensor, slots: Tensor) -> Tensor:
    """constant[s] - drop[s] x[t]: the other part of a projection onto a subspace.   drop: [S], constant: [S, O]"""
    return constant[slots] - drop[slots].unsqueeze(-1) * x


register(SubspaceFilter, SubspaceFilterSlots)
