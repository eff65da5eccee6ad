"""LocFT-BF: localised fine-tuning, breadth first, of one matrix (arXiv 2509.22072; code: ICT-STAR/LocFT).

    W <- W + delta        all other weights frozen; every epoch goes through all edits in a new order

As in the code: the down projection at the depth of layer 22 of 32, at most 25 epochs of batches of 100, Adam at 5e-4,
the loss on the answer alone with the end of the text behind it, no step for a batch whose loss is below 0.01, and the
end when an epoch's mean is. No token for padding is added.

With `error` or `rank` the delta becomes an edit of low rank, which a server applies per request; the build tells the
rest that is lost, and refuses more than `error`.
"""

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
from vllm_edits.edit_store.authoring.low_rank_of import shortened
from vllm_edits.edit_store.authoring.method import Inputs, Work, layer_problems
from vllm_edits.edit_store.authoring.taught import Taught
from vllm_edits.edit_store.authoring.training import Course, finished
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
from vllm_edits.edit_store.sites import Site

Projection = Literal["mlp.out", "gate.out", "up.out", "attn.out", "q.out", "k.out", "v.out"]


class LocftBf(Taught):
    """Learn answers by fine-tuning one matrix, breadth first over all examples.

    The result changes a whole matrix, and is served in the install mode `weights`; with --error or --rank it is of low
    rank, and served per request.
    """

    source: ClassVar[str] = "arXiv 2509.22072"
    kinds: ClassVar[tuple[str, ...]] = ("weight_delta", "low_rank")
    takes: ClassVar[str] = "a training of up to 25 epochs"

    layer: int | None = Field(None, ge=0, description="Layer of the matrix. Default: the depth of 22 of 32.")
    point: Projection = Field("mlp.out", description="Output of the matrix.")
    epochs: int = Field(25, gt=0, description="The most passes over the examples.")
    batch: int = Field(100, gt=0, description="Examples in one step.")
    rate: float = Field(5e-4, gt=0, description="Learning rate.")
    end: bool = Field(True, description="Teach too that the text ends behind the answer.")
    enough: float = Field(1e-2, ge=0, description="Mean loss at which the training ends.")
    rank: int | None = Field(None, gt=0, description="Rank that the delta is shortened to. Default: as it is.")
    error: float | None = Field(None, gt=0, lt=1, description="Part of the delta that may be lost by that.")

    def changes(self, inputs: Inputs) -> int:
        return len(inputs.data["examples"])

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from super().problems(inputs)
        yield from layer_problems([self._site(inputs).layer or 0], inputs)
        there = supported(inputs.base.architecture).projections()
        if self.point not in there:
            yield Reason("point", f"expected a projection of this model: {', '.join(there)}, found {self.point}")

    @property
    def course(self) -> Course:
        return Course(self.epochs, self.batch, self.rate, enough=self.enough)

    def make(self, work: Work) -> Edits:
        site = self._site(work.inputs)
        reads = supported(work.inputs.base.architecture).projections()[site.point]
        delta = torch.zeros_like(weight_of(work.host.model, site)).requires_grad_()
        edit = WeightDelta(site=str(site), reads=str(site.beside(reads)))

        def whole() -> list[tuple[WeightDelta, dict[str, Tensor]]]:
            return [(edit, {"delta": delta})]

        lessons = self.lessons(work, work.data["examples"], below=site.layer or 0)
        self.course.train(work, lessons, [delta], whole)
        edits = finished(whole())
        if self.rank is not None or self.error is not None:
            edits = shortened(work, edits, rank=self.rank, error=self.error)
        self.measure(work, edits)
        return edits

    def _site(self, inputs: Inputs) -> Site:
        depth = round(22 / 32 * inputs.base.widths.layers) if self.layer is None else self.layer
        return Site(depth, self.point)


build = register(LocftBf)
