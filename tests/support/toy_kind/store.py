"""A kind of edit that the product does not have: what it is. The first of its three files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import numpy as np

from vllm_edits.edit_store.edits import IN_PLACE, Array, Broken, Edit, Fields, Measure, Order
from vllm_edits.edit_store.kinds import register
from vllm_edits.edit_store.sites import Site, Widths


class Clamp(Edit):
    """x <- min(max(x, -bound), bound), every channel by itself.

    bound: [1]   above 0
    """

    points: ClassVar[tuple[str, ...]] = IN_PLACE
    order: ClassVar[Order] = Order(60)
    in_turn: ClassVar[bool] = True
    transforms: ClassVar[bool] = True

    kind: Literal["clamp"] = "clamp"

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        return {"bound": (1,)}

    @staticmethod
    def apply(x: Array, *, bound: Array) -> Array:
        return np.clip(x, -bound, bound)

    def rules_of_numbers(self, fields: Fields, widths: Widths) -> Iterator[Broken]:
        if fields["bound"][0] <= 0:
            yield "bound", "bound", f"expected a number above 0, found {fields['bound'][0]:g}"

    def measure(self, fields: Fields) -> Measure:
        return Measure(float(fields["bound"][0]), "bound of every channel")

    def beside(self, fields: Fields, other: Edit, other_fields: Fields) -> str | None:
        return "the bound comes after it" if other.order < self.order else None

    def formless(self) -> str:
        return "a bound bends the vector, and a weight is linear. Serve it per request"

    @classmethod
    def usual(cls, layer: int, rank: int = 1) -> Self:
        return cls(site=f"layers.{layer}.resid")

    @classmethod
    def forms(cls, site: Site, width: int) -> Iterator[tuple[str, Self]]:
        yield "", cls(site=str(site))

    def sample(self, random: np.random.Generator, widths: Widths, strength: float) -> dict[str, Any]:
        return {"bound": random.uniform(0.05, 0.2, 1)}

    def weakened(self, fields: Fields, strength: float) -> dict[str, Any]:
        return {"bound": fields["bound"] / np.float32(max(strength, 1e-6))}


def add() -> None:
    register(Clamp)
