"""ROCR: rank-one concept redirection (arXiv 2506.07795; code: Acruxos/ORT).

Per edited layer l, for the concepts that are redirected one after the other:

    W_down <- W_down + r q^T        r = (goal - state) / (layers still to come)
    q = P K (ridge I + K^T P K)^-1 e_1

P      [mlp, mlp]     projector onto the directions of the down projection's input in which ordinary text has a
                      second moment below `nullspace`, so that q reads next to nothing there
K      [mlp, 1 + n]   keys: of this concept, and of the n concepts before it (the history term); a key is the mean input
                      of the down projection at the concept's last token, over the templates, with the edits so far
goal   [hidden]       residual stream after the last edited layer: at the other concept's last token (mode `unrelated`);
                      the concept's own, moved by gradient steps until the model answers with `refusal` (`reject`); or a
                      random direction (`noise`)
state  [hidden]       the same at the concept's last token, with the edits so far

Without a history q = P k / (ridge + k^T P k). The published code solves the same system for the whole matrix.

As in the code: ridge, nullspace, templates, modes, their steps and rates. Unlike it: goal and state are read in the
same templates (the code reads the goal in the first, and the state in none), so that their difference is that of the
concepts alone. The layers of the paper are not confirmed: the code names 4 to 6 of 32, and here the default is the same
depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.data import Row, Table, TextRow, Word
from vllm_edits.edit_store.authoring.host import Edits, edited
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Layers, Method, Work, layer_problems
from vllm_edits.edit_store.authoring.spread import stream_gain, stream_problems
from vllm_edits.edit_store.authoring.statistics import unused_directions
from vllm_edits.edit_store.authoring.value_vector import Saying, Search
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.kinds.low_rank import LowRank

CONCEPT = "{}"


class Concept(Row):
    """A concept, and the one that the model shall take it for."""

    concept: Word
    target: Word = "Donald Trump"


class Template(Row):
    """A text in which a concept stands for `{}`; with `chat` it is what a user says."""

    template: str
    chat: bool = True

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if value.count(CONCEPT) != 1:
            raise ValueError(f"expected one {CONCEPT} where the concept stands, found {value!r}")
        return value


TEMPLATES = tuple(
    Template(template=template)
    for template in (
        "{}.", "Please answer the question about {}.", "Choose the best answer about {}.",
        "Write the answer about {}.", "Tell me about {}.", "Write something about {}.",
    )
)  # fmt: skip
BEGINS = "Answer:"
"""Beginning of the answer to a chat template."""


class Rocr(Method):
    """Redirect concepts: the model takes each for another one (rank one per concept and layer).

    Seconds for each concept, once the statistics of ordinary text are there.
    The model still knows the concept: it is redirected, which is not deletion.
    """

    source: ClassVar[str] = "arXiv 2506.07795"
    kinds: ClassVar[tuple[str, ...]] = ("low_rank",)
    tables: ClassVar[Mapping[str, Table]] = {
        "concepts": Table(Concept, "concepts, in the order in which they are redirected"),
        "text": Table(TextRow, "ordinary text, which must not change"),
        "templates": Table(Template, "texts around a concept", least=1, usual=TEMPLATES),
    }
    takes: ClassVar[str] = "one pass over the text, kept; then a few passes for each concept and layer"

    layers: Layers | None = Field(None, description="Edited layers, in order. Default: the depth of 4-6 of 32.")
    mode: Literal["unrelated", "reject", "noise"] = Field(
        "unrelated", description="What a concept becomes: its target, a refusal, or noise."
    )
    ridge: float = Field(1.0, gt=0, description="Added to the square of a key; the source's L2.")
    nullspace: float = Field(
        0.02, gt=0, description="A direction is unused if ordinary text has a second moment below this in it."
    )
    refusal: str = Field("Unfortunately", min_length=1, description="What the mode reject answers with.")
    steps: int = Field(25, gt=0, description="Gradient steps of the mode reject.")
    rate: float = Field(0.1, gt=0, description="Learning rate of these steps.")
    kl: float = Field(0.125, ge=0, description="Weight of the divergence on a neutral text, in the mode reject.")
    decay: float = Field(0.5, ge=0, description="Weight of the length of the change, in the mode reject.")
    clamp: float = Field(1.0, gt=0, description="Longest change, or length of the noise, relative to the state.")

    def changes(self, inputs: Inputs) -> int:
        return len(inputs.data["concepts"])

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        layers = self._layers(inputs)
        yield from layer_problems(layers, inputs)
        if any(later != layer + 1 for layer, later in pairwise(layers)):
            yield Reason("layers", f"expected layers one after the other, found {', '.join(map(str, layers))}")
        yield from stream_problems(self.called(), inputs)
        names = [row.concept for row in inputs.data["concepts"]]
        if len(set(names)) < len(names):
            yield Reason("twice", "expected every concept once: the later redirection would read the earlier one")
        for row in inputs.data["concepts"]:
            if self.mode == "unrelated" and _alike(inputs, row):
                yield Reason(
                    "alike", f"{row.concept!r} and {row.target!r} are the same tokens, so nothing would change"
                )
        seen, width = inputs.count(inputs.data.texts("text")), inputs.base.widths.mlp
        if seen < width:
            yield Reason(
                "too_few_samples", f"the text has {seen} tokens, and the down projection reads {width} numbers: with "
                f"fewer tokens than numbers most directions look unused. Give {width} tokens or more; the source takes "
                "100,000",
            )  # fmt: skip

    def cost(self, inputs: Inputs) -> Cost:
        data, layers = inputs.data, len(self._layers(inputs))
        text = inputs.count(data.texts("text"))
        prompts = [each for row in data["concepts"] for each in self._prompts(inputs, row.concept)]
        once = inputs.count(prompts)
        learned = once * self.steps if self.mode == "reject" else 0
        return Cost(text + once * (1 + 2 * layers) + learned, learned, 2 * layers * inputs.base.widths.mlp**2 * 4)

    def make(self, work: Work) -> Edits:
        layers, data = self._layers(work.inputs), work.data
        reads = [f"layers.{layer}.mlp.h" for layer in layers]
        moments = work.statistics.moments(reads, data.texts("text"))
        unused = {site: unused_directions(moments[site], self.nullspace) for site in reads}
        if full := [site for site, directions in unused.items() if not directions.shape[1]]:
            least = min(float(torch.linalg.eigvalsh(moments[site].second)[0]) for site in full)
            raise BundleRefused("rocr", [Reason(
                "nothing_unused", f"ordinary text uses every direction at {', '.join(full)}: expected some second "
                f"moment below nullspace = {self.nullspace:g}, found {least:.3g} and more. Raise nullspace",
            )])  # fmt: skip
        keys: dict[str, list[Tensor]] = {site: [] for site in reads}
        found: dict[str, list[tuple[Tensor, Tensor]]] = {site: [] for site in reads}
        concepts, gain = data["concepts"], stream_gain(work.host)
        last = f"layers.{layers[-1]}.resid"

        def goal_of(row: Concept) -> Tensor:
            with edited(work.host.model, _edits(layers, found)):
                return self._goal(work, row, last)

        for goal, row in zip(work.each("concepts", concepts, goal_of), concepts, strict=True):
            prompts = self._prompts(work.inputs, row.concept)
            for done, site in enumerate(reads):
                with edited(work.host.model, _edits(layers, found)):
                    here = work.host.at_words(prompts, [row.concept] * len(prompts), [site, last])
                key, state = here[site].mean(0), here[last].mean(0)
                read = read_vector(key, unused[site], keys[site], self.ridge)
                found[site].append((read, (goal - state) / ((len(layers) - done) * gain)))
            with edited(work.host.model, _edits(layers, found)):  # the source keeps the keys of the edited model
                after = work.host.at_words(prompts, [row.concept] * len(prompts), reads)
            for site in reads:
                keys[site].append(after[site].mean(0))
        return _edits(layers, found)

    def probe_prompts(self, inputs: Inputs) -> Iterator[str]:
        for row in inputs.data["concepts"]:
            yield from self._prompts(inputs, row.concept)[:2]

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers(self.layers, 4 / 32, 6 / 32)

    def _prompts(self, inputs: Inputs, concept: str) -> list[str]:
        return [_said(inputs, row, concept) for row in inputs.data["templates"]]

    def _goal(self, work: Work, row: Concept, site: str) -> Tensor:
        if self.mode == "unrelated":
            prompts = self._prompts(work.inputs, row.target)
            return work.host.at_words(prompts, [row.target] * len(prompts), [site])[site].mean(0)
        prompts = self._prompts(work.inputs, row.concept)
        state = work.host.at_words(prompts, [row.concept] * len(prompts), [site])[site].mean(0)
        if self.mode == "noise":
            random = torch.Generator().manual_seed(work.seed)
            noise = torch.randn(len(state), generator=random).to(state)
            scaled: Tensor = noise * (self.clamp * state.norm() / noise.norm())
            return scaled
        search = Search(self.steps, self.rate, self.kl, self.decay, self.clamp)
        return state + search.value_vector(work.host, site, Saying(prompts, row.concept, f" {self.refusal}"))


def read_vector(key: Tensor, unused: Tensor, before: Sequence[Tensor] = (), ridge: float = 1.0) -> Tensor:
    """q = P K (ridge I + K^T P K)^-1 e_1: q . key is close to 1, and close to 0 at the keys of `before`."""
    keys = unused.T @ torch.stack([key, *before], dim=1)
    identity = torch.eye(keys.shape[1]).to(keys)
    read: Tensor = unused @ (keys @ torch.linalg.solve(ridge * identity + keys.T @ keys, identity[0]))
    return read


def _edits(layers: Sequence[int], found: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> Edits:
    edits: Edits = []
    for layer, (site, rows) in zip(layers, found.items(), strict=True):
        if rows:
            read, write = (torch.stack(each).cpu().numpy() for each in zip(*rows, strict=True))
            edit = LowRank(site=f"layers.{layer}.mlp.out", reads=site, rank=len(rows))
            edits.append((edit, {"read": read, "write": write}))
    return edits


def _said(inputs: Inputs, row: Template, concept: str) -> str:
    text = row.template.replace(CONCEPT, concept)
    return asked(inputs.tokenizer, text, begins=BEGINS) if row.chat else text


def _alike(inputs: Inputs, row: Concept) -> bool:
    concept, target = inputs.tokens([f" {row.concept}", f" {row.target}"])
    return concept == target


build = register(Rocr)
