"""Several subspace filters at one site, one after the other, as one affine map of the same form. Pure.

    f(x) = x - drop x + constant + write^T (read x - shift)

A filter off a subspace has drop 0; onto one, drop 1. The composition of two such maps is one again, with the ranks
added, so a slot holds any number of filters and the graph computes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter


@dataclass(frozen=True)
class AffineMap:
    """read, write: [rank, width], shift: [rank], drop: a number, constant: [width]; in float64."""

    read: Any
    write: Any
    shift: Any
    drop: float
    constant: Any

    def then(self, after: AffineMap) -> AffineMap:
        """This map, and `after` applied to what it gives."""
        seen = after.read @ self.write.T
        return AffineMap(
            read=np.concatenate([self.read, after.read * (1 - self.drop) + seen @ self.read]),
            write=np.concatenate([self.write * (1 - after.drop), after.write]),
            shift=np.concatenate([self.shift, after.shift + seen @ self.shift - after.read @ self.constant]),
            drop=self.drop + after.drop - self.drop * after.drop,
            constant=self.constant * (1 - after.drop) + after.constant,
        )

    def __call__(self, x: Any) -> Any:
        """f of every row of x."""
        return x * (1 - self.drop) + self.constant + (x @ self.read.T - self.shift) @ self.write


def fold_filters(filters: Sequence[tuple[SubspaceFilter, Mapping[str, Any]]]) -> AffineMap:
    """One map that does what the filters do in their order."""
    first, *others = [_affine(edit, fields) for edit, fields in filters]
    for other in others:
        first = first.then(other)
    return first


def _affine(edit: SubspaceFilter, fields: Mapping[str, Any]) -> AffineMap:
    basis, mean = (np.asarray(fields[name], dtype=np.float64) for name in ("basis", "mean"))
    dual = np.asarray(fields["dual"], dtype=np.float64) if edit.oblique else basis
    shift = basis @ mean
    if edit.onto:
        return AffineMap(basis, dual, shift, 1.0, mean)
    return AffineMap(basis, -dual, shift, 0.0, np.zeros_like(mean))
