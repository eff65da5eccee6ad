"""Sahara: safety heads of a whole dataset, found greedily (arXiv 2410.13708; code: ydyjya/SafetyHeadAttribution).

    M        [prompts, hidden]  the last states: behind the last norm, at the last token of every prompt
    score    the angle between the first left singular vectors of M and of M without the head, in degrees

The head with the largest angle stays masked, and the search begins again, `steps` times. As in the code: the prompts'
frame, queries scaled by 1e-5, left singular vectors (which are over prompts, so a head counts that moves prompts
apart).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.head_search import HeadSearch
from vllm_edits.edit_store.authoring.heads import Head, without
from vllm_edits.edit_store.authoring.host import Edits, batches
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Work
from vllm_edits.edit_store.bundle import Measurement

FRAME = "## Query:{}\n## Answer:"
"""The frame of a prompt, as in the code."""


class Sahara(HeadSearch):
    """Remove the attention heads that move a whole set of prompts most, found one after the other.

    Meant for safety heads: such a bundle takes safety away, and is privileged. The list of heads that it writes beside
    the bundle says what other edits must not touch.
    """

    privileged: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2410.13708"
    takes: ClassVar[str] = "the prompts through the model once for each head and step"

    chat: bool = Field(False, description="Use the model's chat template instead of the source's frame.")
    steps: int = Field(1, gt=0, description="Heads that are found, one after the other.")

    def cost(self, inputs: Inputs) -> Cost:
        return Cost(self.steps * self._masked_tokens(inputs))

    def make(self, work: Work) -> Edits:
        prompts = self._prompts(work.inputs)
        base = work.host.last_states(prompts)
        found: dict[Head, float] = {}
        for step in range(self.steps):
            scores = self._scores(work, prompts, base, list(found), step)
            best = max(scores, key=scores.__getitem__)
            found[best] = scores[best]
        work.measurements.append(
            Measurement(
                metric="angle of the prompts' main direction, degrees", base=0, edited=found[best], n=len(prompts)
            )
        )
        return self._edits(work, found)

    def _prompts(self, inputs: Inputs) -> list[str]:
        if self.chat:
            return super()._prompts(inputs)
        return [FRAME.format(row.prompt) for row in inputs.data["prompts"]]

    def _scores(self, work: Work, prompts: list[str], base: Tensor, chosen: list[Head], step: int) -> dict[Head, float]:
        """Every further head's angle, with those that are chosen masked."""
        layers, count = self._layers(work.inputs), work.inputs.base.widths.heads
        how = self.mask, self.factor, work.inputs.base

        def angles(layer: int) -> Tensor:
            """Angle of every further head of the layer, in their order."""
            heads = further(layer)
            states: dict[Head, list[Tensor]] = {head: [] for head in heads}
            below = [head for head in chosen if head[0] < layer]
            others = [head for head in chosen if head[0] >= layer]
            for some in batches(prompts):
                with without(work.host, below, *how), work.host.replaying(some, below=layer):
                    for head in heads:
                        with without(work.host, [*others, head], *how):
                            states[head].append(work.host.last_states(some))
            return torch.tensor([angle(base, torch.cat(rows)) for rows in states.values()], dtype=torch.float64)

        def further(layer: int) -> list[Head]:
            return [(layer, head) for head in range(count) if (layer, head) not in chosen]

        found = list(work.each(f"heads, {step + 1} of {self.steps}", layers, angles))
        return {
            head: float(score)
            for layer, row in zip(layers, found, strict=True)
            for head, score in zip(further(layer), row, strict=True)
        }  # fmt: skip


def angle(one: Tensor, other: Tensor) -> float:
    """Degrees between the first left singular vectors of two matrices [prompts, hidden]."""
    first, second = (torch.linalg.svd(states, full_matrices=False).U[:, 0] for states in (one, other))
    return float(torch.rad2deg(torch.acos((first @ second).abs().clamp(max=1))))


build = register(Sahara)
