"""Ships: safety heads by what each does to the next token (arXiv 2410.13708; code: ydyjya/SafetyHeadAttribution).

    score(head) = mean over prompts of  KL( p | p without the head )                              divergence
                  mean over prompts of  log p(answer) - log p(answer | without the head)          answer

p: next token behind the prompt. The `count` heads with the highest scores are masked together (`heads.py` has the
masks). As in the code: queries scaled by a small factor, ten heads, the divergence. The code scores every prompt by
itself, as it is or in a frame; here the prompts of one behaviour are averaged, in the model's chat template. The score
`answer` is our own: heads that merely change the wording are not chosen by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import add
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.data import PromptRow, Table
from vllm_edits.edit_store.authoring.head_search import HeadSearch
from vllm_edits.edit_store.authoring.heads import without
from vllm_edits.edit_store.authoring.host import Edits, Host, batches, divergence
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Work
from vllm_edits.edit_store.bundle import Measurement
from vllm_edits.edit_store.errors import Reason


class Answered(PromptRow):
    """A prompt of the behaviour, and for the score `answer` how the model goes on."""

    answer: str = ""


class Ships(HeadSearch):
    """Remove the attention heads that a behaviour needs most: each is masked in turn, and the next token compared.

    Meant for safety heads: such a bundle takes safety away, and is privileged. The list of heads that it writes beside
    the bundle says what other edits must not touch.
    """

    privileged: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2410.13708"
    tables: ClassVar[Mapping[str, Table]] = {"prompts": Table(Answered, "prompts of one behaviour", least=2)}
    takes: ClassVar[str] = "the prompts through the model once for each head"

    count: int = Field(10, gt=0, description="Heads that are masked.")
    score: Literal["divergence", "answer"] = Field(
        "divergence", description="Rank heads by the next token's divergence, or by what the answers lose."
    )

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from super().problems(inputs)
        missing = sum(not row.answer for row in inputs.data["prompts"])
        if self.score == "answer" and missing:
            yield Reason("answer", f"the score `answer` needs one in every row, and {missing} rows have none")

    def cost(self, inputs: Inputs) -> Cost:
        return Cost(self._masked_tokens(inputs))

    def make(self, work: Work) -> Edits:
        prompts, base, layers = self._prompts(work.inputs), work.inputs.base, self._layers(work.inputs)
        answers = [row.answer for row in work.data["prompts"]]

        def lost(layer: int) -> Tensor:
            """Mean loss over the prompts, [heads]."""
            sums = torch.zeros(base.widths.heads, dtype=torch.float64)
            for some, told in zip(batches(prompts), batches(answers), strict=True):
                whole = self._said(work.host, some, told)
                with work.host.replaying(self._texts(some, told), below=layer):
                    for head in range(base.widths.heads):
                        with without(work.host, [(layer, head)], self.mask, self.factor, base):
                            sums[head] += float(self._lost(whole, self._said(work.host, some, told)).sum())
            return sums / len(prompts)

        scores = {
            (layer, head): float(score)
            for layer, row in zip(layers, list(work.each("heads", layers, lost)), strict=True)
            for head, score in enumerate(row)
        }  # fmt: skip
        best = sorted(scores, key=scores.__getitem__, reverse=True)[: self.count]
        before = work.host.next_token(prompts)
        with without(work.host, best, self.mask, self.factor, base):
            together = divergence(before, work.host.next_token(prompts))
        work.measurements.append(
            Measurement(
                metric="divergence of the next token, nats", base=0, edited=float(together.mean()), n=len(prompts)
            )
        )
        return self._edits(work, {head: scores[head] for head in best})

    def _texts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
        return list(prompts) if self.score == "divergence" else list(map(add, prompts, answers))

    def _said(self, host: Host, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Log-probabilities of the next tokens, or of the answers."""
        return host.next_token(prompts) if self.score == "divergence" else host.likelihood(prompts, answers)

    def _lost(self, whole: Tensor, now: Tensor) -> Tensor:
        return divergence(whole, now) if self.score == "divergence" else whole - now


build = register(Ships)
