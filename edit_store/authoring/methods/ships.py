"""Ships: safety heads by what each does to the next token (arXiv 2410.13708; code: ydyjya/SafetyHeadAttribution).

    score(head) = mean over prompts of  KL( p | p without the head )        p: next token behind the prompt

The `count` heads with the highest scores are masked together (`heads.py` has the masks). As in the code: queries scaled
by a small factor, ten heads. The code scores every prompt by itself; here the prompts of one behaviour are averaged.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.head_search import HeadSearch
from vllm_edits.edit_store.authoring.heads import without
from vllm_edits.edit_store.authoring.host import Edits, batches, divergence
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Work
from vllm_edits.edit_store.bundle import Measurement


class Ships(HeadSearch):
    """Remove the attention heads that a behaviour needs most: each is masked in turn, and the next token compared.

    Meant for safety heads: such a bundle takes safety away, and is privileged. The list of heads that it writes beside
    the bundle says what other edits must not touch.
    """

    privileged: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2410.13708"
    takes: ClassVar[str] = "the prompts through the model once for each head"

    count: int = Field(10, gt=0, description="Heads that are masked.")

    def cost(self, inputs: Inputs) -> Cost:
        return Cost(self._masked_tokens(inputs))

    def make(self, work: Work) -> Edits:
        prompts, base, layers = self._prompts(work.inputs), work.inputs.base, self._layers(work.inputs)
        scores = dict.fromkeys(((layer, head) for layer in layers for head in range(base.widths.heads)), 0.0)
        for number, layer in enumerate(layers):
            work.step("heads", number, len(layers))
            for some in batches(prompts):
                whole = work.host.next_token(some)
                with work.host.replaying(some, below=layer):
                    for head in range(base.widths.heads):
                        with without(work.host, [(layer, head)], self.mask, self.factor, base):
                            apart = divergence(whole, work.host.next_token(some))
                        scores[layer, head] += float(apart.sum()) / len(prompts)
        work.step("heads", len(layers), len(layers))
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


build = register(Ships)
