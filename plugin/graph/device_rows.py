"""Rows of a tensor that the host writes before a step, without waiting for the device. No vLLM here.

A copy to a GPU that the host does not wait for must come from pinned memory, and that memory must not change until the
copy is done. Pinning takes longer than a step may, so a few buffers are kept and used in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TURNS = 3
"""Two steps are under way at most, so the buffer of the third step before is free, and its event is not waited for."""


class DeviceRows:
    """Writes the first rows of a tensor; the rows behind them are neutral. Equal values are not sent again."""

    def __init__(self, tensor: Tensor, neutral: float, host: HostSide | None = None) -> None:
        """tensor: holds `neutral` everywhere; host: the buffers it is written from, by default as its device needs"""
        self.tensor = tensor
        self._neutral = neutral
        self._host = host or (PinnedTurns(tensor) if tensor.is_cuda else _Direct(tensor))
        self._written = 0
        """number of rows that may differ from neutral"""
        self._known: NDArray[Any] | None = None
        """the rows that were written last, unless the tensor has changed since"""
        self._nothing = np.zeros((0, *tensor.shape[1:]))

    def clear(self) -> None:
        """Make all rows neutral."""
        if self._written:
            self.write(self._nothing)

    def write(self, values: NDArray[Any]) -> None:
        """Make `values` [n, ...] the first n rows."""
        if self._known is not None and np.array_equal(values, self._known):
            return
        rows = max(len(values), self._written)
        buffer = self._host.begin(rows)
        buffer[: len(values)] = values
        buffer[len(values) :] = self._neutral
        self._host.end(rows)
        self._written, self._known = len(values), np.array(values)

    def changed(self, rows: int) -> None:
        """Note that the device itself has written to the first `n` rows."""
        self._written, self._known = max(self._written, rows), None


class HostSide(Protocol):
    """Host memory for rows that go to the device."""

    def begin(self, rows: int) -> NDArray[Any]:
        """Memory for the first rows, with any content."""

    def end(self, rows: int) -> None:
        """Copy the rows to the tensor."""


class _Direct:
    """Rows of a tensor that is in host memory: nothing is sent."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def begin(self, rows: int) -> NDArray[Any]:
        memory: NDArray[Any] = self._tensor.numpy()
        return memory[:rows]

    def end(self, rows: int) -> None:
        pass


@dataclass
class _Buffer:
    """Pinned memory, and an event behind the last copy from it."""

    pinned: Tensor
    copied: Any


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class PinnedTurns:
    """Pinned buffers used in turns: one is written to again when the copy from it is done."""

    def __init__(
        self,
        tensor: Tensor,
        *,
        pinned_like: Callable[[Tensor], Tensor] = _pinned_like,
        event: Callable[[], Any] = torch.cuda.Event,
    ) -> None:
        self._tensor = tensor
        self._buffers = [_Buffer(pinned_like(tensor), event()) for _ in range(TURNS)]
        self._turn = 0

    def begin(self, rows: int) -> NDArray[Any]:
        self._turn = (self._turn + 1) % TURNS
        buffer = self._buffers[self._turn]
        if not buffer.copied.query():
            buffer.copied.synchronize()
        memory: NDArray[Any] = buffer.pinned.numpy()
        return memory[:rows]

    def end(self, rows: int) -> None:
        buffer = self._buffers[self._turn]
        self._tensor[:rows].copy_(buffer.pinned[:rows], non_blocking=True)
        buffer.copied.record()
