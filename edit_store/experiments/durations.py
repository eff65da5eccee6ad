"""Durations in a document: `30s`, `5m`, `1h`, `2d`, or a number of seconds."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd])")


def seconds(value: object) -> object:
    """Convert a written duration to seconds. Other values are left to the type's own check."""
    match = _WRITTEN.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        if isinstance(value, str):
            raise ValueError(f"expected a duration such as 30s, 5m, 1h or 2d, found {value!r}")
        return value
    return float(match[1]) * _UNITS[match[2]]


def spoken(length: float) -> str:
    """A duration for people, in the largest unit without a fraction."""
    for unit, size in reversed(_UNITS.items()):
        if length >= size and length % size == 0:
            return f"{length / size:g}{unit}"
    return f"{length:g}s"


Seconds = Annotated[float, BeforeValidator(seconds), Field(ge=0)]
