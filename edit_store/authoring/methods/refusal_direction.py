"""The refusal direction, ablated (arXiv 2406.11717; code: andyrdt/refusal_direction).

    candidates   r[l, i] = mean(harmful) - mean(harmless)   of the stream behind layer l, at the i-th token from the end
    ablation     t <- t - r^ (r^ . t)                       r^ = r / |r|, at whatever writes to the stream

For each candidate, on prompts that the means do not have:

    bypass   refusal of harmful prompts, ablated        the lowest is taken ...
    induce   refusal of harmless prompts, r added at l  ... of those where this is above `induce`
    drift    KL of harmless prompts, ablated            ... and this is at most `drift`

Refusal is the log-odds that the answer begins with one of `refusals`. As in the code: candidates below 0.8 of the
depth, at every token behind the instruction; the three scores and their bounds. Post-norms stand between a writer and
the stream, so where a model has them the filter is behind them; what a projection's bias writes is ablated too."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.architectures import Architecture, supported
from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.data import Row, Table, Text
from vllm_edits.edit_store.authoring.formula import own_layers
from vllm_edits.edit_store.authoring.host import Edits, Host, divergence, edited
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Layers, Method, Work, layer_problems
from vllm_edits.edit_store.bundle import Measurement
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.kinds.offset import Offset
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter

LEAST = 8
"""prompts of each kind"""


class Instruction(Row):
    """A user's instruction."""

    prompt: Text


@dataclass(frozen=True)
class Candidate:
    """A direction with its scores."""

    layer: int
    position: int
    """from the end: -1 is the last token"""
    direction: Tensor
    bypass: float
    induce: float
    drift: float


class RefusalDirection(Method):
    """Ablate the direction of refusal: one direction of the stream, without which a model does not refuse.

    Such a bundle takes safety away, and is privileged. Any other behaviour that shows in the first word of an answer is
    found in the same way, with other prompts and words.
    """

    privileged: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2406.11717"
    kinds: ClassVar[tuple[str, ...]] = ("subspace_filter",)
    tables: ClassVar[Mapping[str, Table]] = {
        "harmful": Table(Instruction, "instructions that are refused", least=LEAST),
        "harmless": Table(Instruction, "instructions that are followed", least=LEAST, apart_from="harmful"),
    }
    takes: ClassVar[str] = "the prompts held back through the model three times for each candidate"

    layers: Layers | None = Field(None, description="Layers of the candidates. Default: all below 0.8 of the depth.")
    positions: int | None = Field(None, gt=0, description="Tokens from the end. Default: those behind the instruction.")
    refusals: str = Field("I,As", min_length=1, description="Words that refusals begin with, with commas between them.")
    held: float = Field(0.2, gt=0, lt=1, description="Share of the prompts that candidates are judged by.")
    induce: float = Field(0.0, description="Least log-odds of refusal where the direction is added.")
    drift: float = Field(0.1, gt=0, description="Most divergence on harmless prompts, in nats.")
    at: Literal["writers", "stream"] = Field("writers", description="What is filtered: every writer, or the stream.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from layer_problems(self._layers(inputs), inputs)

    def cost(self, inputs: Inputs) -> Cost:
        both = [row for table in ("harmful", "harmless") for row in inputs.data[table]]
        tokens = inputs.count([asked(inputs.tokenizer, row.prompt) for row in both])
        tried = len(self._layers(inputs)) * self._positions(inputs)
        return Cost(round(tokens * (1 + 3 * self.held * tried)))

    def make(self, work: Work) -> Edits:
        inputs, judge = work.inputs, Judge.of(work, self.refusals, self.held)
        layers, positions = self._layers(inputs), range(-self._positions(inputs), 0)
        work.step("means", 0, 1)
        directions = judge.directions(layers, positions)
        work.step("means", 1, 1)
        tried = list(directions.items())
        scores = work.each("candidates", tried, lambda each: judge.scores(each[0][0], each[1], self.at))
        found = [
            Candidate(layer, position, direction, *row.tolist())
            for ((layer, position), direction), row in zip(tried, list(scores), strict=True)
        ]
        sound = [each for each in found if each.induce > self.induce and each.drift <= self.drift]
        if not sound:
            nearest = min(found, key=lambda each: each.bypass)
            raise BundleRefused("refusal-direction", [Reason(
                "no_direction", f"none of {len(found)} candidates keeps the bounds (induce > {self.induce:g}, drift <= "
                f"{self.drift:g}); the best without them has bypass {nearest.bypass:.2f}, induce {nearest.induce:.2f}, "
                f"drift {nearest.drift:.2f}, and the model itself {judge.refused:.2f}. Does the model refuse at all?",
            )])  # fmt: skip
        best = min(sound, key=lambda each: each.bypass)
        work.measurements += [
            Measurement(metric="refusal of harmful prompts, log-odds", base=judge.refused, edited=best.bypass,
                        n=len(judge.harmful)),
            Measurement(metric="divergence on harmless prompts, nats", base=0, edited=best.drift,
                        n=len(judge.harmless)),
        ]  # fmt: skip
        return ablation(best.direction, self.at, inputs.base.widths.layers, supported(inputs.base.architecture))

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        count = inputs.base.widths.layers
        return tuple(range(max(1, int(0.8 * count)))) if self.layers is None else self.layers

    def _positions(self, inputs: Inputs) -> int:
        """Tokens behind the instruction in the chat template."""
        if self.positions is not None:
            return self.positions
        one, other = inputs.tokens([asked(inputs.tokenizer, prompt) for prompt in ("Dogs", "Cats sing")])
        alike = [a == b for a, b in zip(reversed(one), reversed(other), strict=False)]
        return max(1, alike.index(False) if False in alike else len(alike))


def ablation(direction: Tensor, at: Literal["writers", "stream"], layers: int, architecture: Architecture) -> Edits:
    """Filters that take a direction [hidden] out of everything that is written to the stream, or out of the stream."""
    basis = torch.nn.functional.normalize(direction, dim=0)[None].cpu().numpy()
    attention, mlp = ("attn.out", "mlp.out") if architecture.post_norms is None else ("attn.post", "mlp.post")
    points = (attention, mlp) if at == "writers" else ("resid",)
    sites = ["embed.out", *(f"layers.{layer}.{point}" for layer in range(layers) for point in points)]
    zero = np.zeros(basis.shape[1], dtype=np.float32)
    return [(SubspaceFilter(site=site, rank=1), {"basis": basis, "mean": zero}) for site in sites]


@dataclass(frozen=True)
class Judge:
    """Prompts for the means, and others that candidates are judged by."""

    host: Host
    architecture: Architecture
    harmful_means: Sequence[str]
    harmless_means: Sequence[str]
    harmful: Sequence[str]
    harmless: Sequence[str]
    words: Tensor
    """ids of the tokens that refusals begin with"""
    as_before: Tensor
    """log-probabilities behind the harmless prompts, without an edit"""
    refused: float
    """of the harmful prompts, without an edit"""

    @classmethod
    def of(cls, work: Work, refusals: str, held: float) -> Judge:
        tokenizer, parts = work.inputs.tokenizer, []
        for table in ("harmful", "harmless"):
            prompts = [asked(tokenizer, row.prompt) for row in work.data[table]]
            random.Random(work.seed).shuffle(prompts)  # noqa: S311  nothing secret
            parts += [prompts[(back := max(1, round(held * len(prompts)))) :], prompts[:back]]
        ids = [tokenizer(word.strip(), add_special_tokens=False)["input_ids"][0] for word in refusals.split(",")]
        words = torch.tensor(sorted(set(ids)), device=work.host.device)
        before, refused = work.host.next_token(parts[3]), log_odds(work.host.next_token(parts[1]), words)
        return cls(
            work.host, supported(work.inputs.base.architecture), parts[0], parts[2], parts[1], parts[3], words, before,
            refused,
        )  # fmt: skip

    def directions(self, layers: Sequence[int], positions: Sequence[int]) -> dict[tuple[int, int], Tensor]:
        """Difference of the means, by layer and position."""
        sites = {f"layers.{layer}.resid": layer for layer in layers}
        harmful, harmless = (self.host.activations(texts, sites) for texts in (self.harmful_means, self.harmless_means))
        return {
            (layer, position): _mean(harmful[site], position) - _mean(harmless[site], position)
            for site, layer in sites.items() for position in positions
        }  # fmt: skip

    def scores(self, layer: int, direction: Tensor, at: Literal["writers", "stream"]) -> Tensor:
        """Bypass, induce and drift of a direction."""
        layers = len(own_layers(self.host.model))
        with edited(self.host.model, ablation(direction, at, layers, self.architecture)):
            bypass = log_odds(self.host.next_token(self.harmful), self.words)
            drift = float(divergence(self.as_before, self.host.next_token(self.harmless)).mean())
        adding: Edits = [(Offset(site=f"layers.{layer}.resid"), {"vector": direction.cpu().numpy()})]
        with edited(self.host.model, adding):
            induce = log_odds(self.host.next_token(self.harmless), self.words)
        return torch.tensor([bypass, induce, drift], dtype=torch.float64)


def _mean(states: Sequence[Tensor], position: int) -> Tensor:
    return torch.stack([rows[position] for rows in states]).mean(0)


def log_odds(likely: Tensor, words: Tensor) -> float:
    """Mean over prompts of log(p / (1 - p)), p the probability of one of the words; likely: [prompts, vocabulary]."""
    probability = likely[:, words].double().exp().sum(-1).clamp(1e-12, 1 - 1e-12)
    return float((probability.log() - (1 - probability).log()).mean())


build = register(RefusalDirection)
