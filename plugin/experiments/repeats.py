"""Detects answers that end in a loop. Pure."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_PERIOD = 32
TIMES = 4
"""number of repetitions that make a loop"""
LEAST_TOKENS = 24
"""shorter repetitions are lists or lines of dashes"""
LOOKED_AT = LONGEST_PERIOD * TIMES


def loops(tokens: Sequence[int]) -> bool:
    """True if the last tokens repeat one passage of at most 32 tokens at least four times, with 24 tokens or more.

    tokens: the last 128 tokens of the answer, or more.
    """
    for period in range(1, LONGEST_PERIOD + 1):
        length = max(period * TIMES, LEAST_TOKENS)
        tail = tokens[-length:]
        if len(tail) == length and tail[period:] == tail[:-period]:
            return True
    return False
