"""Facts: their data, and what ROME, MEMIT and AlphaEdit share.

    k   [mlp]      key: input of the down projection at the subject's last token, averaged over contexts
    v   [hidden]   value: what shall be there behind that projection (ROME), or in the stream (MEMIT, AlphaEdit)

Contexts are the prompt alone, and the prompt behind short texts that the model itself begins: with "The", "Therefore",
"Because", "I" or "You", each next token drawn from the five likeliest (as in kmeng01/memit and EasyEdit). Keys and
values are read in the same contexts with the same weights. The code of ROME and MEMIT reads keys with prefixes, and
values without; arXiv 2406.11263 finds this to be the cause of ROME's collapse, and its fix is to read both alike.

A subject of one token that begins its prompt is an attention sink, unlike the same word elsewhere (arXiv 2406.11263).
Where there are prefixes such a prompt is left out. At serving time it must stand behind other text, as the authors say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, Field, StringConstraints, model_validator
from torch import Tensor

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.authoring.data import Row, Table, Text, TextRow, Word
from vllm_edits.edit_store.authoring.formula import weight_of
from vllm_edits.edit_store.authoring.host import Edits, Host, batches, divergence, edited, last_token_of
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Method, Work, layer_problems
from vllm_edits.edit_store.authoring.spread import stream_gain, stream_problems
from vllm_edits.edit_store.authoring.statistics import Moments
from vllm_edits.edit_store.authoring.value_vector import Saying, Search
from vllm_edits.edit_store.bundle import Measurement
from vllm_edits.edit_store.edits import MAX_RANK
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.edit_store.sites import Site

SUBJECT = "{}"
FIRST_WORDS = ("The", "Therefore", "Because", "I", "You")
_LIKELIEST = 5
"""Tokens that the next one of a context is drawn from."""
_TEXTS = 32
"""Ordinary texts behind which the next token is compared."""
_SINGULAR = 1e-6
"""Share of a number's second moment that the others leave unexplained, below which it counts as none in float32."""


def _ends_in_a_word(prompt: str) -> str:
    if prompt != prompt.rstrip():
        raise ValueError(f"expected a prompt without space at its end, found {prompt!r}")
    return prompt


Begun = Annotated[Text, AfterValidator(_ends_in_a_word)]
"""A prompt. One space is put between it and its answer."""
ReadsAndWrites = Mapping[str, Sequence[tuple[Tensor, Tensor]]]
"""Directions `[mlp]` that are read and `[hidden]` that are written, by the site that is read."""


class Fact(Row):
    """A fact: `{}` in the prompt stands for the subject, and the answer follows behind the prompt."""

    subject: Word
    prompt: Begun
    answer: Word
    was: Annotated[str, StringConstraints(strip_whitespace=True)] = ""

    @model_validator(mode="after")
    def _can_be_said(self) -> Fact:
        if self.prompt.count(SUBJECT) != 1:
            raise ValueError(f"expected one {SUBJECT} where the subject stands, found {self.prompt!r}")
        if self.subject in self.prompt.partition(SUBJECT)[2]:
            raise ValueError(f"expected {self.subject!r} at {SUBJECT} alone, found it again behind in {self.prompt!r}")
        return self

    @property
    def said(self) -> str:
        """The prompt about its subject."""
        return self.prompt.replace(SUBJECT, self.subject)


class Neighbour(Row):
    """Another fact, which must stay: the answer follows behind the prompt."""

    prompt: Begun
    answer: Word

    @property
    def said(self) -> str:
        """The prompt."""
        return self.prompt


@dataclass(frozen=True)
class InContexts:
    """A fact with the texts that say it."""

    fact: Fact
    prompts: tuple[str, ...]
    weights: tuple[float, ...]
    """of the prompts in means; they sum to one"""

    @classmethod
    def of(cls, tokenizer: Any, fact: Fact, prefixes: Sequence[str], alone: float) -> InContexts:
        """`alone` is the weight of the prompt without a prefix."""
        prompts = [fact.said, *(f"{prefix}. {fact.said}" for prefix in prefixes)]
        weights = [alone, *[(1 - alone) / len(prefixes) for _ in prefixes]]
        if prefixes and last_token_of(tokenizer, fact.said, fact.subject) == 0:
            prompts, weights = prompts[1:], [1 / len(prefixes) for _ in prefixes]
        return cls(fact, tuple(prompts), tuple(weights))

    def read(self, host: Host, sites: Sequence[str]) -> dict[str, Tensor]:
        """Mean vector at each site at the subject's last token, [width]."""
        found = host.at_words(self.prompts, [self.fact.subject] * len(self.prompts), sites)
        return {site: torch.tensor(self.weights).to(rows) @ rows for site, rows in found.items()}

    @property
    def saying(self) -> Saying:
        """The fact for the search of its value."""
        return Saying(self.prompts, self.fact.subject, f" {self.fact.answer}")


class FactEditor(Method):
    """Base of the methods that write facts into down projections, one rank for each fact and layer."""

    kinds: ClassVar[tuple[str, ...]] = ("low_rank",)
    tables: ClassVar[Mapping[str, Table]] = {
        "facts": Table(Fact, "facts that the model shall say; `was` is the old answer"),
        "text": Table(TextRow, "ordinary text, which must not change"),
        "held_out": Table(Fact, "the same facts in other words, to measure with", least=0, apart_from="facts"),
        "neighbours": Table(Neighbour, "other facts, which must stay, to measure with", least=0),
    }

    steps: int = Field(25, gt=0, description="Gradient steps for the value of a fact.")
    rate: float = Field(0.1, gt=0, description="Learning rate of these steps.")
    kl: float = Field(0.0625, ge=0, description="Weight of the divergence behind '{subject} is a'.")
    decay: float = Field(0.5, ge=0, description="Weight of the length of a value's change.")
    clamp: float = Field(0.75, gt=0, description="Longest change of a value, relative to it.")
    contexts: int = Field(5, ge=0, description="Short texts, made by the model, that prompts are put behind.")
    length: int = Field(10, gt=1, description="Tokens of such a text.")
    largest: float = Field(
        1.0, gt=0, description="Largest change of a weight by one fact, relative to its size; more is refused."
    )

    def changes(self, inputs: Inputs) -> int:
        return len(inputs.data["facts"])

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        layers = self._layers(inputs)
        yield from layer_problems(layers, inputs)
        count = inputs.base.widths.layers
        if count - 1 in layers:
            yield Reason(
                "layers", f"layer {count - 1} is the last one, and behind it no token reads the subject: expected "
                f"layers from 0 to {count - 2}",
            )  # fmt: skip
        if hidden := supported(inputs.base.architecture).hidden("mlp.h"):
            yield Reason("site", f"facts are written from mlp.h: {hidden}")
        yield from _fact_problems(inputs)
        seen, width = inputs.count(inputs.data.texts("text")), inputs.base.widths.mlp
        if seen < width:
            yield Reason(
                "too_few_samples", f"the text has {seen} tokens, and the down projection reads {width} numbers: with "
                f"fewer tokens than numbers their second moment has no inverse. Give {width} tokens or more; the "
                "sources take 100,000 texts of Wikipedia",
            )  # fmt: skip

    def cost(self, inputs: Inputs) -> Cost:
        data, mlp = inputs.data, inputs.base.widths.mlp
        alone = inputs.count([f"{fact.said} {fact.answer}" for fact in data["facts"]])
        once = (1 + self.contexts) * alone + len(data["facts"]) * sum(self._lengths())
        held = inputs.count([f"{row.said} {row.answer}" for name in ("held_out", "neighbours") for row in data[name]])
        text = inputs.count(data.texts("text"))
        began = sum(size * size for size in self._lengths()) // 2
        layers = len(self._layers(inputs))
        return Cost(
            text + began + (1 + layers + self.steps) * once + 2 * (alone + held), self.steps * once,
            (layers + 4) * mlp**2 * 4,
        )  # fmt: skip

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        raise NotImplementedError

    def _lengths(self) -> list[int]:
        """Tokens of each text that prompts are put behind."""
        return [self.length] * self.contexts

    def _alone(self) -> float:
        """Weight of the prompt without a prefix."""
        return 0.5 if self.contexts else 1.0

    def _search(self) -> Search:
        return Search(self.steps, self.rate, self.kl, self.decay, self.clamp)

    def _in_contexts(self, work: Work) -> list[InContexts]:
        prefixes = begun(work.host, self._lengths(), work.seed)
        return [InContexts.of(work.host.tokenizer, fact, prefixes, self._alone()) for fact in work.data["facts"]]

    def _finished(self, work: Work, found: ReadsAndWrites) -> Edits:
        """The edits, measured. BundleRefused if a fact takes a change out of proportion (arXiv 2402.09656)."""
        edits, facts = edits_of(found), work.data["facts"]
        whole, largest = 0.0, 0.0
        for (site, rows), (edit, numbers) in zip(found.items(), edits, strict=True):
            weight = float(weight_of(work.host.model, Site.parse(edit.site)).norm())
            sizes = [float(read.norm() * write.norm()) / weight for read, write in rows]
            large = max(range(len(sizes)), key=sizes.__getitem__)
            if sizes[large] > self.largest:
                raise BundleRefused(self.called(), [Reason(
                    "size", f"expected a fact to change a weight by at most {self.largest:g} times its size, found "
                    f"{sizes[large]:.3g} for {facts[large].said!r} at {site}: such an edit tends to break a model. "
                    "Leave it out, lower clamp, give more text; or raise largest",
                )])  # fmt: skip
            whole, largest = max(whole, edit.measure(numbers).norm / weight), max(largest, sizes[large])
        for name, size in (("all facts", whole), ("one fact", largest)):
            metric = f"largest change of a weight by {name}, relative to its size"
            work.measurements.append(Measurement(metric=metric, base=0, edited=size, n=len(facts)))
        texts = work.data.texts("text")[:_TEXTS]
        work.step("measurements", 0, 2)
        before, next_before = _figures(work), work.host.next_token(texts)
        work.step("measurements", 1, 2)
        with edited(work.host.model, edits):
            after = _figures(work)
            drift = float(divergence(next_before, work.host.next_token(texts)).mean())
        work.step("measurements", 2, 2)
        work.measurements += [
            Measurement(metric=metric, base=value, edited=after[metric][0], n=n)
            for metric, (value, n) in before.items()
        ]
        work.measurements.append(
            Measurement(metric="ordinary text: divergence of the next token, nats", base=0, edited=drift, n=len(texts))
        )
        return edits


class SpreadEditor(FactEditor):
    """Base of the methods that spread a change of the residual stream over several layers.

    For each layer l of L, in order, all facts at once:  W_l <- W_l + R Q^T,   R = (V - H) / (layers still to come)

    V    [hidden, facts]  values: the stream behind the last edited layer at the subjects, moved until facts are said
    H    [hidden, facts]  the same stream with the edits so far
    Q    [mlp, facts]     what is read: the method's own
    """

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from super().problems(inputs)
        layers = self._layers(inputs)
        if list(layers) != sorted(layers):
            yield Reason("layers", f"expected layers in rising order, found {', '.join(map(str, layers))}")
        yield from stream_problems(self.called(), inputs)

    def make(self, work: Work) -> Edits:
        layers, host = self._layers(work.inputs), work.host
        sites, last = [f"layers.{layer}.mlp.h" for layer in layers], f"layers.{layers[-1]}.resid"
        moments = work.statistics.moments(sites, work.data.texts("text"))
        solve = self._solver(moments)
        gain = stream_gain(host)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {site: [] for site in sites}
        before: dict[str, list[Tensor]] = {site: [] for site in sites}
        facts, done = self._in_contexts(work), 0
        for batch in self._batches(facts):
            step, done = f"facts {done + 1} to {done + len(batch)}", done + len(batch)
            with edited(host.model, edits_of(found)):
                values = list(work.each(step, batch, partial(self._value, host, last)))
            for number, site in enumerate(sites):
                work.step("layers", number, len(sites))
                with edited(host.model, edits_of(found)):
                    here = [each.read(host, [site, last]) for each in batch]
                states = torch.stack([each[last] for each in here])
                writes = (torch.stack(values) - states) / ((len(sites) - number) * gain)
                reads = solve(site, torch.stack([each[site] for each in here]), before[site])
                found[site] += zip(reads, writes, strict=True)
            work.step("layers", len(sites), len(sites))
            if done < len(facts):
                with edited(host.model, edits_of(found)):
                    for each in batch:
                        for site, key in each.read(host, sites).items():
                            before[site].append(key)
        return self._finished(work, found)

    def _value(self, host: Host, site: str, fact: InContexts) -> Tensor:
        """The stream at a subject, moved until the fact is said."""
        return fact.read(host, [site])[site] + self._search().value_vector(host, site, fact.saying)

    def _solver(self, moments: Mapping[str, Moments]) -> Callable[[str, Tensor, Sequence[Tensor]], Tensor]:
        """Q^T [facts, mlp] from a site, keys [facts, mlp], and the keys of earlier batches."""
        raise NotImplementedError

    def _batches(self, facts: Sequence[InContexts]) -> Iterator[Sequence[InContexts]]:
        """Facts that are written together."""
        yield facts

    def _five_layers(self, inputs: Inputs, given: Sequence[int] | None) -> tuple[int, ...]:
        """The given layers, or five from an eighth of the depth on: 4 to 8 of 32."""
        if given is not None:
            return tuple(given)
        count = inputs.base.widths.layers
        first = round(count / 8)
        return tuple(range(first, max(first + 1, min(first + 5, count - 1))))


def begun(host: Host, lengths: Sequence[int], seed: int) -> list[str]:
    """Texts that the model begins, each of so many tokens. The same seed gives the same texts."""
    random = torch.Generator().manual_seed(seed)
    tokenizer = host.tokenizer
    texts = [FIRST_WORDS[number % len(FIRST_WORDS)] for number in range(len(lengths))]
    for size in range(1, max(lengths, default=0)):
        growing = [number for number, length in enumerate(lengths) if length > size]
        likely = host.next_token([texts[number] for number in growing]).cpu().clone()
        likely[:, [token for token in tokenizer.all_special_ids if token < likely.shape[1]]] = -torch.inf
        values, tokens = likely.topk(_LIKELIEST)
        chosen = tokens.gather(1, torch.multinomial(values.exp(), 1, generator=random))[:, 0]
        for number, token in zip(growing, chosen.tolist(), strict=True):
            ids = [*tokenizer(texts[number])["input_ids"], token]
            texts[number] = tokenizer.decode(ids, skip_special_tokens=True)
    return [" ".join(text.replace("\ufffd", " ").split()) for text in texts]


def whitening(moments: Moments, site: str, method: str) -> Callable[[Tensor], Tensor]:
    """The map from keys [n, mlp] to C^-1 keys, for C the second moment. BundleRefused if C has no inverse."""
    second = moments.second.double()
    scale = second.diagonal().clamp_min(torch.finfo(second.dtype).tiny).rsqrt()
    factor, failed = torch.linalg.cholesky_ex(second * scale * scale[:, None])
    if int(failed) or float(factor.diagonal().square().min()) < _SINGULAR:
        raise BundleRefused(method, [Reason(
            "singular", f"the second moment of the text at {site} has no inverse: in its {moments.count} tokens some "
            "numbers follow from others. Give more text, and of more kinds",
        )])  # fmt: skip

    def whiten(keys: Tensor) -> Tensor:
        solved = torch.cholesky_solve((keys.to(factor) * scale).T, factor)
        whitened: Tensor = (solved.T * scale).to(keys)
        return whitened

    return whiten


def edits_of(found: ReadsAndWrites) -> Edits:
    """The edits of each layer so far."""
    edits: Edits = []
    for site, rows in found.items():
        if rows:
            read, write = (torch.stack(each).float().cpu().numpy() for each in zip(*rows, strict=True))
            target = str(Site.parse(site).beside("mlp.out"))
            edits.append((LowRank(site=target, reads=site, rank=len(rows)), {"read": read, "write": write}))
    return edits


def _fact_problems(inputs: Inputs) -> Iterator[Reason]:
    """Facts that are too many, or contradict each other; held-out rows and neighbours that do not fit them."""
    data = inputs.data
    facts, held, neighbours = data["facts"], data["held_out"], data["neighbours"]
    if len(facts) > MAX_RANK:
        yield Reason(
            "too_many_facts", f"expected at most {MAX_RANK} facts, since each takes a rank of an edit, found "
            f"{len(facts)}. Make several builds, each --on the one before",
        )  # fmt: skip
    answers: dict[str, set[str]] = {}
    for fact in facts:
        answers.setdefault(fact.said, set()).add(fact.answer)
    if several := [prompt for prompt, found in answers.items() if len(found) > 1]:
        yield Reason("several_answers", f"{len(several)} facts have several answers, for example {several[0]!r}")
    if alike := [fact for fact in facts if fact.answer == fact.was]:
        yield Reason("alike", f"{len(alike)} facts have their old answer as the new one, for example {alike[0].said!r}")
    known = {(fact.subject, fact.answer) for fact in facts}
    if others := [row for row in held if (row.subject, row.answer) not in known]:
        yield Reason(
            "held_out", f"{len(others)} rows are not about a fact of the table facts (the same subject and answer), "
            f"for example {others[0].said!r}",
        )  # fmt: skip
    if changed := [row for row in neighbours if row.prompt in answers]:
        yield Reason(
            "neighbours", f"{len(changed)} prompts that must stay are those of facts, for example {changed[0].prompt!r}"
        )


def _figures(work: Work) -> dict[str, tuple[float, int]]:
    """Values of each metric, and of how many rows: of the answers, and of those that they take the place of."""
    found: dict[str, tuple[float, int]] = {}
    for table, name in (("facts", "facts"), ("held_out", "facts in other words"), ("neighbours", "neighbours")):
        if rows := work.data[table]:
            likely, first = spoken(work.host, [row.said for row in rows], [row.answer for row in rows])
            found[f"{name}: share answered so"] = float(first.float().mean()), len(rows)
            found[f"{name}: probability of the answer per token"] = float(likely.exp().mean()), len(rows)
            replaced = [number for number, row in enumerate(rows) if getattr(row, "was", "")]
            if replaced:
                old, _ = spoken(
                    work.host, [rows[number].said for number in replaced], [rows[number].was for number in replaced]
                )
                margin = float((likely[replaced] - old).mean())
                found[f"{name}: new answer before the old one, nats per token"] = margin, len(replaced)
    return found


@torch.inference_mode()
def spoken(host: Host, prompts: Sequence[str], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Mean log-probability per token of each answer, and True where the model's greedy answer begins with it."""
    likely, greedy = list[Tensor](), list[bool]()
    for pairs in batches(list(zip(prompts, answers, strict=True))):
        whole = [host.tokenizer(f"{prompt} {answer}")["input_ids"] for prompt, answer in pairs]
        said = host.said(whole, [len(host.tokenizer(prompt)["input_ids"]) for prompt, _ in pairs])
        likely.append(said.means())
        greedy += map(all, said.right())
    return torch.cat(likely), torch.tensor(greedy)
