"""Counts on the device of how often edits fire, inside the compiled graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_edits.plugin.graph.carried import Carried

COUNTED = torch.float64
"""The type of a count."""


class FiringCounters(nn.Module):
    """Number of tokens at which each neuron of every edit fired, by slot. Not a part of a slot's content.

    Neurons note their firings while the model runs, and the last one adds all of them in one operation: an operation
    for each group would be nine calls of torch more, for every group. Counts are float64, which is exact up to 2^53:
    torch's compiler has no kernel that adds int64 on a GPU, and sorts instead.
    """

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.neurons = 0
        self._columns: list[int] = []
        """the first of each group"""
        self._noted = Carried()

    def take(self, count: int) -> int:
        """The first of `count` columns for the neurons of a group of edits."""
        column = self.neurons
        self._columns.append(column)
        self.neurons += count
        return column

    def bind(self, slots: int, device: torch.device) -> None:
        """Make the counts [S, neurons], when every group has its columns."""
        counts = torch.zeros(slots, self.neurons, dtype=COUNTED, device=device)
        self.register_buffer("counts", counts, persistent=False)

    def note(self, column: int, fired: Tensor) -> None:
        """Note the tokens at which the neurons from `column` on fired: [T, rank] of bool."""
        self._noted.keep(f"column_{column}", fired)

    def add(self, slots: Tensor) -> None:
        """Add all that was noted to the counts of the tokens' slots, [T]."""
        names = [f"column_{column}" for column in self._columns]
        noted = torch.cat([self._noted.get(name) for name in names], dim=-1)
        self.counts.index_add_(0, slots, noted.to(COUNTED))
        for name in names:
            self._noted.drop(name)
