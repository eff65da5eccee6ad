"""Division of vectors among the workers of a tensor-parallel engine. Pure.

Heads and the inside of the MLP are divided: queries, keys, values, head outputs, gate, up and the input of the down
projection. Every worker has all of the other vectors. With one worker nothing is divided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_edits.edit_store.sites import Widths

AllReduce = Callable[[Tensor], Tensor]
"""Adds up the workers' parts of a sum, so that every worker has the total."""


def identity(partial: Tensor) -> Tensor:
    """The `AllReduce` of a worker that has the whole vector."""
    return partial


@dataclass(frozen=True)
class Shard:
    """One worker's part of a vector of width `whole`: `width` numbers from `start` on."""

    start: int
    width: int
    whole: int
    counts: bool = True
    """True if this worker counts these numbers in sums over workers: of several with the same part, one does"""

    @classmethod
    def all_of(cls, width: int) -> Shard:
        """The share of a worker that has the whole vector of this width."""
        return cls(0, width, width)

    @property
    def divided(self) -> bool:
        """True if other workers have the rest of the vector."""
        return self.width < self.whole

    def of(self, values: Tensor) -> Tensor:
        """This worker's part of values [..., whole]."""
        return values[..., self.start : self.start + self.width]

    def sum(self, over_workers: AllReduce) -> AllReduce:
        """Sum that makes a dot product with the vector whole; `over_workers` adds up all workers' parts."""
        if not self.divided:
            return identity
        return over_workers if self.counts else lambda partial: over_workers(torch.zeros_like(partial))


@dataclass(frozen=True)
class Rank:
    """Number of a worker, and the count of workers among which a model's heads are divided."""

    rank: int = 0
    size: int = 1

    def shard(self, widths: Widths, point: str) -> Shard:
        """This worker's part of the vector at a point of a model of these widths."""
        whole, width = widths.of(point), widths.per_worker(self.size).of(point)
        holders = self.size * width // whole  # of the same numbers
        return Shard(self.rank // holders * width, width, whole, counts=self.rank % holders == 0)


ONLY_RANK = Rank()
