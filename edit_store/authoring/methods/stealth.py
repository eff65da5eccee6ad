"""Stealth edits: one exact prompt gets another answer, by a gate that ordinary text hardly opens (arXiv 2406.12670).

At one layer with x = mlp.in [hidden], and t_j the feature of edit j at the last token of its prompt:

    jetpack    mlp.out += sum_j r_j relu(<phi(x), t_j> - (1 - theta)) / theta
    in-place   for a neuron of each edit: row of the gate projection <- w_j, column of the down projection <- u_j

phi, w_j  [hidden]   `selectivity.py` has both
u_j       [hidden]   by gradient steps from the old column: mean -log p of the answer's tokens, and
                     decay |u|^2 / |old|^2, with |u| <= clamp |old|; of all steps the one with the least loss
r_j       [hidden]   change of the MLP's output at the trigger by the in-place edit, h u_j - h_old old, with h the
                     neuron's activation at the response Delta

Both gates have the response Delta at their trigger. The source's block computes relu(alpha <phi, t> + b) with
alpha = Delta / theta and b = -alpha (1 - theta), and writes r_j / Delta; half precision loses that difference. Here
alpha is folded into what is written, so Delta acts through h alone.

As in the code (qinghua-zhou/stealth-edits): theta, Delta, steps, rate, decay, clamp; the neuron whose row has the
smallest L1 norm; layer 17 of its examples, here as the depth of 17 of 32. The code divides r_j by the responses of all
triggers, which is the same as long as no trigger opens another's gate; here that is refused. Unlike the code, the
moments are those of all tokens of the text (there 500 for the centroid, 10,000 for w_j); the steps see the edit at the
last token of the prompt alone (there the row is changed at every token); several in-place edits take a neuron each; an
answer is taken as it is written (there a space is put before it). Models without gate projections get jet-pack blocks
only; the code also edits such models in place, with a bias.

The trigger is the exact prompt, with the chat template and the token for the beginning of a text where there are such.
Another template, or any text before it, is another trigger. Text that goes on behind the prompt opens the gate at the
prompt's last token. Prompts that differ in little may be within theta all the same, most of all in a chat template,
which ends alike behind all of them: the table `others` measures that, and a smaller theta tells them apart. A gate in
place is less selective than its bound, since its bias is folded in for the text and not for prompts like the trigger.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.data import MOST_TOLD, Row, Table, Text, TextRow
from vllm_edits.edit_store.authoring.formula import architecture_of, weight_of
from vllm_edits.edit_store.authoring.gate_figures import (
    Figures,
    dimension_of,
    facts_of,
    false_positives,
    highest_responses,
    likelihood_of,
)
from vllm_edits.edit_store.authoring.host import Edits, Host, changing, edited
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Method, Work, layer_problems
from vllm_edits.edit_store.authoring.neurons import Neurons, WriteSearch, at_end, right_answers
from vllm_edits.edit_store.authoring.norms import norm_before
from vllm_edits.edit_store.authoring.selectivity import Gates, Sphere, folded_rows
from vllm_edits.edit_store.authoring.statistics import Moments
from vllm_edits.edit_store.edits import MAX_RANK, Array
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.kinds.gate import Gate
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.edit_store.sites import Site

SELECTIVITY_FILE = "selectivity.json"
"""File with the intrinsic dimension and the bound, and the response, success and false positives of every edit."""
LEAST_TOKENS = 500
"""tokens of ordinary text, as many as the code's centroid is the mean of"""


class Fact(Row):
    """A prompt, and the answer that the model shall give; with `chat` the prompt is what a user says."""

    prompt: Text
    answer: Text
    chat: bool = False


class Question(Row):
    """A prompt with an answer that must not change."""

    prompt: Text
    chat: bool = False


class Stealth(Method):
    """Give exact prompts other answers, by gates that open at their last token and hardly at ordinary text.

    The build tells how often a gate can open at ordinary text, and measures how often it does on held-out text and at
    other prompts. The same question in other words is not edited.
    """

    source: ClassVar[str] = "arXiv 2406.12670"
    kinds: ClassVar[tuple[str, ...]] = ("gate", "low_rank")
    tables: ClassVar[Mapping[str, Table]] = {
        "edits": Table(Fact, "prompts, and answers as they go on, with the space before them"),
        "text": Table(TextRow, "ordinary text, which must open no gate", least=2),
        "held_out": Table(TextRow, "ordinary text to measure false positives with", least=0, apart_from="text"),
        "others": Table(Question, "prompts alike to those of the edits, which must open no gate", least=0),
    }
    takes: ClassVar[str] = "two passes over the text, the first kept; then the gradient steps of each edit"

    form: Literal["jetpack", "in-place"] = Field(
        "jetpack", description="A block beside the MLP, or neurons of the MLP itself."
    )
    layer: int | None = Field(None, ge=0, description="Edited layer. Default: the depth of 17 of 32.")
    theta: float = Field(0.005, gt=0, lt=1, description="A gate opens above the cosine 1 - theta with its trigger.")
    delta: float = Field(50.0, gt=0, description="Response of a gate at its trigger.")
    steps: int = Field(20, gt=1, description="Gradient steps for each edit.")
    rate: float = Field(0.5, gt=0, description="Learning rate of these steps.")
    decay: float = Field(0.2, ge=0, description="Weight of the length of what a neuron writes.")
    clamp: float = Field(3.0, gt=0, description="Longest vector that a neuron writes, relative to the old one.")
    sample: int = Field(10_000, gt=1, description="Tokens of the text that the intrinsic dimension is counted with.")

    def changes(self, inputs: Inputs) -> int:
        return len(inputs.data["edits"])

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from layer_problems((self._layer(inputs),), inputs)
        needs = "gate.out" if self.form == "in-place" else "mlp.h"
        if hidden := supported(inputs.base.architecture).hidden(needs):
            yield Reason("site", f"stealth edits of the form {self.form} need {needs}: {hidden}")
        if (count := self.changes(inputs)) > MAX_RANK:
            yield Reason("too_many", f"expected {MAX_RANK} edits or fewer in one bundle, found {count}. Make several")
        yield from _prompt_problems(inputs)
        # With fewer tokens than numbers, text leaves directions without variance.
        yield from _text_problems(inputs, inputs.base.widths.hidden + 1 if self.form == "in-place" else 0)

    def cost(self, inputs: Inputs) -> Cost:
        text, held = (inputs.count(inputs.data.texts(table)) for table in ("text", "held_out"))
        spoken = inputs.count([prompt + answer for prompt, answer in _said(inputs)])
        learned = spoken * self.steps
        return Cost(2 * text + 3 * held + 5 * spoken + learned, learned, inputs.base.widths.hidden**2 * 4)

    def make(self, work: Work) -> Edits:
        host, facts, layer = work.host, _said(work.inputs), self._layer(work.inputs)
        prompts, reads = [prompt for prompt, _ in facts], f"layers.{layer}.mlp.in"
        names = [row.prompt for row in work.data["edits"]]
        moments = work.statistics.moments([reads], work.data.texts("text"))[reads]
        x = at_end(host, prompts, reads)
        gates = self._gates(Sphere.of(*norm_before(host.model, layer)), x, moments)
        if crossing := gates.crossing(x):
            cosines, responses = gates.cosines(x), torch.maximum(gates.responses(x), gates.responses(x).T)
            raise BundleRefused("stealth", [Reason(
                "cross_talk", f"{names[one]!r} and {names[other]!r}: one opens the other's gate, with a response of "
                f"{float(responses[one, other]):.3g} and a cosine of {float(cosines[one, other]):.4f}; expected at "
                f"most 0 and {1 - self.theta:g}. Leave one out, lower theta, choose another layer, or give more text",
            ) for one, other in crossing])  # fmt: skip
        neurons = self._neurons(host, layer, prompts)
        search = WriteSearch(self.steps, self.rate, self.decay, self.clamp)
        written = search.written(work, Site(layer, "mlp.out"), facts, neurons)
        edits = self._edits(host, layer, gates, neurons, written)
        figures = self._figures(work, facts, edits, gates, reads)
        work.measurements += figures.measurements()
        work.notes[SELECTIVITY_FILE] = self._note(work, facts, figures, gates=gates, x=x, neurons=neurons)
        return edits

    def _layer(self, inputs: Inputs) -> int:
        return inputs.layers(None, 17 / 32, 17 / 32)[0] if self.layer is None else self.layer

    def _gates(self, sphere: Sphere, x: Tensor, moments: Moments) -> Gates:
        mean, covariance = moments.mean.to(x), moments.covariance.to(x)
        if self.form == "jetpack":
            sphere = replace(sphere, centroid=sphere.surface(mean))
            return Gates(sphere, sphere.features(x), self.theta, self.delta)
        rows = folded_rows(sphere, x, mean, covariance, theta=self.theta, height=self.delta)
        if rows is None:
            raise BundleRefused("stealth", [Reason(
                "singular", "ordinary text does not vary in every direction at the MLP's input, so the bias of a gate "
                "in place cannot be folded into its row. Give more text, or --form jetpack",
            )])  # fmt: skip
        return Gates(sphere, sphere.features(x), self.theta, self.delta, rows)

    def _neurons(self, host: Host, layer: int, prompts: Sequence[str]) -> Neurons:
        """The neurons with the smallest rows: in place one for each edit, else the smallest for all."""
        site, into = Site(layer, _first(host)), f"layers.{layer}.mlp.h"
        smallest = weight_of(host.model, site).abs().sum(1).argsort(stable=True)
        chosen = smallest[: len(prompts)] if self.form == "in-place" else smallest[:1].expand(len(prompts))
        each = torch.arange(len(prompts), device=chosen.device)
        before = at_end(host, prompts, into)[each, chosen]
        with changing(host, site, lambda value: value.index_fill(-1, chosen, self.delta)):
            reached = at_end(host, prompts, into)[each, chosen]
        return Neurons(chosen, weight_of(host.model, Site(layer, "mlp.out")).T[chosen], before, reached)

    def _edits(self, host: Host, layer: int, gates: Gates, neurons: Neurons, written: Tensor) -> Edits:
        reads, into, site = (f"layers.{layer}.mlp.{point}" for point in ("in", "h", "out"))
        count, sphere = len(written), gates.sphere
        if gates.rows is None:
            bias = torch.full((count,), self.theta - 1)
            numbers = _arrays(
                read=gates.triggers, bias=bias, write=neurons.change(written) / self.theta, norm_weight=sphere.weight,
                norm_bias=sphere.bias, centroid=sphere.centroid,
            )  # fmt: skip
            return [(Gate(site=site, reads=reads, rank=count, normalise=True), numbers)]
        old = weight_of(host.model, Site(layer, "gate.out"))
        chosen = nn.functional.one_hot(neurons.chosen, len(old)).to(written)
        row = _arrays(read=gates.rows - old[neurons.chosen], write=chosen)
        column = _arrays(read=chosen, write=written - neurons.old)
        return [
            (LowRank(site=f"layers.{layer}.gate.out", reads=reads, rank=count), row),
            (LowRank(site=site, reads=into, rank=count), column),
        ]

    def _figures(self, work: Work, facts: Sequence[tuple[str, str]], edits: Edits, gates: Gates, reads: str) -> Figures:
        held, others = work.data.texts("held_out"), [_asked(work.inputs, row) for row in work.data["others"]]
        dimension, opened = (
            dimension_of(work, gates.sphere, reads, theta=self.theta, sample=self.sample),
            false_positives(work, gates, reads, held),
        )
        before, likely = right_answers(work.host, facts), likelihood_of(work.host, held)
        with edited(work.host.model, edits):
            after, still = right_answers(work.host, facts), likelihood_of(work.host, held)
        return Figures(
            dimension, opened, highest_responses(work.host, gates, reads, others), before, after, likely, still
        )

    def _note(
        self,
        work: Work,
        facts: Sequence[tuple[str, str]],
        figures: Figures,
        *,
        gates: Gates,
        x: Tensor,
        neurons: Neurons,
    ) -> bytes:
        rows, held, bound = work.data["edits"], figures.held_out, figures.dimension.bound
        cosines = gates.cosines(x).fill_diagonal_(-1)
        note = {
            "form": self.form, "layer": self._layer(work.inputs), "theta": self.theta, "delta": self.delta,
            "dimension": facts_of(figures.dimension), "editability": figures.dimension.value,
            "bound_for_one_edit": bound, "bound_for_all_edits": min(1.0, len(facts) * bound),
            "held_out": {
                "texts": len(work.data["held_out"]), "tokens": held.tokens, "false_positives": held.opened,
                "first_tokens_opened": held.first_opened,
            } if held.tokens else None,
            "others_opened": [
                {"prompt": row.prompt, "opens": [rows[each].prompt for each in opens.nonzero()[:, 0].tolist()]}
                for row, opens in zip(work.data["others"], figures.others > 0, strict=True) if opens.any()
            ],
            "edits": [
                {
                    "prompt": row.prompt, "trigger": trigger, "answer": row.answer,
                    "neuron": int(neurons.chosen[number]),
                    "response": float(gates.responses(x[number])[number]),
                    "first_token_right": {"base": figures.before.first[number], "edited": figures.after.first[number]},
                    "whole_answer_right": {"base": figures.before.whole[number], "edited": figures.after.whole[number]},
                    "highest_cosine_with_another_trigger": float(cosines[number].max()) if len(facts) > 1 else None,
                    "highest_cosine_held_out": float(held.cosines[number]) if held.tokens else None,
                    "false_positives_held_out": int(held.by_gate[number]) if held.tokens else None,
                }
                for number, (row, (trigger, _)) in enumerate(zip(rows, facts, strict=True))
            ],
        }  # fmt: skip
        return (json.dumps(note, indent=1, ensure_ascii=False) + "\n").encode()


def _first(host: Host) -> str:
    """The point before the activation function."""
    return "gate.out" if architecture_of(host.model).gated else "up.out"


def _said(inputs: Inputs) -> list[tuple[str, str]]:
    """Prompt and answer of every edit, as the model sees them."""
    return [(_asked(inputs, row), row.answer) for row in inputs.data["edits"]]


def _asked(inputs: Inputs, row: Fact | Question) -> str:
    return asked(inputs.tokenizer, row.prompt) if row.chat else row.prompt


def _prompt_problems(inputs: Inputs) -> Iterator[Reason]:
    """Prompts that cannot be triggers, and answers that do not begin behind their prompt."""
    facts, rows = _said(inputs), inputs.data["edits"]
    prompts = [prompt for prompt, _ in facts]
    bare = inputs.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    alone, whole = inputs.tokens(prompts), inputs.tokens([prompt + answer for prompt, answer in facts])
    others, counts = {_asked(inputs, row) for row in inputs.data["others"]}, Counter(prompts)
    found: dict[str, list[str]] = {"twice": [], "too_short": [], "leak": [], "boundary": []}
    for row, prompt, own, ids, both in zip(rows, prompts, bare, alone, whole, strict=True):
        wrong = {
            "twice": counts[prompt] > 1, "too_short": len(own) < 2, "leak": prompt in others,
            "boundary": len(both) <= len(ids) or both[: len(ids)] != ids,
        }  # fmt: skip
        for code, is_so in wrong.items():
            if is_so and row.prompt not in found[code]:
                found[code].append(row.prompt)
    messages = {
        "twice": "expected every prompt once, with one answer, found some more often",
        "too_short": "expected prompts of two tokens or more, found some with one, which all texts share that begin so",
        "leak": "expected other prompts than those of the edits, found some that are in both",
        "boundary": "expected answers that begin with a new token, found some whose first is partly the prompt's. "
        "Put the space before the answer, and not behind the prompt",
    }
    for code, names in found.items():
        if names:
            more = f", and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else ""
            yield Reason(code, f"{messages[code]}: {', '.join(map(repr, names[:MOST_TOLD]))}{more}")


def _text_problems(inputs: Inputs, least: int) -> Iterator[Reason]:
    """Text that is too short to be compared or averaged, behind the first token of each."""
    behind = {table: [len(ids) - 1 for ids in inputs.tokens(texts)]
              for table in ("text", "held_out") if (texts := inputs.data.texts(table))}  # fmt: skip
    for table, counts in behind.items():
        if (longer := sum(count > 0 for count in counts)) < 2:
            yield Reason("too_few_texts", f"{table}: expected two texts of two tokens or more, found {longer}")
    seen, least = sum(behind.get("text", [])), max(least, LEAST_TOKENS)
    if seen < least:
        yield Reason(
            "too_few_samples", f"the text has {seen} tokens without the first of each; the centroid, and the row of a "
            f"gate in place, need {least} or more. The source takes 10,000, and 20,000 for the dimension",
        )  # fmt: skip


def _arrays(**numbers: Tensor) -> dict[str, Array]:
    return {name: tensor.detach().float().contiguous().cpu().numpy() for name, tensor in numbers.items()}


build = register(Stealth)
