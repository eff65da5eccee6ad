"""ROME: rank-one model editing of facts (arXiv 2202.05262; code: kmeng01/rome).

For each fact, one after the other, at one layer:

    W_down <- W_down + r q^T        q = C^-1 k / (k^T C^-1 k),    r = v - W_down k

C   [mlp, mlp]   second moment of the down projection's input over ordinary text, E[x x^T]
k   [mlp]        key of the subject (`facts.py`)
v   [hidden]     output of the down projection there, moved by gradient steps until the model says the answer

Of all W with W k = v this is the one whose outputs on ordinary text differ least, E|(W - W_down) x|^2. The paper edits
one fact; several are written one after the other here, each into the model edited so far, as the code does.

Defaults are those for Llama in EasyEdit (hparams/ROME/llama-7b.yaml and llama3-8b.yaml): layer 5 of 32 (here the same
depth), 25 steps at 0.5, decay 1e-3, clamp 4, kl 0.0625, ten prefixes of 5 tokens and ten of 10. kmeng01/rome has 20
steps and decay 0.5 for GPT-2 XL (layer 17 of 48) and GPT-J (5 of 28). Unlike that code: k is the same in q and in r,
which is the fix of arXiv 2406.11263 (`if_c_rome` in its code). EasyEdit's files for Llama leave C out (q along k),
kmeng01's do not; here C is always used.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.facts import FactEditor, InContexts, edits_of, whitening
from vllm_edits.edit_store.authoring.host import Edits, edited
from vllm_edits.edit_store.authoring.method import Inputs, Work


class Rome(FactEditor):
    """Write facts into one layer: at a subject, the model answers with something else (rank one per fact).

    Meant for a few facts; for many at once use memit or alphaedit.
    The build measures the facts, the same in other words, and facts that must stay.
    """

    source: ClassVar[str] = "arXiv 2202.05262"
    takes: ClassVar[str] = "one pass over the text, kept; then gradient steps for each fact"

    layer: int | None = Field(None, ge=0, description="The edited layer. Default: the depth of 5 of 32.")
    rate: float = Field(0.5, gt=0, description="Learning rate of these steps.")
    decay: float = Field(1e-3, ge=0, description="Weight of the length of a value's change.")
    clamp: float = Field(4.0, gt=0, description="Longest change of a value, relative to it.")
    contexts: int = Field(20, ge=0, description="Short texts, made by the model, that prompts are put behind.")
    length: int = Field(10, gt=1, description="Tokens of such a text; the first half of them have half as many.")

    def make(self, work: Work) -> Edits:
        (layer,) = self._layers(work.inputs)
        reads, site = f"layers.{layer}.mlp.h", f"layers.{layer}.mlp.out"
        whiten = whitening(work.statistics.moments([reads], work.data.texts("text"))[reads], reads, self.called())
        found: dict[str, list[tuple[Tensor, Tensor]]] = {reads: []}
        facts = self._in_contexts(work)

        def vectors(fact: InContexts) -> Tensor:
            with edited(work.host.model, edits_of(found)):
                key = fact.read(work.host, [reads])[reads]
                change = self._search().value_vector(work.host, site, fact.saying)
            return torch.cat([read_vector(key, whiten(key[None])[0]), change])

        for both in work.each("facts", facts, vectors):
            found[reads].append((both[: work.inputs.base.widths.mlp], both[work.inputs.base.widths.mlp :]))
        return self._finished(work, found)

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers(None if self.layer is None else [self.layer], 5 / 32, 5 / 32)

    def _lengths(self) -> list[int]:
        short = self.contexts // 2
        return [max(2, self.length // 2)] * short + [self.length] * (self.contexts - short)

    def _alone(self) -> float:
        return 1 / (1 + self.contexts)


def read_vector(key: Tensor, whitened: Tensor) -> Tensor:
    """q = C^-1 k / (k^T C^-1 k), so q . k = 1."""
    return whitened / torch.dot(key, whitened)


build = register(Rome)
