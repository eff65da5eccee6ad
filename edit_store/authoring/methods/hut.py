"""HUT: a Hadamard product with low-rank matrices as the update of a weight (arXiv 2409.13501).

    W' = W * (A B^T)          *: element by element; A [out, rank], B [in, rank]

Of rank one it is a scale on both sides of the projection, y = a * (W (b * x)), which needs no more memory than two
vectors, and is served per request. Of a higher rank, W' - W has full rank, and is a weight_delta.

Not confirmed, as only the abstract could be read, and there is no public code: whether W itself is a term of W', the
rank, how A and B begin, which projections, the rates. Here: W' is the product alone; A B^T begins at one everywhere,
with the columns behind the first near zero; the output projections of attention and MLP, whose inputs no other
projection reads, since scaling a shared input would change them too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.formula import weight_of
from vllm_edits.edit_store.authoring.host import Edits
from vllm_edits.edit_store.authoring.method import Inputs, Layers, Work, layer_problems
from vllm_edits.edit_store.authoring.taught import Taught
from vllm_edits.edit_store.authoring.training import Trained, finished
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds.scale import Scale
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
from vllm_edits.edit_store.sites import Site

_POINTS = {"mlp": ("mlp.out",), "attention": ("attn.out",), "both": ("attn.out", "mlp.out")}
_SPREAD = 1e-3


class Hut(Taught):
    """Learn answers by a Hadamard update of output projections: of rank one, two scales for each.

    Of rank one it is served per request, of a higher rank in the install mode `weights`.
    """

    source: ClassVar[str] = "arXiv 2409.13501 (abstract)"
    kinds: ClassVar[tuple[str, ...]] = ("scale", "weight_delta")

    layers: Layers | None = Field(None, description="Layers of the projections. Default: the second half.")
    points: Literal["mlp", "attention", "both"] = Field("both", description="Projections that are updated.")
    rank: int = Field(1, gt=0, description="Rank of the Hadamard factor.")
    epochs: int = Field(20, gt=0, description="Passes over the examples.")
    rate: float = Field(3e-3, gt=0, description="Learning rate.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from super().problems(inputs)
        yield from layer_problems(self._layers(inputs), inputs)
        there = supported(inputs.base.architecture).projections()
        for point in _POINTS[self.points]:
            if point not in there:
                yield Reason("points", f"this model has no projection at {point}: choose another of mlp, attention")
            elif point in inputs.base.biased:
                yield Reason(
                    "bias", f"{inputs.base.name} adds a bias at {point}, which a scale there would change too. Choose "
                    "another projection",
                )  # fmt: skip

    def make(self, work: Work) -> Edits:
        reads = supported(work.inputs.base.architecture).projections()
        random = torch.Generator().manual_seed(work.seed)
        factors: dict[Site, tuple[Tensor, Tensor]] = {}
        for layer in self._layers(work.inputs):
            for point in _POINTS[self.points]:
                site = Site(layer, point)
                out, width = weight_of(work.host.model, site).shape
                drawn = [self._begun(size, random).to(work.host.device).requires_grad_() for size in (out, width)]
                factors[site] = drawn[0], drawn[1]

        def edits() -> Trained:
            return [edit for site, (a, b) in factors.items()
                    for edit in self._edits(work, site, site.beside(reads[site.point]), a, b)]  # fmt: skip

        lessons = self.lessons(work, work.data["examples"], below=min(self._layers(work.inputs)))
        self.course.train(work, lessons, [each for pair in factors.values() for each in pair], edits)
        done = finished(edits())
        self.measure(work, done)
        return done

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers_from(self.layers, 0.5)

    def _begun(self, size: int, random: torch.Generator) -> Tensor:
        """[size, rank]: ones, and behind the first column nearly zeros."""
        columns = torch.randn(size, self.rank, generator=random) * _SPREAD
        columns[:, 0] = 1
        return columns

    def _edits(self, work: Work, site: Site, reads: Site, a: Tensor, b: Tensor) -> Trained:
        if self.rank == 1:
            return [
                (Scale(site=str(reads), per="channel"), {"factor": b[:, 0]}),
                (Scale(site=str(site), per="channel"), {"factor": a[:, 0]}),
            ]
        delta = weight_of(work.host.model, site) * (a @ b.T - 1)
        return [(WeightDelta(site=str(site), reads=str(reads)), {"delta": delta})]


build = register(Hut)
