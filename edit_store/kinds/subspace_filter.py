"""Projections off a subspace, or onto one."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from vllm_edits.edit_store.edits import IN_PLACE, MAX_RANK, Array, Edit, Order
from vllm_edits.edit_store.kinds import register
from vllm_edits.edit_store.sites import Widths


class SubspaceFilter(Edit):
    """x <- x - P (x - mean), P = basis^T basis; with `onto`  x <- mean + P (x - mean).

    basis: [rank, width]  orthonormal rows: the directions that are removed, or with `onto` the only ones that are kept
    mean:  [width]        what the removed coordinates become; zeros for a plain projection
    dual:  [rank, width]  only with `oblique`: P = dual^T basis, where basis dual^T is the identity
    Off a subspace: abliteration of the residual stream (arXiv 2406.11717), and concept erasure, which is oblique
    (LEACE, arXiv 2306.03819). Onto one: EigenShield's fixed form (arXiv 2502.14976). A second time changes nothing.
    """

    points: ClassVar[tuple[str, ...]] = IN_PLACE
    order: ClassVar[Order] = Order(40)
    in_turn: ClassVar[bool] = True

    kind: Literal["subspace_filter"] = "subspace_filter"
    rank: int = Field(gt=0, le=MAX_RANK)
    onto: bool = False
    oblique: bool = False

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        width = self._width(widths)
        dual = {"dual": (self.rank, width)} if self.oblique else {}
        return {"basis": (self.rank, width), "mean": (width,), **dual}

    def apply(self, x: Array, *, basis: Array, mean: Array, dual: Array | None = None) -> Array:
        inside = ((x - mean) @ basis.T) @ (basis if dual is None else dual)
        return np.asarray(mean + inside if self.onto else x - inside, dtype=np.float32)


register(SubspaceFilter)
