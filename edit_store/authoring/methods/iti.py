"""ITI: inference-time intervention (arXiv 2306.03341; code: likenneth/honest_llama).

    z[h] <- z[h] + alpha sigma[h] theta[h]      at the heads h that tell right answers from wrong ones best

z      [heads * head_dim]  concatenated heads, before the output projection
theta  [head_dim]          unit vector from wrong to right: difference of the two means (mass mean shift), or the normal
                           of the probe
sigma                      standard deviation along theta of all answers' vectors

Heads are ranked by a linear probe at the last token of each answer, trained on four fifths of the prompts and tested
on the others. As in the code: 48 heads, alpha 15, mean shift, the split. The code adds at the last token of every
step, so at every generated one and the last one of the prompt; here it is every token, or with `scope` the generated
ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.chat import said
from vllm_edits.edit_store.authoring.data import Row, Table, Text
from vllm_edits.edit_store.authoring.heads import Head, listed
from vllm_edits.edit_store.authoring.host import Edits, Host
from vllm_edits.edit_store.authoring.linear_probe import accuracy, fit
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Layers, Method, Work, layer_problems
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds.offset import Offset
from vllm_edits.edit_store.scope import Scope

HEADS_FILE = "heads.json"
"""File with the chosen heads, and the accuracy of each one's probe."""


class Answer(Row):
    """An answer to a prompt, and whether it is right."""

    prompt: Text
    answer: Text
    right: bool


class Iti(Method):
    """Shift the attention heads that tell right answers from wrong ones towards right ones.

    Right is what the data says: true, polite, safe. With a negative alpha it moves the other way.
    """

    source: ClassVar[str] = "arXiv 2306.03341"
    kinds: ClassVar[tuple[str, ...]] = ("offset",)
    tables: ClassVar[Mapping[str, Table]] = {
        "answers": Table(Answer, "right and wrong answers to prompts", least=8),
        "held_out": Table(Answer, "answers to measure with", least=0, apart_from="answers"),
    }
    takes: ClassVar[str] = "one pass over the answers, and a small probe for each head"

    heads: int = Field(48, gt=0, description="Heads that are shifted.")
    alpha: float = Field(15.0, description="Length of the shift, in standard deviations.")
    direction: Literal["mean", "probe", "random"] = Field(
        "mean", description="Direction at a head: between the means, of the probe, or random as a control."
    )
    layers: Layers | None = Field(None, description="Layers whose heads may be chosen. Default: all.")
    random_heads: bool = Field(False, description="Take random heads instead of the best, as a control.")
    scope: Literal["all", "generated"] = Field("all", description="Which tokens are shifted.")
    chat: bool = Field(False, description="Put prompts into the model's chat template.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        layers = self._layers(inputs)
        yield from layer_problems(layers, inputs)
        if self.heads > (there := len(layers) * inputs.base.widths.heads):
            yield Reason("heads", f"expected at most the {there} heads of these layers, found {self.heads}")
        rows = inputs.data["answers"]
        if len({row.right for row in rows}) < 2:
            yield Reason("labels", "answers: expected right true and false, found one of both")
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        for part, name in zip(_split(prompts, 0), ("trained", "tested"), strict=True):
            if len({row.right for row in rows if row.prompt in part}) < 2:
                yield Reason(
                    "too_few_prompts", f"the prompts that probes are {name} on need right and wrong answers: expected "
                    f"both for every prompt, and 5 prompts or more, found {len(prompts)}",
                )  # fmt: skip

    def cost(self, inputs: Inputs) -> Cost:
        answers, held = (inputs.count(self._texts(inputs, inputs.data[table])) for table in ("answers", "held_out"))
        return Cost(answers + 2 * held)

    def make(self, work: Work) -> Edits:
        rows, layers = work.data["answers"], self._layers(work.inputs)
        work.step("vectors", 0, 1)
        vectors = self._vectors(work, rows, layers)
        work.step("vectors", 1, 1)
        right = torch.tensor([row.right for row in rows])
        scores = self._scores(work, rows, vectors, right)
        order = sorted(scores, key=scores.__getitem__, reverse=True)
        random = torch.Generator().manual_seed(work.seed)
        if self.random_heads:
            order = [order[number] for number in torch.randperm(len(order), generator=random).tolist()]
        chosen = order[: self.heads]
        widths = work.inputs.base.widths
        shifts: dict[int, Tensor] = {}
        for layer, head in sorted(chosen):
            at = shifts.setdefault(layer, torch.zeros(widths.heads, widths.head_dim))
            at[head] = self._shift(vectors[layer, head], right, random)
        scope = Scope(segment="generated") if self.scope == "generated" else Scope()
        edits: Edits = [
            (Offset(site=f"layers.{layer}.attn.z", scope=scope), {"vector": shift.flatten().numpy()})
            for layer, shift in shifts.items()
        ]
        work.notes[HEADS_FILE] = listed({head: scores[head] for head in chosen}, work.inputs.base, self.called())
        if held := work.data["held_out"]:
            metric = "preference for right answers held out, nats per token"
            work.measure(metric, edits, lambda: self._preference(work, held), len(held))
        return edits

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers_from(self.layers, 0)

    def _texts(self, inputs: Inputs, rows: Sequence[Answer]) -> list[str]:
        return [prompt + answer for prompt, answer in zip(*self._said(inputs, rows), strict=True)]

    def _said(self, inputs: Inputs, rows: Sequence[Answer]) -> tuple[list[str], list[str]]:
        """Prompts and answers as the model sees them."""
        pairs = [said(inputs.tokenizer, row.prompt, row.answer, chat=self.chat) for row in rows]
        return [prompt for prompt, _ in pairs], [answer for _, answer in pairs]

    def _vectors(self, work: Work, rows: Sequence[Answer], layers: Sequence[int]) -> dict[Head, Tensor]:
        """Each head's output [answers, head_dim] at the last token."""
        sites = {layer: f"layers.{layer}.attn.z" for layer in layers}
        last = last_vectors(work.host, self._texts(work.inputs, rows), list(sites.values()))
        heads = work.inputs.base.widths.heads
        return {
            (layer, head): part
            for layer, site in sites.items()
            for head, part in enumerate(last[site].cpu().clone().chunk(heads, dim=1))
        }  # fmt: skip

    def _scores(
        self, work: Work, rows: Sequence[Answer], vectors: Mapping[Head, Tensor], right: Tensor
    ) -> dict[Head, float]:
        """Accuracy of every head's probe on the prompts that it was not trained on."""
        train, _ = _split(list(dict.fromkeys(row.prompt for row in rows)), work.seed)
        trained = torch.tensor([row.prompt in train for row in rows])
        labels = right[:, None].float()

        def score(head: Head) -> Tensor:
            of = vectors[head]
            found = accuracy((of[trained], labels[trained]), (of[~trained], labels[~trained]))
            return torch.tensor(found, dtype=torch.float64)

        heads = list(vectors)
        return dict(zip(heads, map(float, list(work.each("probes", heads, score))), strict=True))

    def _shift(self, vectors: Tensor, right: Tensor, random: torch.Generator) -> Tensor:
        """alpha sigma theta, [head_dim]."""
        if self.direction == "mean":
            direction = vectors[right].mean(0) - vectors[~right].mean(0)
        elif self.direction == "probe":
            spread = vectors.std(0).clamp_min(1e-6)
            weights, _ = fit((vectors - vectors.mean(0)) / spread, right.long())
            direction = (weights[:, 1] - weights[:, 0]) / spread
        else:
            direction = torch.randn(vectors.shape[1], generator=random)
        theta = direction / direction.norm().clamp_min(1e-12)
        shift: Tensor = self.alpha * (vectors @ theta).std() * theta
        return shift

    def _preference(self, work: Work, rows: Sequence[Answer]) -> float:
        """Log-likelihood of the right answers less that of the wrong ones."""
        likely = work.host.likelihood(*self._said(work.inputs, rows))
        right = torch.tensor([row.right for row in rows], device=likely.device)
        return float(likely[right].mean() - likely[~right].mean())


def last_vectors(host: Host, texts: Sequence[str], sites: Sequence[str]) -> dict[str, Tensor]:
    """Vectors [texts, width] at the last token of each text, by site."""
    return {site: torch.stack([row[-1] for row in rows]) for site, rows in host.activations(texts, sites).items()}


def _split(prompts: Sequence[str], seed: int) -> tuple[set[str], set[str]]:
    """Prompts to train on and to test on: four fifths and one."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    tested = {prompts[number] for number in order[: max(1, len(prompts) // 5)]}
    return set(prompts) - tested, tested


build = register(Iti)
