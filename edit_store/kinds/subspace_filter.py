"""Projections off a subspace, or onto one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from vllm_edits.edit_store.edits import IN_PLACE, MAX_RANK, Array, Broken, Edit, Fields, Measure, Order
from vllm_edits.edit_store.kinds import register
from vllm_edits.edit_store.linear import AffineMap
from vllm_edits.edit_store.measures import VISIBLE, Product, product_moved, share
from vllm_edits.edit_store.sites import Site, Widths

ORTHONORMAL_TOLERANCE = 1e-4
_MANY = 96
"""Number of directions that an example of a projection onto a subspace keeps, where a site is wide enough."""


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
    transforms: ClassVar[bool] = True
    features: ClassVar[tuple[str, ...]] = ("onto", "dual")
    adds_constant: ClassVar[bool] = True

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

    def rules_of_numbers(self, fields: Fields, widths: Widths) -> Iterator[Broken]:
        # In float32 the products of great numbers would overflow.
        basis, other = (fields[name].astype(np.float64) for name in ("basis", "dual" if self.oblique else "basis"))
        error = float(np.abs(basis @ other.T - np.eye(len(basis))).max())
        if error > ORTHONORMAL_TOLERANCE:
            if self.oblique:
                yield "not_dual", "dual", f"basis dual^T must be the identity, off by {error:.1e}"
            else:
                yield "not_orthonormal", "basis", f"rows must be orthonormal, off by {error:.1e}"

    def measure(self, fields: Fields) -> Measure:
        kept = "kept" if self.onto else "removed"
        inside = float(np.linalg.norm(fields["basis"] @ fields["mean"]))
        return Measure(inside, f"mean inside the subspace that is {kept}")

    def moved(self, new: Self, before: Fields, after: Fields) -> float | None:
        """Distance of the maps x -> P (x - mean): a rotated basis is no change."""
        if self.onto != new.onto:
            return None
        maps: list[Product] = [(fields.get("dual", fields["basis"]), fields["basis"]) for fields in (before, after)]
        means: list[Any] = [
            dual.T @ (basis @ fields["mean"]) for (dual, basis), fields in zip(maps, (before, after), strict=True)
        ]
        apart = float(np.sum((means[1] - means[0]) ** 2)), float(np.sum(means[0] ** 2))
        return product_moved(maps[0], maps[1], apart)

    def beside(self, fields: Fields, other: Edit, other_fields: Fields) -> str | None:
        if isinstance(other, SubspaceFilter):
            overlap = float(np.abs(fields["basis"] @ other_fields["basis"].T).max())
            if overlap <= VISIBLE:
                return None
            return f"their subspaces overlap (cosine up to {overlap:.2f}): the later one moves what the earlier one set"
        added = other.adds(other_fields)
        if added is None:
            if not other.transforms or other.order > self.order:
                return None
            return "the filter sees scaled channels, so it removes other directions of the unscaled vector"
        return self._before(fields, added) if other.order < self.order else self._behind(fields, added)

    def needs(self, together: int) -> frozenset[str]:
        """The feature `dual` for filters that write other directions than they read, as several folded into one do."""
        if self.onto:
            return frozenset(["onto", "dual"])
        return frozenset(["dual"] if self.oblique or together > 1 else [])

    @classmethod
    def linear(cls, numbers: Sequence[tuple[Self, Fields]], width: int) -> AffineMap:
        folded = AffineMap.of(width)
        for edit, fields in numbers:
            folded = folded.then(_affine(edit, fields))
        return folded

    @classmethod
    def usual(cls, layer: int, rank: int = 1) -> Self:
        return cls(site=f"layers.{layer}.resid", rank=rank)

    @classmethod
    def forms(cls, site: Site, width: int) -> Iterator[tuple[str, Self]]:
        yield "", cls(site=str(site), rank=2)
        yield "onto", cls(site=str(site), rank=min(width * 3 // 4, _MANY), onto=True)
        yield "oblique", cls(site=str(site), rank=2, oblique=True)

    def sample(self, random: np.random.Generator, widths: Widths, strength: float) -> dict[str, Any]:
        numbers, shape = super().sample(random, widths, strength), (self.rank, self._width(widths))
        basis = numbers["basis"] = np.linalg.qr(random.normal(size=shape[::-1]))[0].T
        if self.oblique:  # another right inverse of the basis
            beside = random.normal(size=shape) * strength
            numbers["dual"] = basis + beside - (beside @ basis.T) @ basis
        return numbers

    def weakened(self, fields: Fields, strength: float) -> dict[str, Any]:
        return {**fields, "mean": fields["mean"] * np.float32(strength)}

    def _before(self, fields: Fields, added: Any) -> str | None:
        inside = share(added @ fields["basis"].T @ fields.get("dual", fields["basis"]), added)
        if self.onto:
            inside = share(added - added @ fields["basis"].T @ fields["basis"], added)
        return f"the filter comes after it and takes away {inside:.0%} of what it adds" if inside > VISIBLE else None

    def _behind(self, fields: Fields, added: Any) -> str | None:
        inside = added @ fields["basis"].T @ fields["basis"]
        back = share(added - inside if self.onto else inside, added)
        return (
            f"the offset comes after it and puts {back:.0%} of itself where the filter took" if back > VISIBLE else None
        )


def _affine(edit: SubspaceFilter, fields: Fields) -> AffineMap:
    basis, mean = (np.asarray(fields[name], dtype=np.float64) for name in ("basis", "mean"))
    dual = np.asarray(fields["dual"], dtype=np.float64) if edit.oblique else basis
    inside: dict[str, Any] = {"read": basis, "write": dual if edit.onto else -dual, "shift": basis @ mean}
    kept = {"factor": np.zeros_like(mean), "constant": mean} if edit.onto else {}
    return AffineMap.of(len(mean), **inside, **kept)


register(SubspaceFilter)
