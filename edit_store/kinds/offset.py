"""Vectors that are added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np

from vllm_edits.edit_store.edits import Array, Edit, Fields, Measure, Order
from vllm_edits.edit_store.kinds import register
from vllm_edits.edit_store.linear import AffineMap
from vllm_edits.edit_store.sites import POINTS, Site, Widths


class Offset(Edit):
    """x += vector; with `renorm`  x <- (x + vector) |x| / |x + vector|.

    vector: [width]   in the units of the point
    A steering vector at resid (ActAdd, arXiv 2308.10248), or with `renorm` a norm-preserving one; at attn.z the offsets
    of chosen heads (ITI, arXiv 2306.03341; LoFiT, arXiv 2406.01563), zeros elsewhere; at logits a bias.
    """

    points: ClassVar[tuple[str, ...]] = POINTS
    order: ClassVar[Order] = Order(50)
    features: ClassVar[tuple[str, ...]] = ("renorm",)
    adds_constant: ClassVar[bool] = True

    kind: Literal["offset"] = "offset"
    renorm: bool = False

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        return {"vector": (self._width(widths),)}

    def apply(self, x: Array, *, vector: Array) -> Array:
        moved = x + vector
        if not self.renorm:
            return moved
        norms = np.linalg.norm(x, axis=-1, keepdims=True), np.linalg.norm(moved, axis=-1, keepdims=True)
        return np.asarray(moved * norms[0] / norms[1], dtype=np.float32)

    def measure(self, fields: Fields) -> Measure:
        kept = ", the norm kept" if self.renorm else ""
        return Measure(float(np.linalg.norm(fields["vector"])), f"vector added{kept}")

    def adds(self, fields: Fields) -> Any:
        return fields["vector"][None]

    def beside(self, fields: Fields, other: Edit, other_fields: Fields) -> str | None:
        if isinstance(other, Offset) and (self.renorm or other.renorm):
            return "the norm is restored after both offsets together"
        return None

    def needs(self, together: int) -> frozenset[str]:
        return frozenset(["renorm"] if self.renorm else [])

    def formless(self) -> str | None:
        kept = "keeping a norm is not linear. Serve it per request, or leave renorm out" if self.renorm else None
        return super().formless() or kept

    @classmethod
    def linear(cls, numbers: Sequence[tuple[Self, Fields]], width: int) -> AffineMap:
        return AffineMap.of(
            width, constant=sum(np.asarray(fields["vector"], dtype=np.float64) for _, fields in numbers)
        )

    @classmethod
    def usual(cls, layer: int, rank: int = 1) -> Self:
        return cls(site=f"layers.{layer}.resid")

    @classmethod
    def forms(cls, site: Site, width: int) -> Iterator[tuple[str, Self]]:
        yield "", cls(site=str(site))
        yield "renorm", cls(site=str(site), renorm=True)

    def weakened(self, fields: Fields, strength: float) -> dict[str, Any]:
        return {**fields, "vector": fields["vector"] * np.float32(strength)}


register(Offset)
