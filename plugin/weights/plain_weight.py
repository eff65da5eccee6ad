"""A weight that the engine reads from an ordinary parameter, as on a GPU. No vLLM here."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from vllm_edits.plugin.weights.patched_weights import Copy

_AT_ONCE = 1 << 22
"""Numbers that are read or exchanged together: the additional device memory it takes."""


class PlainWeight:
    """`weight` [out, in] and `bias` [out] or None, read from their addresses at every step. Copies: in host memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.dtype = weight.dtype
        self.bias = bias
        self._weight = weight

    def loaded(self, aside: Copy | None) -> Tensor:
        loaded: Tensor = self._weight if aside is None else aside.weight
        return loaded

    def copy(self, weight: Tensor, bias: Tensor | None) -> Copy:
        weight = weight.pin_memory() if self._weight.is_cuda else weight.contiguous()
        made = Copy(weight, bias, weight.nbytes)
        made.fingerprint = self.fingerprint(made)
        return made

    def exchange(self, copy: Copy) -> None:
        exchange(self._weight, copy.weight)
        exchange_bias(self.bias, copy)

    def fingerprint(self, copy: Copy | None) -> bytes:
        weight, bias = (self._weight, self.bias) if copy is None else (copy.weight, copy.bias)
        return fingerprint(weight) + (b"" if bias is None else fingerprint(bias))


def exchange_bias(bias: Tensor | None, copy: Copy) -> None:
    """Exchange a module's bias and a copy's."""
    if bias is not None and copy.bias is not None:
        exchange(bias, copy.bias)


def exchange(one: Tensor, other: Tensor) -> None:
    """Exchange the numbers of two tensors of one shape and type; neither moves, so pinned memory stays pinned.

    The only step that can fail, allocating memory for a part of them on the device of `one`, comes first.
    """
    mine, theirs = one.view(-1), other.view(-1)
    aside = torch.empty_like(mine[:_AT_ONCE])
    for start in range(0, len(mine), _AT_ONCE):
        some = mine[start : start + _AT_ONCE]
        was = aside[: len(some)].copy_(some)
        some.copy_(theirs[start : start + _AT_ONCE])
        theirs[start : start + _AT_ONCE].copy_(was)


def fingerprint(tensor: Tensor) -> bytes:
    """Digest of tensors on their device: a sum of the bits, each weighted by its place."""
    bits = tensor.detach().reshape(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _AT_ONCE):
        some = bits[start : start + _AT_ONCE].long()
        places = torch.arange(start, start + len(some), device=tensor.device) * 0x9E3779B1 + 1
        total += (some * places).sum()
    return hashlib.sha256(str(int(total)).encode()).digest()
