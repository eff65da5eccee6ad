"""Affine maps of one vector, as edits that are linear make them. Pure numpy, in float64.

    m(x) = factor x + constant + write^T (read x - shift)

One after the other, or side by side, two such maps are one again, with the ranks added: so a slot holds any number of
filters and the graph computes one, and any number of edits ends in one weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np


@dataclass(frozen=True)
class AffineMap:
    """factor, constant: [width]; read, write: [rank, width]; shift: [rank]."""

    factor: Any
    constant: Any
    read: Any
    write: Any
    shift: Any

    @classmethod
    def of(cls, width: int, **parts: Any) -> Self:
        """The map with these parts; those that are left out change nothing."""
        rank = len(parts.get("read", ()))
        nothing = {
            "factor": np.ones(width), "constant": np.zeros(width), "read": np.zeros((0, width)),
            "write": np.zeros((0, width)), "shift": np.zeros(rank),
        }  # fmt: skip
        return cls(**{name: np.asarray(part, dtype=np.float64) for name, part in {**nothing, **parts}.items()})

    def then(self, after: AffineMap) -> AffineMap:
        """This map, and `after` applied to what it gives."""
        seen = after.read @ self.write.T
        return AffineMap(
            factor=self.factor * after.factor,
            constant=self.constant * after.factor + after.constant,
            read=np.concatenate([self.read, after.read * self.factor + seen @ self.read]),
            write=np.concatenate([self.write * after.factor, after.write]),
            shift=np.concatenate([self.shift, after.shift + seen @ self.shift - after.read @ self.constant]),
        )

    def beside(self, other: AffineMap) -> AffineMap:
        """Both of the same vector: what each adds to it is added."""
        return AffineMap(
            factor=self.factor + other.factor - 1,
            constant=self.constant + other.constant,
            read=np.concatenate([self.read, other.read]),
            write=np.concatenate([self.write, other.write]),
            shift=np.concatenate([self.shift, other.shift]),
        )

    def __call__(self, x: Any) -> Any:
        """m of every row of x."""
        return x * self.factor + self.constant + (x @ self.read.T - self.shift) @ self.write
