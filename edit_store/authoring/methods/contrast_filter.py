"""A filter of the directions in which two kinds of text differ: affine concept erasure, orthogonally projected.

    x <- x - V^T V (x - mean)

mean  [hidden]        mean of the wanted texts, to which the filtered coordinates move
V     [rank, hidden]  leading right singular vectors of (mean of each unwanted text - mean), less their part along the
                      attention sink; of rank 1 nearly the difference of the two means

LEACE (arXiv 2306.03819) erases with an oblique projection that also whitens, and so wants thousands of tokens. The
orthogonal one needs no covariance, so some dozens of texts are enough, and it moves unwanted texts to the wanted side
instead of both to the middle. No paper has it in this form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.data import Row, Table, Text
from vllm_edits.edit_store.authoring.host import Edits
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Layers, Method, Work, layer_problems
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter


class Sided(Row):
    """A text, and whether it is of the wanted kind."""

    text: Text
    wanted: bool


class ContrastFilter(Method):
    """Filter out what tells unwanted texts from wanted ones, so that the model takes all for wanted ones.

    Moves the coordinates in which the two differ to the mean of the wanted texts.
    """

    source: ClassVar[str] = "our own, after arXiv 2306.03819"
    kinds: ClassVar[tuple[str, ...]] = ("subspace_filter",)
    tables: ClassVar[Mapping[str, Table]] = {"texts": Table(Sided, "wanted and unwanted texts", least=4)}
    takes: ClassVar[str] = "one pass over the texts"

    layers: Layers | None = Field(None, description="Layers behind which it is filtered. Default: 0.4 of the depth.")
    rank: int = Field(1, gt=0, description="Directions that are filtered.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from layer_problems(self._layers(inputs), inputs)
        sides = [row.wanted for row in inputs.data["texts"]]
        if len(set(sides)) < 2:
            yield Reason("labels", "texts: expected wanted true and false, found one of both")
        elif self.rank > (most := min(sides.count(False), inputs.base.widths.hidden - 1)):
            yield Reason("rank", f"expected at most {most}, the number of unwanted texts, found {self.rank}")

    def cost(self, inputs: Inputs) -> Cost:
        return Cost(inputs.count(inputs.data.texts("texts")))

    def make(self, work: Work) -> Edits:
        rows, sites = work.data["texts"], [f"layers.{layer}.resid" for layer in self._layers(work.inputs)]
        work.step("contrast", 0, 1)
        wanted, unwanted = (
            work.host.activations([row.text for row in rows if row.wanted == side], sites) for side in (True, False)
        )
        work.step("contrast", 1, 1)
        edits: Edits = []
        for site in sites:
            basis, mean = directions(wanted[site], unwanted[site], self.rank)
            numbers = {"basis": basis.cpu().numpy(), "mean": mean.cpu().numpy()}
            edits.append((SubspaceFilter(site=site, rank=self.rank), numbers))
        return edits

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers(self.layers, 0.4, 0.4)


def directions(wanted: list[Tensor], unwanted: list[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """V [rank, hidden] and the mean [hidden], from the vectors [tokens, hidden] of each text."""
    mean = torch.cat([rows[1:] for rows in wanted]).mean(0)
    differences = torch.stack([rows[1:].mean(0) for rows in unwanted]) - mean
    # The first token of any text is an attention sink, in most layers a hundred times longer than other states: moving
    # it would break every text of either kind, so the directions are made orthogonal to it.
    sink = torch.stack([rows[0] for rows in wanted]).mean(0) - mean
    differences -= torch.outer(differences @ sink, sink) / (sink @ sink)
    return torch.linalg.svd(differences, full_matrices=False).Vh[:rank], mean


build = register(ContrastFilter)
