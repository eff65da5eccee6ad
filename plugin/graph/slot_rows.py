"""The memory of the slots: a row of bytes for each, of which every slot tensor is a range of columns.

So a version is one row, whatever the number of its edits: one copy installs it, one fill clears it, and one read
compares it between workers. A compiled graph takes few inputs, the rows of a layer as each type, and makes the slot
tensors as views inside: collecting an input costs Python a microsecond in every step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # of every tensor's start: compiled GPU code wants 16, and this is a cache line of a CPU


@dataclass(frozen=True)
class Columns:
    """Place of one tensor in every row."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        """The byte after its last."""
        return self.start + prod(self.shape) * self.dtype.itemsize

    def of(self, rows: Tensor, begin: int = 0) -> Tensor:
        """The tensor in all rows at once, as a view [S, *shape]. rows: of its type, from the byte `begin` on."""
        first, size = (self.start - begin) // self.dtype.itemsize, prod(self.shape)
        return rows[:, first : first + size].view(rows.shape[0], *self.shape)


class Layout:
    """Hands out columns one after the other."""

    def __init__(self) -> None:
        self.width = 0
        """bytes of a row"""

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Columns:
        """The next columns, for a tensor of this shape in each row."""
        columns = Columns(self.width, shape, dtype)
        self.width = _aligned(columns.stop)
        return columns

    def rows(self, count: int, device: torch.device, *, pinned: bool = False) -> Tensor:
        """Rows of zeros."""
        return torch.zeros(count, self.width, dtype=torch.uint8, device=device, pin_memory=pinned)


class Rows(nn.Module):
    """The rows of all slots, a part for each layer, as every type that the tensors in it have.

    Layers that are alike have the same places in their parts, so that they share compiled code. All parts are buffers
    of one module: Python looks up each in every step, and the path through the modules of a layer is long.
    """

    def __init__(self, rows: Tensor, layers: Mapping[int | None, Collection[Columns]]) -> None:
        """layers: the columns of each layer's part; None stands for the columns outside the layers."""
        super().__init__()
        self._begins: dict[int | None, int] = {}
        for layer, held in layers.items():
            begin = self._begins[layer] = min(columns.start for columns in held)
            stop = max(_aligned(columns.stop) for columns in held)
            for dtype in {columns.dtype for columns in held}:
                self.register_buffer(_name(layer, dtype), rows[:, begin:stop].view(dtype), persistent=False)

    def release(self) -> None:
        """Give back the memory. No tensor can be had afterwards."""
        self._buffers.clear()

    def tensor(self, layer: int | None, columns: Columns) -> Tensor:
        """One of the tensors, in every slot: [S, *shape]."""
        return columns.of(getattr(self, _name(layer, columns.dtype)), self._begins[layer])


def _aligned(byte: int) -> int:
    return -(-byte // ALIGNMENT) * ALIGNMENT


def _name(layer: int | None, dtype: torch.dtype) -> str:
    return f"layer_{layer}_as_{str(dtype).removeprefix('torch.')}"
