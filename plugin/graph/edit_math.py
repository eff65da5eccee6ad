"""Each kind of edit, applied to a batch of tokens that each belong to their own slot. Plain torch, so it fuses.

Every function returns what an edit adds to the value it was given, in float32: a long dot product in bfloat16 loses too
much. Slot 0 is the base model: its tensors are zeros, so it adds exactly zero, and its tokens come out as they went in,
but for the sign of a zero. Gathering by slot costs the same for any number of slots.

Shapes: T tokens, S slots, K rank, I and O width of what is read and written; `slots` is [T], values are [T, width].
Where a worker has a part of the vector that is read, `total` adds up all workers' parts of the dot products, and
`products` says how tokens are multiplied with the vectors of their slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, identity

ACTIVATION_CODES = {"relu": 0, "jump_relu": 1, "step": 2, "silu": 3, "sigmoid": 4}
"""How a slot says which activation a neuron has."""


def scale(x: Tensor, change: Tensor, slots: Tensor) -> Tensor:
    """x[t] * change[s], change = factor - 1.   x: [T, O], change: [S, O]"""
    return x * change[slots]


def low_rank(
    x: Tensor,
    slots: Tensor,
    *,
    read: Tensor,
    write: Tensor,
    total: AllReduce = identity,
    products: SlotProducts = EXPRESSIONS,
) -> Tensor:
    """sum_k write[s, k] (read[s, k] . x[t]).   x: [T, I], read: [S, K, I], write: [S, K, O]"""
    return products.combine(total(products.dots(x, read, slots)), write, slots)


def gate(
    x: Tensor, slots: Tensor, *, read: Tensor, bias: Tensor, write: Tensor, activation: Tensor, threshold: Tensor,
    shrink: Tensor | None = None, total: AllReduce = identity, products: SlotProducts = EXPRESSIONS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sum_k write[s, k] sigma_sk(read[s, k] . x[t] shrink[t] + bias[s, k]), and what each neuron gave, [T, K].

    x: [T, I], read: [S, K, I], write: [S, K, O], bias, activation (a code) and threshold: [S, K], shrink: [T, 1]
    """
    along = total(products.dots(x, read, slots))
    z = (along if shrink is None else along * shrink) + bias[slots]
    code, positive = activation[slots], z > threshold[slots]
    fired = torch.relu(z)
    for name, form in _ACTIVATIONS.items():
        fired = torch.where(code == ACTIVATION_CODES[name], form(z, positive), fired)
    return products.combine(fired, write, slots), fired


_ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "jump_relu": lambda z, positive: torch.where(positive, z, 0.0),
    "step": lambda _, positive: positive.float(),
    "silu": lambda z, _: torch.nn.functional.silu(z),
    "sigmoid": lambda z, _: torch.sigmoid(z),
}


def centred(
    x: Tensor, slots: Tensor, *, stretch: Tensor, centre: Tensor, normalise: Tensor, total: AllReduce = identity
) -> tuple[Tensor, Tensor]:
    """y[t] = x[t] * stretch[s] - centre[s], and what its dot products shrink by: 1 / |y[t]| where normalise[s], else 1.

    So the length and the dot products are sums of one pass over the vector.

    x, y: [T, I], stretch, centre: [S, I], normalise, 0 or 1: [S], the second result: [T, 1]
    """
    y = x * stretch[slots] - centre[slots]
    shrink = torch.rsqrt(total((y * y).sum(-1, keepdim=True)))
    return y, torch.where(normalise[slots].unsqueeze(-1) != 0, shrink, 1.0)


def subspace_filter(
    x: Tensor, slots: Tensor, *, read: Tensor, write: Tensor | None, shift: Tensor,
    total: AllReduce = identity, products: SlotProducts = EXPRESSIONS,
) -> Tensor:  # fmt: skip
    """sum_k write[s, k] (read[s, k] . x[t] - shift[s, k]); without `write` it is -read.

    x: [T, O], read and write: [S, K, O], shift: [S, K]
    """
    excess = total(products.dots(x, read, slots)) - shift[slots]
    return products.combine(-excess, read, slots) if write is None else products.combine(excess, write, slots)


def pull(x: Tensor, drop: Tensor, constant: Tensor, slots: Tensor) -> Tensor:
    """constant[s] - drop[s] x[t]: what a projection onto a subspace also does.   drop: [S], constant: [S, O]"""
    return constant[slots] - drop[slots].unsqueeze(-1) * x


def renormed(x: Tensor, step: Tensor, renorm: Tensor, total: AllReduce = identity) -> Tensor:
    """step[t]; where renorm[t], such that x[t] + step[t] has the norm of x[t].   x, step: [T, O], renorm: [T, 1]"""
    moved = x + step
    before, after = (total((each * each).sum(-1, keepdim=True)).sqrt() for each in (x, moved))
    ratio = before / after
    # Where nothing moves the norms are equal; 0 / 0 of an empty row must not reach it.
    return torch.where(renorm & (ratio > 0), moved * ratio - x, step)


def finite(x: Tensor) -> Tensor:
    """x, and where that is infinite or NaN the largest number of its type. Finite numbers stay bit for bit."""
    largest = torch.finfo(x.dtype).max
    return torch.where(x.abs() <= largest, x, largest)  # nan_to_num is compiled to a loop over single numbers
