"""How vectors are divided among the workers of a tensor-parallel engine. Pure.

Heads and the MLP's inside are divided: queries, keys, values, head outputs, gate, up and what the down projection
reads. Every worker has all of the other vectors. With one worker nothing is divided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_edits.edit_store.sites import Widths

AllReduce = Callable[[Tensor], Tensor]
"""Adds up what the workers each have of a sum, so that every one has the total."""


def identity(partial: Tensor) -> Tensor:
    """The `AllReduce` of a worker that has the whole vector."""
    return partial


@dataclass(frozen=True)
class Shard:
    """What one worker has of a vector of width `whole`: `width` numbers from `start` on."""

    start: int
    width: int
    whole: int
    counts: bool = True
    """whether it speaks for these numbers in sums over all workers: of several that have the same, one does"""

    @classmethod
    def all_of(cls, width: int) -> Shard:
        """The whole vector, of this width."""
        return cls(0, width, width)

    @property
    def divided(self) -> bool:
        """Whether other workers have what this one has not."""
        return self.width < self.whole

    def of(self, values: Tensor) -> Tensor:
        """The worker's own of values [..., whole]."""
        return values[..., self.start : self.start + self.width]

    def sum(self, over_workers: AllReduce) -> AllReduce:
        """How a dot product with the vector becomes whole, where `over_workers` adds up all workers' parts of it."""
        if not self.divided:
            return identity
        return over_workers if self.counts else lambda partial: over_workers(torch.zeros_like(partial))


@dataclass(frozen=True)
class Rank:
    """Which one of how many workers among which a model's heads are divided."""

    rank: int = 0
    size: int = 1

    def shard(self, widths: Widths, point: str) -> Shard:
        """What this worker has of the vector at a point of a model of these widths."""
        whole, width = widths.of(point), widths.per_worker(self.size).of(point)
        holders = self.size * width // whole  # of the same numbers
        return Shard(self.rank // holders * width, width, whole, counts=self.rank % holders == 0)


ONLY_RANK = Rank()
