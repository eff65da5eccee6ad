"""LoFiT: localised fine-tuning on attention heads (arXiv 2406.01563; code: fc2869/lo-fit).

    stage 1   z <- (1 + A) z         A is trained at every head, with an L1 penalty; heads with a large |A| are kept
    stage 2   z <- z + v             v trained at those heads, without the penalty; only v is in the bundle

z     [heads * head_dim]   concatenated heads, before the output projection
A, v  [heads * head_dim]   begin near zero: normal, with a spread of 1e-3

As in the code: both stages with Adam, 5 epochs of 8 examples, rates 5e-3 and 1e-2, the L1 penalty 1e-3, DPO with a
beta of 0.5 where every example has a rejected answer. The number of heads is the paper's 3 % of all. Unlike the code,
a stage ends with its last epoch, and not with the best one on validation data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.data import Table
from vllm_edits.edit_store.authoring.heads import Head, listed
from vllm_edits.edit_store.authoring.host import Edits
from vllm_edits.edit_store.authoring.lessons import Lessons
from vllm_edits.edit_store.authoring.method import Inputs, Layers, Work, layer_problems
from vllm_edits.edit_store.authoring.taught import Example, Taught
from vllm_edits.edit_store.authoring.training import Course, Preferences, finished
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds.offset import Offset
from vllm_edits.edit_store.kinds.scale import Scale
from vllm_edits.edit_store.sites import Widths

HEADS_FILE = "heads.json"
"""File with the heads of stage 1, and the size of A at each."""
_SPREAD = 1e-3
_SHARE = 0.03


class Preferred(Example):
    """A prompt, how the model shall answer it, and optionally an answer that it shall not give."""

    rejected: str = ""


class Lofit(Taught):
    """Teach answers through offsets on a few attention heads, which a first training selects.

    With a `rejected` answer in every example it learns the preference (DPO), else the answers.
    """

    source: ClassVar[str] = "arXiv 2406.01563"
    kinds: ClassVar[tuple[str, ...]] = ("offset",)
    tables: ClassVar[Mapping[str, Table]] = {
        "examples": Table(Preferred, "prompts with the answers to learn"),
        "held_out": Table(Preferred, "prompts with answers to measure with", least=0, apart_from="examples"),
    }
    takes: ClassVar[str] = "two trainings of some epochs"

    heads: int | None = Field(None, gt=0, description="Heads that get an offset. Default: 3 % of all.")
    layers: Layers | None = Field(None, description="Layers whose heads are selected from. Default: all.")
    select_rate: float = Field(5e-3, gt=0, description="Learning rate of the selection.")
    penalty: float = Field(1e-3, ge=0, description="Weight of the L1 norm of A in the selection.")
    rate: float = Field(1e-2, gt=0, description="Learning rate of the offsets.")
    beta: float = Field(0.5, gt=0, description="Beta of DPO, where examples have rejected answers.")
    random_heads: bool = Field(False, description="Take random heads instead of the selected ones, as a control.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from super().problems(inputs)
        yield from layer_problems(self._layers(inputs), inputs)
        there = len(self._layers(inputs)) * inputs.base.widths.heads
        if self.heads is not None and self.heads > there:
            yield Reason("heads", f"expected at most the {there} heads of these layers, found {self.heads}")
        with_rejected = [bool(row.rejected) for row in inputs.data["examples"]]
        if any(with_rejected) and not all(with_rejected):
            yield Reason(
                "rejected", f"{with_rejected.count(False)} of {len(with_rejected)} examples have no rejected answer. "
                "Give one in every example, or in none",
            )  # fmt: skip

    def make(self, work: Work) -> Edits:
        widths, layers = work.inputs.base.widths, self._layers(work.inputs)
        count = self.heads or max(1, round(_SHARE * len(layers) * widths.heads))
        material = self._material(work, min(layers))
        random = torch.Generator().manual_seed(work.seed)
        sizes = self._selected(work, material, layers, random)
        if self.random_heads:
            order = torch.randperm(len(sizes), generator=random).tolist()
            chosen = [list(sizes)[number] for number in order[:count]]
        else:
            chosen = sorted(sizes, key=sizes.__getitem__, reverse=True)[:count]
        masks = _masks(chosen, widths, work.host.device)
        starts = {layer: _drawn(widths, random, work.host.device) * mask for layer, mask in masks.items()}
        vectors = {layer: start.requires_grad_() for layer, start in starts.items()}

        def offsets() -> list[tuple[Offset, dict[str, Tensor]]]:
            return [(Offset(site=f"layers.{layer}.attn.z"), {"vector": vector * masks[layer]})
                    for layer, vector in vectors.items()]  # fmt: skip

        self.course.train(work, material, list(vectors.values()), offsets, name="offsets")
        edits = finished(offsets())
        self.measure(work, edits)
        work.notes[HEADS_FILE] = listed({head: sizes[head] for head in chosen}, work.inputs.base, self.called())
        return edits

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers_from(self.layers, 0)

    def _passes(self, inputs: Inputs) -> int:
        pairs = any(row.rejected for row in inputs.data["examples"])
        return self.epochs * (4 if pairs else 2)

    def _material(self, work: Work, below: int) -> Lessons | Preferences:
        rows: Sequence[Preferred] = work.data["examples"]
        answers = self.lessons(work, rows, below=below)
        if not rows[0].rejected:
            return answers
        others = [Example(prompt=row.prompt, answer=row.rejected) for row in rows]
        return Preferences.of(answers, self.lessons(work, others, below=below), self.beta, self.batch)

    def _selected(
        self, work: Work, material: Lessons | Preferences, layers: Sequence[int], random: torch.Generator
    ) -> dict[Head, float]:
        """The size of A at every head."""
        widths = work.inputs.base.widths
        factors = {layer: _drawn(widths, random, work.host.device).requires_grad_() for layer in layers}

        def scales() -> list[tuple[Scale, dict[str, Tensor]]]:
            return [(Scale(site=f"layers.{layer}.attn.z", per="channel"), {"factor": 1 + factor})
                    for layer, factor in factors.items()]  # fmt: skip

        def sizes() -> Tensor:
            return self.penalty * torch.stack([factor.abs().sum() for factor in factors.values()]).sum()

        course = Course(self.epochs, self.batch, self.select_rate)
        course.train(work, material, list(factors.values()), scales, name="selection", penalty=sizes)
        return {
            (layer, head): float(part.detach().norm())
            for layer, factor in factors.items() for head, part in enumerate(factor.view(widths.heads, -1))
        }  # fmt: skip


def _drawn(widths: Widths, random: torch.Generator, device: torch.device) -> Tensor:
    return (torch.randn(widths.of("attn.z"), generator=random) * _SPREAD).to(device)


def _masks(heads: Sequence[Head], widths: Widths, device: torch.device) -> dict[int, Tensor]:
    """One at the channels of these heads, by layer."""
    masks = {layer: torch.zeros(widths.heads, widths.head_dim, device=device) for layer, _ in sorted(heads)}
    for layer, head in heads:
        masks[layer][head] = 1
    return {layer: mask.flatten() for layer, mask in masks.items()}


build = register(Lofit)
