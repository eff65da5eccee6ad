"""Each kind of edit, applied to a batch of tokens that each belong to their own slot. Plain torch, so it fuses.

Shapes: T tokens, S slots, K rank, I and O input and output width, H heads; `slots` is [T]. Slot 0 is the base model:
its tensors are zeros (ones for a factor), so its tokens come out as they went in, but for the sign of a zero.
Gathering by slot costs the same for any number of slots. The arithmetic is in float32: a long dot product in bfloat16
loses too much.
"""

from __future__ import annotations

from torch import Tensor


def scale(z: Tensor, factor: Tensor, slots: Tensor) -> Tensor:
    """z[t, h, :] * factor[slots[t], h].   z: [T, H * head_dim], factor: [S, H]"""
    by_head = z.reshape(z.shape[0], factor.shape[1], -1)
    return (by_head.float() * factor[slots].float().unsqueeze(-1)).to(z.dtype).reshape(z.shape)


def low_rank(x: Tensor, y: Tensor, read: Tensor, write: Tensor, slots: Tensor) -> Tensor:
    """y[t] + sum_k write[s, k] (read[s, k] . x[t]),  s = slots[t].

    x: [T, I], y: [T, O], read: [S, K, I], write: [S, K, O]
    """
    strength = (read[slots].float() * x.float().unsqueeze(1)).sum(-1, keepdim=True)
    return (y.float() + (write[slots].float() * strength).sum(1)).to(y.dtype)


def subspace_filter(hidden: Tensor, stream: Tensor, basis: Tensor, shift: Tensor, slots: Tensor) -> Tensor:
    """hidden[t] - sum_k basis[s, k] (basis[s, k] . stream[t] - shift[s, k]),  s = slots[t].

    stream: [T, I] the whole residual stream in float32, of which `hidden` is the half that takes the change
    basis: [S, K, I] orthonormal rows, shift: [S, K] = basis @ mean
    """
    directions = basis[slots].float()
    excess = (directions * stream.unsqueeze(1)).sum(-1) - shift[slots]
    return (hidden.float() - (directions * excess.unsqueeze(-1)).sum(1)).to(hidden.dtype)


def offset(hidden: Tensor, vector: Tensor, slots: Tensor) -> Tensor:
    """hidden[t] + vector[slots[t]].   hidden: [T, I], vector: [S, I]"""
    return (hidden.float() + vector[slots].float()).to(hidden.dtype)
