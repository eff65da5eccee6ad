"""Whether an answer ended in a loop. Pure."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_PERIOD = 32
TIMES = 4
"""how often the same tokens must follow each other"""
LEAST_TOKENS = 24
"""a loop of fewer tokens is a list, or a line of dashes"""
LOOKED_AT = LONGEST_PERIOD * TIMES


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last tokens are one passage of at most 32, over and over: four times, and 24 tokens at least.

    tokens: the answer's last 128, or more.
    """
    for period in range(1, LONGEST_PERIOD + 1):
        length = max(period * TIMES, LEAST_TOKENS)
        tail = tokens[-length:]
        if len(tail) == length and tail[period:] == tail[:-period]:
            return True
    return False
