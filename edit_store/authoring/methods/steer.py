"""Steering vectors from contrasts: a vector is added to the residual stream of every token.

    x <- x + strength v

    mean   v = mean(positive) - mean(negative)              contrastive activation addition (CAA, arXiv 2312.06681)
    pca    v = a (a . mean(positive - negative))            representation engineering (arXiv 2310.01405; repeng)

positive, negative  [pairs, hidden]  stream of the two texts of a pair, at their last token, or over all tokens but the
                                     first, which is an attention sink
a                   [hidden]         first principal axis of the differences and their opposites, so about zero

With `keep-norm` the vector keeps the length of what it is added to, as repeng can. CAA adds at the positions behind the
prompt alone, which is `scope` generated. `sweep` takes the one layer which, on the pairs, prefers the positive texts
most; what is told for `held_out` has no part in the choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.chat import asked, beginning
from vllm_edits.edit_store.authoring.data import Row, Table, Text
from vllm_edits.edit_store.authoring.host import Edits, EditWithNumbers, Host, edited
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Layers, Method, Work, layer_problems
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds.offset import Offset
from vllm_edits.edit_store.scope import Scope


class Pair(Row):
    """Two answers to a prompt, or with no prompt two texts: the model shall move from `negative` to `positive`."""

    positive: Text
    negative: Text
    prompt: str = ""


class Steer(Method):
    """Steer answers along the difference between two kinds of text (an offset to the residual stream).

    The vector has the length of the difference between the two kinds; requests may ask for more or less of it, or for
    its opposite, where the bundle is built with --strength.
    """

    source: ClassVar[str] = "arXiv 2312.06681 (mean), 2310.01405 (pca)"
    kinds: ClassVar[tuple[str, ...]] = ("offset",)
    tables: ClassVar[Mapping[str, Table]] = {
        "pairs": Table(Pair, "pairs of answers to one prompt, or of texts", least=2),
        "held_out": Table(Pair, "pairs to measure with", least=0, apart_from="pairs"),
    }
    takes: ClassVar[str] = "one pass over the pairs; with a sweep one more for each layer"

    layers: Layers | None = Field(None, description="Layers behind which it is added. Default: 0.4 of the depth.")
    direction: Literal["mean", "pca"] = Field("mean", description="How the direction is found.")
    tokens: Literal["last", "all"] = Field("last", description="Which tokens of the texts are compared.")
    size: float = Field(1.0, description="Factor on the vector; negative for the opposite.")
    scope: Literal["all", "generated"] = Field("all", description="Which tokens are steered.")
    keep_norm: bool = Field(False, description="Keep the length of the stream.")
    chat: bool = Field(False, description="Put prompts into the model's chat template.")
    sweep: bool = Field(False, description="Try each of the layers alone, and take the best.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from layer_problems(self._layers(inputs), inputs)
        if alike := [row for row in inputs.data["pairs"] if row.positive == row.negative]:
            yield Reason("alike", f"{len(alike)} pairs have the same text twice, for example {alike[0].positive!r}")

    def cost(self, inputs: Inputs) -> Cost:
        pairs, held = (self._count(inputs, inputs.data[table]) for table in ("pairs", "held_out"))
        return Cost(pairs * (1 + (len(self._layers(inputs)) + 1) * self.sweep) + 2 * held)

    def _count(self, inputs: Inputs, rows: Sequence[Pair]) -> int:
        texts = [*self._texts(inputs, rows, "positive"), *self._texts(inputs, rows, "negative")]
        return inputs.count(texts)

    def make(self, work: Work) -> Edits:
        inputs, pairs = work.inputs, work.data["pairs"]
        sites = [f"layers.{layer}.resid" for layer in self._layers(inputs)]
        work.step("contrast", 0, 1)
        positive = self._states(work.host, self._texts(inputs, pairs, "positive"), sites)
        negative = self._states(work.host, self._texts(inputs, pairs, "negative"), sites)
        vectors = {site: self.size * self._direction(positive[site], negative[site]) for site in sites}
        work.step("contrast", 1, 1)
        edits = [self._edit(site, vector) for site, vector in vectors.items()]
        if self.sweep:
            edits = [self._best(work, edits)]
        if held := work.data["held_out"]:
            metric = "preference held out, nats per token"
            work.measure(metric, edits, lambda: self._preference(work, held), len(held))
        return edits

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        if self.sweep:
            return inputs.layers(self.layers, 0.2, 0.8)
        return inputs.layers(self.layers, 0.4, 0.4)

    def _texts(self, inputs: Inputs, rows: Sequence[Pair], column: Literal["positive", "negative"]) -> list[str]:
        return [f"{self._prompt(inputs, row)}{getattr(row, column)}" for row in rows]

    def _prompt(self, inputs: Inputs, row: Pair) -> str:
        return asked(inputs.tokenizer, row.prompt) if self.chat and row.prompt else row.prompt

    def _states(self, host: Host, texts: Sequence[str], sites: Sequence[str]) -> dict[str, Tensor]:
        """[texts, hidden] by site."""
        found = {}
        for site, of in host.activations(texts, sites).items():
            rows = [states[-1] if self.tokens == "last" else states[1:].mean(0) for states in of]
            found[site] = torch.stack(rows)
        return found

    def _direction(self, positive: Tensor, negative: Tensor) -> Tensor:
        differences = positive - negative
        mean = differences.mean(0)
        return mean if self.direction == "mean" else principal(differences)

    def _edit(self, site: str, vector: Tensor) -> EditWithNumbers:
        scope = Scope(segment="generated") if self.scope == "generated" else Scope()
        return Offset(site=site, renorm=self.keep_norm, scope=scope), {"vector": vector.cpu().numpy()}

    def _best(self, work: Work, edits: Edits) -> EditWithNumbers:
        def preference(pair: EditWithNumbers) -> Tensor:
            with edited(work.host.model, [pair]):
                return torch.tensor(self._preference(work, work.data["pairs"]), dtype=torch.float64)

        found = [float(each) for each in work.each("sweep", edits, preference)]
        return edits[max(range(len(edits)), key=found.__getitem__)]

    def _preference(self, work: Work, rows: Sequence[Pair]) -> float:
        """Log-likelihood of the positive answers less that of the negative ones, in nats per token."""
        prompts = [self._prompt(work.inputs, row) or beginning(work.inputs.tokenizer) for row in rows]
        likely = [
            work.host.likelihood(prompts, [getattr(row, column) for row in rows]) for column in ("positive", "negative")
        ]
        return float((likely[0] - likely[1]).mean())


def principal(differences: Tensor) -> Tensor:
    """First principal axis [hidden] of the differences [pairs, hidden] and their opposites.

    It is as long as their mean along it.
    """
    axis: Tensor = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    return axis * (differences.mean(0) @ axis)


build = register(Steer)
