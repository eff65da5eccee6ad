"""The two products of a batch of tokens with the vectors of their slots: the one that reads, the one that writes.

Shapes: T tokens, S slots, K rank, I and O width of what is read and written; `slots` is [T] of int32. Results are in
float32. Slot 0 is the base model's, and gives exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SlotProducts:
    """One way to compute them."""

    name: str
    dots: Callable[[Tensor, Tensor, Tensor], Tensor]
    """x [T, I], read [S, K, I], slots -> [T, K]: read[slots[t], k] . x[t]"""
    combine: Callable[[Tensor, Tensor, Tensor], Tensor]
    """strengths [T, K] in float32, write [S, K, O], slots -> [T, O]: sum_k strengths[t, k] write[slots[t], k]"""


def _dots(x: Tensor, read: Tensor, slots: Tensor) -> Tensor:
    return (read[slots].float() * x.unsqueeze(1)).sum(-1)


def _combine(strengths: Tensor, write: Tensor, slots: Tensor) -> Tensor:
    return (write[slots].float() * strengths.unsqueeze(-1)).sum(1)


EXPRESSIONS = SlotProducts("expressions", _dots, _combine)
"""Products in plain torch, which the compiler fuses into the loops around them, without a call."""
