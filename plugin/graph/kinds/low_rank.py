"""Low-rank updates, in slots."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vllm_edits.edit_store.edits import EditsWithNumbers
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.plugin.graph.kinds import register
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts
from vllm_edits.plugin.graph.slot_rows import Layout
from vllm_edits.plugin.graph.slot_tensors import Shape, SlotTensors, stacked
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, identity


class LowRankSlots(SlotTensors):
    """read: [S, rank, reads], write: [S, rank, writes]."""

    linear = True

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__(shape, layout)
        self._keep("read", shape.capacity.rank, shape.reads)
        self._keep("write", shape.capacity.rank, shape.writes)

    def _added(self, x: Tensor, slots: Tensor, token_scale: Tensor | None) -> Tensor:
        return low_rank(x, slots, read=self.tensor("read"), write=self.tensor("write"), **self._sums())

    def _values(self, numbers: EditsWithNumbers) -> dict[str, Any]:
        return {field: stacked(numbers, field) for field in ("read", "write")}


def low_rank(
    x: Tensor,
    slots: Tensor,
    *,
    read: Tensor,
    write: Tensor,
    total: AllReduce = identity,
    products: SlotProducts = EXPRESSIONS,
) -> Tensor:
    """sum_k write[s, k] (read[s, k] . x[t]).   x: [T, I], read: [S, K, I], write: [S, K, O]"""
    return products.combine(total(products.dots(x, read, slots)), write, slots)


register(LowRank, LowRankSlots)
