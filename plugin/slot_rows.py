"""The memory of the slots: a row of bytes for each, of which every slot tensor is a range of columns.

So a version is one row: it is installed by one copy, cleared by one fill, and compared between workers by one read,
whatever the number of its edits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64  # of every tensor's start: compiled GPU code wants 16, and this is a cache line of a CPU


@dataclass(frozen=True)
class Columns:
    """Where one tensor lies in every row."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        """The byte after its last."""
        return self.start + prod(self.shape) * self.dtype.itemsize

    def of(self, rows: Tensor) -> Tensor:
        """The tensor in all rows [S, bytes] at once, as a view [S, *shape]."""
        return rows[:, self.start : self.stop].view(self.dtype).view(len(rows), *self.shape)


class Layout:
    """Hands out columns one after the other."""

    def __init__(self) -> None:
        self.width = 0
        """bytes of a row"""

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Columns:
        """The next columns, for a tensor of this shape in each row."""
        columns = Columns(self.width, shape, dtype)
        self.width = -(-columns.stop // ALIGNMENT) * ALIGNMENT
        return columns

    def rows(self, count: int, device: torch.device, *, pinned: bool = False) -> Tensor:
        """That many rows of zeros."""
        return torch.zeros(count, self.width, dtype=torch.uint8, device=device, pin_memory=pinned)
