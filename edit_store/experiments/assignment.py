"""Which arm of an experiment a unit is in: GrowthBook's published hash, version 2. Pure, and the same everywhere.

    n(seed, unit) = fnv1a32(str(fnv1a32(seed + unit))) mod 10000 / 10000        in [0, 1)

Arm i of weights w takes part with the units of [w_0 + … + w_{i-1}, w_0 + … + w_{i-1} + coverage · w_i). So a coverage
that grows only adds units at the upper end of every arm, and moves none. Source: GrowthBook, "Build Your Own SDK".
Text is hashed by its UTF-16 code units, as GrowthBook's SDKs do.
"""

from __future__ import annotations

from collections.abc import Sequence

BUCKETS = 10_000
"""what the hash can tell apart: a share finer than one in so many is nobody"""
_OFFSET, _PRIME, _MASK = 0x811C9DC5, 0x01000193, 0xFFFFFFFF

Range = tuple[float, float]
"""From, inclusive, and to, exclusive."""


def bucket(seed: str, unit: str) -> float:
    """Where a unit stands for that seed, in [0, 1). Different seeds shuffle units independently of each other."""
    return _fnv1a32(str(_fnv1a32(seed + unit))) % BUCKETS / BUCKETS


def ranges(weights: Sequence[float], coverage: float) -> list[Range]:
    """The part of [0, 1) that each arm has."""
    found, start = [], 0.0
    for weight in weights:
        found.append((start, start + coverage * weight))
        start += weight
    return found


def chosen(weights: Sequence[float], coverage: float, place: float) -> int | None:
    """The arm that has this place, by number; None for one that takes no part."""
    parts = ranges(weights, coverage)
    return next((number for number, (start, end) in enumerate(parts) if start <= place < end), None)


def _fnv1a32(text: str) -> int:
    value = _OFFSET
    for unit in memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H"):
        value = (value ^ unit) * _PRIME & _MASK
    return value
