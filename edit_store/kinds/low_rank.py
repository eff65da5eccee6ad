"""Low-rank updates of weights, and low-rank maps of vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from vllm_edits.edit_store.edits import MAX_RANK, Array, Fields, Measure, Order, ReadingEdit
from vllm_edits.edit_store.kinds import register
from vllm_edits.edit_store.linear import AffineMap
from vllm_edits.edit_store.measures import product_moved, product_norm
from vllm_edits.edit_store.sites import POINTS, Site, Widths


class LowRank(ReadingEdit):
    """y += sum_r write[r] (read[r] . x), x at `reads`, y at `site`.

    read:  [rank, in]   directions that are read
    write: [rank, out]  directions added
    From a module's input to its output this is an update of its weight, W + write^T read: redirections (ROCR, arXiv
    2506.07795: rank one, mlp.h to mlp.out), ROME, MEMIT and AlphaEdit, rows shifted by a probe (Model Surgery, arXiv
    2407.08770: mlp.in to gate.out, `write` of zeros and ones), LoRA's B A. In place it is a linear map of the vector.
    """

    points: ClassVar[tuple[str, ...]] = POINTS
    order: ClassVar[Order] = Order(30)

    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(gt=0, le=MAX_RANK)

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        return {"read": (self.rank, self._source_width(widths)), "write": (self.rank, self._width(widths))}

    @staticmethod
    def apply(x: Array, y: Array, *, read: Array, write: Array) -> Array:
        return np.asarray(y + (x @ read.T) @ write, dtype=np.float32)

    def measure(self, fields: Fields) -> Measure:
        norm = product_norm((fields["write"], fields["read"]))
        if self.source == self.site:
            return Measure(norm, "Frobenius norm of the map added")
        return Measure(norm, "Frobenius norm of the change of W", of_weight=True)

    def moved(self, new: Self, before: Fields, after: Fields) -> float | None:
        return product_moved((before["write"], before["read"]), (after["write"], after["read"]))

    def adds(self, fields: Fields) -> Any:
        return fields["write"]

    @classmethod
    def linear(cls, numbers: Sequence[tuple[Self, Fields]], width: int) -> AffineMap:
        stacked = {name: np.concatenate([fields[name] for _, fields in numbers]) for name in ("read", "write")}
        return AffineMap.of(width, **stacked)

    def weight_change(self, fields: Fields, shape: Sequence[int]) -> tuple[Any, ...]:
        return np.transpose(fields["write"]), fields["read"]

    @classmethod
    def usual(cls, layer: int, rank: int = 1) -> Self:
        return cls(site=f"layers.{layer}.mlp.out", reads=f"layers.{layer}.mlp.h", rank=rank)

    @classmethod
    def forms(cls, site: Site, width: int) -> Iterator[tuple[str, Self]]:
        for reads in cls._readable(site):
            yield "", cls(site=str(site), reads=str(reads), rank=2)

    def weakened(self, fields: Fields, strength: float) -> dict[str, Any]:
        return {**fields, "write": fields["write"] * np.float32(strength)}


register(LowRank)
