"""Factors for heads or channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np

from vllm_edits.edit_store.architectures import Architecture
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.edits import Array, Edit, Fields, Measure, Order, ReadingEdit
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds import register
from vllm_edits.edit_store.linear import AffineMap
from vllm_edits.edit_store.measures import VISIBLE, share
from vllm_edits.edit_store.sites import LAYER_POINTS, Site, Widths


class Scale(Edit):
    """x *= factor, one factor for each head or for each channel.

    factor: [heads] or [width]   1 changes nothing, 0 removes; at k.out and v.out heads are the key-value heads
    Per head at attn.z it removes a head's contribution, at q.out it makes a head attend evenly (Ships/Sahara, arXiv
    2410.13708); per channel it is IA3 (arXiv 2205.05638), and at attn.in or mlp.in together with a projection's output
    a rank-one Hadamard update (HUT, arXiv 2409.13501). It stands before rotary positions, so factors may differ within
    a pair. Where the projection adds a bias that is scaled too: `bias` must then say so.
    """

    points: ClassVar[tuple[str, ...]] = (*(point for point in LAYER_POINTS if point != "resid"), "final")
    order: ClassVar[Order] = Order(20)
    in_turn: ClassVar[bool] = True
    transforms: ClassVar[bool] = True

    kind: Literal["scale"] = "scale"
    per: Literal["head", "channel"] = "head"
    bias: Literal["scaled"] | None = None

    def misplaced(self) -> str | None:
        point = Site.parse(self.site).point
        if point in self.points and self.per == "head" and point not in _HEADED:
            return f"{self.site} is not made of heads; per-head factors can stand at {', '.join(_HEADED)}"
        return super().misplaced()

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        heads = widths.heads_at(Site.parse(self.site).point)
        return {"factor": (heads if self.per == "head" and heads else self._width(widths),)}

    @staticmethod
    def apply(x: Array, *, factor: Array) -> Array:
        return x * np.repeat(factor, x.shape[-1] // factor.shape[0])

    def rules_of_model(self, base: BaseModelRef, architecture: Architecture) -> Iterator[Reason]:
        point = Site.parse(self.site).point
        if self.per == "head" and point in ("q.proj", "k.proj"):
            yield Reason(
                "site",
                f"per-head scale at {self.site}: the norm that follows takes a head's size away again, so it would do "
                f"nothing. Scale {self.site.removesuffix('proj')}out",
            )
        normed = architecture.qk_norm and point in ("q.out", "k.out")
        if not normed and self.bias is None and point.replace(".proj", ".out") in base.biased:
            yield Reason(
                "bias",
                f"scale at {self.site}: {base.name} adds a bias there, which would be scaled too. Say so with "
                "bias='scaled', and to leave the bias out add an offset of (1 - factor) * bias",
            )

    def measure(self, fields: Fields) -> Measure:
        changed = fields["factor"] != 1
        return Measure(float(changed.sum()), f"{self.per}s changed: {_shortened(np.flatnonzero(changed).tolist())}")

    def beside(self, fields: Fields, other: Edit, other_fields: Fields) -> str | None:
        added = other.adds(other_fields)
        if added is None or not isinstance(other, ReadingEdit):
            return None
        if other.source == other.site:
            return "it reads the scaled vector"
        factor = np.repeat(fields["factor"], added.shape[-1] // len(fields["factor"]))
        missed = share(added * (factor != 1), added)
        if missed <= VISIBLE:
            return None
        return f"{missed:.0%} of what it adds lies in channels that are scaled, and is not scaled"

    @classmethod
    def linear(cls, numbers: Sequence[tuple[Self, Fields]], width: int) -> AffineMap:
        factor = np.ones(width)
        for _, fields in numbers:
            factor = factor * np.repeat(np.asarray(fields["factor"], dtype=np.float64), width // len(fields["factor"]))
        return AffineMap.of(width, factor=factor)

    @classmethod
    def usual(cls, layer: int, rank: int = 1) -> Self:
        return cls(site=f"layers.{layer}.attn.z")

    @classmethod
    def forms(cls, site: Site, width: int) -> Iterator[tuple[str, Self]]:
        yield "head", cls(site=str(site), per="head", bias="scaled")
        yield "channel", cls(site=str(site), per="channel", bias="scaled")

    def sample(self, random: np.random.Generator, widths: Widths, strength: float) -> dict[str, Any]:
        (shape,) = self.shapes(widths).values()
        wild = min(1.0, 10 * strength)
        return {"factor": random.uniform(-0.5, 1.5, shape) * wild + (1 - wild)}

    def weakened(self, fields: Fields, strength: float) -> dict[str, Any]:
        return {"factor": 1 - (1 - fields["factor"]) * strength}


_HEADED = ("q.proj", "k.proj", "q.out", "k.out", "v.out", "attn.z")


def _shortened(numbers: list[int], most: int = 12) -> str:
    return f"{numbers[:most]} and {len(numbers) - most} more" if len(numbers) > most else str(numbers)


register(Scale)
