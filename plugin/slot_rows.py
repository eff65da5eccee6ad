"""The memory of the slots: a row of bytes for each, of which every slot tensor is a range of columns.

So a version is one row: it is installed by one copy, cleared by one fill, and compared between workers by one read,
whatever the number of its edits. And a compiled graph takes few inputs, the rows as each type, of which slot tensors
are views inside: collecting an input costs Python a microsecond in every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

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
        """The tensor in all rows [S, width] at once, which are of its type, as a view [S, *shape]."""
        size = self.dtype.itemsize
        return rows[:, self.start // size : self.stop // size].view(rows.shape[0], *self.shape)


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


class Rows(nn.Module):
    """The rows of all slots, as each type that their tensors have."""

    def __init__(self, rows: Tensor, dtypes: Iterable[torch.dtype]) -> None:
        super().__init__()
        for dtype in dtypes:
            self.register_buffer(_name(dtype), rows.view(dtype), persistent=False)

    def as_type(self, dtype: torch.dtype) -> Tensor:
        """[S, numbers of that type in a row]."""
        rows: Tensor = getattr(self, _name(dtype))
        return rows


def _name(dtype: torch.dtype) -> str:
    return f"as_{str(dtype).removeprefix('torch.')}"  # without a prefix some are methods of every module
