"""SaRA: the smallest weights are trained, the others stay (arXiv 2409.06633; code: sjtuplayer/SaRA).

    W <- W + delta,  delta zero wherever |W| >= threshold
    loss + nuclear * |(W + delta) masked|_*        of one matrix, another one at random in each step

Half way the mask is drawn again: only entries that are still below the threshold are trained on (progressive). As in
the code: threshold 2e-3, rate 1e-3 exp(-350 threshold), the nuclear norm's weight 5e-4, AdamW with a decay of 0.01.
The code is for diffusion models, trains every matrix of them, and draws the mask again after 2500 steps; it also
begins at the absolute values of the weights it trains, where here they begin at the weights, and the decay acts on
their change. For language models there is no published result.

The bundle has the positions of all entries that changed, since they cannot be told from another copy of the base in
another precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.formula import weight_of
from vllm_edits.edit_store.authoring.host import Edits, EditWithNumbers
from vllm_edits.edit_store.authoring.method import Inputs, Layers, Work, layer_problems
from vllm_edits.edit_store.authoring.taught import Taught
from vllm_edits.edit_store.authoring.training import Course, Trained
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
from vllm_edits.edit_store.sites import Site

_DECAY = 1e-2


class Sara(Taught):
    """Learn answers by training only the smallest weights of the MLPs' down projections (a sparse update).

    The result is served in the install mode `weights`.
    """

    source: ClassVar[str] = "arXiv 2409.06633"
    kinds: ClassVar[tuple[str, ...]] = ("weight_delta",)

    threshold: float = Field(2e-3, gt=0, description="Weights smaller than this are trained.")
    layers: Layers | None = Field(None, description="Layers of the matrices. Default: the second half.")
    epochs: int = Field(20, gt=0, description="Passes over the examples.")
    rate: float | None = Field(None, gt=0, description="Learning rate. Default: 1e-3 exp(-350 threshold).")  # type: ignore[assignment]
    nuclear: float = Field(5e-4, ge=0, description="Weight of the nuclear norm.")
    progressive: bool = Field(True, description="Draw the mask again half way.")
    random_entries: bool = Field(False, description="Train as many random entries instead, as a control.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from super().problems(inputs)
        yield from layer_problems(self._layers(inputs), inputs)
        if "mlp.out" not in supported(inputs.base.architecture).projections():
            yield Reason("site", "sara trains down projections, and this model has experts instead")

    @property
    def course(self) -> Course:
        rate = 1e-3 * math.exp(-350 * self.threshold) if self.rate is None else self.rate
        return Course(self.epochs, self.batch, rate, _DECAY)

    def make(self, work: Work) -> Edits:
        layers, random = self._layers(work.inputs), torch.Generator().manual_seed(work.seed)
        weights = {layer: weight_of(work.host.model, Site(layer, "mlp.out")) for layer in layers}
        parts = {layer: _Part.of(weight, self._mask(weight, random)) for layer, weight in weights.items()}
        if empty := [layer for layer, part in parts.items() if not part.mask.any()]:
            raise BundleRefused("sara", [Reason(
                "nothing_small", f"no weight of the down projection is below {self.threshold:g} in the layers "
                f"{', '.join(map(str, empty))}. Raise threshold",
            )])  # fmt: skip
        lessons = self.lessons(work, work.data["examples"], below=min(layers))
        half = self.course.steps(len(lessons)) // 2

        def edits() -> Trained:
            return [(_edit(layer), {"delta": part.delta()}) for layer, part in parts.items()]

        def nuclear_norm() -> Tensor:
            chosen = layers[int(torch.randint(len(layers), (), generator=random))]
            return self.nuclear * parts[chosen].nuclear_norm()

        def redrawn(step: int) -> None:
            if self.progressive and step == half:
                for part in parts.values():
                    part.redraw(self.threshold)

        self.course.train(
            work, lessons, [part.change for part in parts.values()], edits,
            penalty=nuclear_norm if self.nuclear else None, after_step=redrawn, random=random,
            changing=[tensor for part in parts.values() for tensor in (part.weight, part.mask, part.fixed)],
        )  # fmt: skip
        done = [_sparse(layer, part.delta().detach()) for layer, part in parts.items()]
        self.measure(work, done)
        return done

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers_from(self.layers, 0.5)

    def _mask(self, weight: Tensor, random: torch.Generator) -> Tensor:
        mask = weight.abs() < self.threshold
        if not self.random_entries:
            return mask
        order = torch.randperm(mask.numel(), generator=random).to(mask.device)
        return mask.flatten()[order].view_as(mask)


@dataclass
class _Part:
    """One matrix: its weights with all that was fixed so far, the entries that are trained, and their change."""

    weight: Tensor
    mask: Tensor
    change: Tensor
    fixed: Tensor

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor) -> _Part:
        return cls(weight.clone(), mask, torch.zeros_like(weight).requires_grad_(), torch.zeros_like(weight))

    def delta(self) -> Tensor:
        return self.fixed + self.change * self.mask

    def nuclear_norm(self) -> Tensor:
        norm: Tensor = torch.linalg.matrix_norm((self.weight + self.change) * self.mask, ord="nuc")
        return norm

    @torch.no_grad()
    def redraw(self, threshold: float) -> None:
        """Fix the change so far, and go on with the entries that are still small."""
        self.weight += self.change * self.mask
        self.fixed += self.change * self.mask
        self.mask &= self.weight.abs() < threshold
        self.change.zero_()


def _edit(layer: int) -> WeightDelta:
    return WeightDelta(site=f"layers.{layer}.mlp.out", reads=f"layers.{layer}.mlp.h")


def _sparse(layer: int, delta: Tensor) -> EditWithNumbers:
    rows, columns = delta.nonzero(as_tuple=True)
    whole = _edit(layer)
    edit = WeightDelta(site=whole.site, reads=whole.reads, layout="sparse", count=len(rows))
    numbers = {"rows": rows.int(), "columns": columns.int(), "values": delta[rows, columns]}
    return edit, {name: tensor.cpu().numpy() for name, tensor in numbers.items()}


build = register(Sara)
