"""Factors for heads or channels."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from vllm_edits.edit_store.edits import Array, Edit, Order
from vllm_edits.edit_store.kinds import register
from vllm_edits.edit_store.sites import LAYER_POINTS, Site, Widths


class Scale(Edit):
    """x *= factor, one factor for each head or for each channel.

    factor: [heads] or [width]   1 leaves alone, 0 removes; at k.out and v.out heads are the key-value heads
    Per head at attn.z it removes a head's contribution, at q.out it makes a head attend evenly (Ships/Sahara, arXiv
    2410.13708); per channel it is IA3 (arXiv 2205.05638), and at attn.in or mlp.in together with a projection's output
    a rank-one Hadamard update (HUT, arXiv 2409.13501). It stands before rotary positions, so factors may differ within
    a pair. Where the projection adds a bias that is scaled too: `bias` must then say so.
    """

    points: ClassVar[tuple[str, ...]] = (*(point for point in LAYER_POINTS if point != "resid"), "final")
    order: ClassVar[Order] = Order(20)
    in_turn: ClassVar[bool] = True

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


_HEADED = ("q.proj", "k.proj", "q.out", "k.out", "v.out", "attn.z")


register(Scale)
