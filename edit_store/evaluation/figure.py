"""One measured figure of a version beside its base model, and the report of a suite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from pydantic import AwareDatetime, Field

from vllm_edits.edit_store.canonical import Digest
from vllm_edits.edit_store.record import FrozenRecord

Better = Literal["more", "less"]
Z = 1.959963984540054
"""of a 95 % interval"""
_DRAWS = 2000


class Interval(FrozenRecord):
    """A 95 % interval."""

    low: float
    high: float


class Figure(FrozenRecord):
    """A figure of the base model and of the edited one. `better` says which way is good."""

    name: str
    base: float
    edited: float
    n: int = Field(gt=0)
    """rows that it is of"""
    better: Better
    interval: Interval | None = None
    """of `edited`"""

    @classmethod
    def share(cls, name: str, sides: Iterable[Sequence[bool]], better: Better) -> Figure:
        """Share of rows, with Wilson's interval. sides: the rows of the base model, and those of the edited one."""
        base, edited = sides
        return cls(
            name=name, base=sum(base) / len(base), edited=sum(edited) / len(edited), n=len(edited), better=better,
            interval=wilson(sum(edited), len(edited)),
        )  # fmt: skip

    @classmethod
    def mean(cls, name: str, sides: Iterable[Sequence[float]], better: Better) -> Figure:
        """Mean over rows, with a bootstrap interval. sides: as for `share`."""
        base, edited = sides
        return cls(
            name=name, base=float(np.mean(base)), edited=float(np.mean(edited)), n=len(edited), better=better,
            interval=bootstrap(edited),
        )  # fmt: skip


class Report(FrozenRecord):
    """The figures of one suite for one version, and where they were measured."""

    schema_version: Literal[1] = 1
    suite: str
    suite_sha256: Digest
    """of the suite with its data"""
    variant: str
    version: Digest
    base: dict[str, Digest] = Field(default_factory=dict)
    """digests of the base model's files; empty where a server did not say"""
    measured_by: str
    """the program that computed the answers, with its version"""
    at: AwareDatetime
    figures: tuple[Figure, ...]

    def figure(self, name: str) -> Figure | None:
        """A figure by its name; None if the suite has none of that name."""
        return next((figure for figure in self.figures if figure.name == name), None)


def wilson(hits: int, n: int) -> Interval:
    """Wilson's score interval of a share."""
    share, spread = hits / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return Interval(low=max(0.0, middle - half), high=min(1.0, middle + half))


def bootstrap(values: Sequence[float]) -> Interval:
    """Percentile interval of the mean, from draws that are the same each time."""
    numbers, random = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    means = numbers[random.integers(0, len(numbers), size=(_DRAWS, len(numbers)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(low=float(low), high=float(high))
