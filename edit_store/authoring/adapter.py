"""Low-rank updates of several projections, to be trained (LoRA, arXiv 2106.09685).

y += (alpha / rank) write^T read x       read [rank, in] uniform within 1 / sqrt(in), write [rank, out] zeros
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.authoring.method import Inputs
from vllm_edits.edit_store.authoring.training import Trained
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.edit_store.sites import Site


@dataclass(frozen=True)
class Adapter:
    """Updates by site, each as read and write."""

    parts: dict[Site, tuple[Tensor, Tensor]]
    factor: float
    reads: dict[str, str]
    """the point that a projection reads, by its output's"""

    @classmethod
    def begun(
        cls, inputs: Inputs, layers: Sequence[int], points: Sequence[str], *, rank: int, alpha: float,
        random: torch.Generator, device: torch.device,
    ) -> Adapter:  # fmt: skip
        """An adapter that changes nothing yet."""
        widths, reads = inputs.base.widths, supported(inputs.base.architecture).projections()
        parts = {}
        for layer in layers:
            for point in points:
                wide = widths.of(reads[point])
                read = (torch.rand(rank, wide, generator=random) * 2 - 1) / wide**0.5
                write = torch.zeros(rank, widths.of(point))
                parts[Site(layer, point)] = read.to(device).requires_grad_(), write.to(device).requires_grad_()
        return cls(parts, alpha / rank, reads)

    @property
    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        return [each for pair in self.parts.values() for each in pair]

    def edits(self) -> Trained:
        """The updates as edits."""
        return [
            (LowRank(site=str(site), reads=str(site.beside(self.reads[site.point])), rank=len(read)),
             {"read": read, "write": self.factor * write})
            for site, (read, write) in self.parts.items()
        ]  # fmt: skip


def projection_problems(points: Sequence[str], inputs: Inputs) -> Iterator[Reason]:
    """Points at which the model has no projection."""
    there = supported(inputs.base.architecture).projections()
    for point in points:
        if point not in there:
            yield Reason("site", f"{inputs.base.architecture} has no projection at {point}: it has {', '.join(there)}")
