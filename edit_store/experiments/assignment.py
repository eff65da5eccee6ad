"""Assigns units to arms with GrowthBook's published hash, version 2. Pure, and the same on every server.

    n(seed, unit) = fnv1a32(str(fnv1a32(seed + unit))) mod 10000 / 10000        in [0, 1)

With weights w, arm i has the units in [w_0 + … + w_{i-1}, w_0 + … + w_{i-1} + coverage · w_i). So a growing coverage
only adds units at the upper end of every arm, and moves no unit. Source: GrowthBook, "Build Your Own SDK".
Text is hashed by its UTF-16 code units, as GrowthBook's SDKs do.
"""

from __future__ import annotations

from collections.abc import Sequence

BUCKETS = 10_000
"""number of parts that the hash distinguishes; a smaller share than one part may contain no unit"""
_OFFSET, _PRIME, _MASK = 0x811C9DC5, 0x01000193, 0xFFFFFFFF

Range = tuple[float, float]
"""From, inclusive, and to, exclusive."""


def bucket(seed: str, unit: str) -> float:
    """The place of a unit in [0, 1) for a seed. Different seeds shuffle units independently of each other."""
    return _fnv1a32(str(_fnv1a32(seed + unit))) % BUCKETS / BUCKETS


def ranges(weights: Sequence[float], coverage: float) -> list[Range]:
    """The part of [0, 1) of each arm."""
    found, start = [], 0.0
    for weight in weights:
        found.append((start, start + coverage * weight))
        start += weight
    return found


def chosen(weights: Sequence[float], coverage: float, place: float) -> int | None:
    """The number of the arm with this place, or None if the place is in no arm."""
    parts = ranges(weights, coverage)
    return next((number for number, (start, end) in enumerate(parts) if start <= place < end), None)


def _fnv1a32(text: str) -> int:
    value = _OFFSET
    for unit in memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H"):
        value = (value ^ unit) * _PRIME & _MASK
    return value
