"""The demo's six bundles: the build of each, what it claims, and how the claims are measured.

A claim is measured through a function that asks prompts, so the same one judges the model edited by formula here and a
variant served over HTTP in the demo.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.demo import prompts
from vllm_edits.edit_store.authoring import methods
from vllm_edits.edit_store.authoring.build import Ask, Built, options_of, pairs_of, prepare
from vllm_edits.edit_store.authoring.host import Edits, Generated, Host, divergence, edited
from vllm_edits.edit_store.authoring.method import METHODS
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.bundle import Bundle, Measurement
from vllm_edits.edit_store.kinds.gate import Gate

DATA = Path(__file__).parent / "data"
"""Files that the bundles are built from. What the claims are judged by is in `prompts.py`."""
Answers = Sequence[Generated]
Asked = Callable[[tuple[str, ...], int], Answers]
"""Asks one model each prompt, for so many greedy tokens."""


@dataclass(frozen=True)
class MeasuredClaim:
    """A figure between 0 and 1 about a model's answers, and the ranges that it must keep before and after the edit.

    `score` takes the answers of a model and those of the base; the range for the base is the positive control.
    """

    metric: str
    prompts: tuple[str, ...]
    score: Callable[[Answers, Answers], float]
    base: tuple[float, float]
    edited: tuple[float, float]
    tokens: int = 1

    def measure(self, base: Asked, variant: Asked) -> Measurement:
        """The figure for both models."""
        before = base(self.prompts, self.tokens)
        after = variant(self.prompts, self.tokens)
        return Measurement(
            metric=self.metric, base=self.score(before, before), edited=self.score(after, before), n=len(self.prompts)
        )

    def broken(self, found: Measurement) -> str | None:
        """Why the claim does not hold, or None."""
        wrong = [
            f"{name} {figure:.2f}, expected {low:g} to {high:g}"
            for name, figure, (low, high) in (("base", found.base, self.base), ("edited", found.edited, self.edited))
            if not low <= figure <= high
        ]
        return f"{self.metric}: {'; '.join(wrong)}" if wrong else None


@dataclass(frozen=True)
class Exhibit:
    """One bundle of the demo: its build, a prompt and a chat question that show it, and what it claims."""

    name: str
    label: str
    description: str
    method: str
    data: tuple[str, ...]
    """files of DATA without their ending, each as `table=file`"""
    options: Mapping[str, Any]
    prompt: str
    question: str
    claims: tuple[MeasuredClaim, ...]
    tokens: int = 12
    shaped: Callable[[Edits], Edits] = list
    """what becomes of the edits of the build"""

    def build(self, model: Path) -> Built:
        """The build, as `vllm-edits build` makes it."""
        methods.find()
        files = tuple(f"{table}={DATA / file}.jsonl" for table, file in (each.split("=") for each in self.data))
        chosen = options_of(METHODS[self.method], self.options)
        return prepare(Ask(chosen, model, files, name=self.name, privileged=True)).make()

    def edits(self, built: Built) -> Edits:
        """The edits of the bundle."""
        return self.shaped(pairs_of(built.bundle))


def build(
    model_folder: Path, base: BaseModelRef, progress: Callable[[str], None], *, created_at: datetime | None = None
) -> list[tuple[Exhibit, Bundle]]:
    """Build and measure every bundle, the late one last.

    Claims are measured, not enforced: see `MeasuredClaim.broken`.
    """
    progress("loading the model")
    host = Host.load(model_folder)
    ask_base = cache(host.answers)
    likely = host.next_token(prompts.UNRELATED)
    made = []
    for exhibit in (*EXHIBITS, LATE):
        progress(f"{exhibit.name} {exhibit.label}: {exhibit.description}")
        built = exhibit.build(model_folder)
        edits, manifest = exhibit.edits(built), built.bundle.manifest
        ask_edited = partial(_ask_edited, host, edits)
        with edited(host.model, edits):
            unlike = float(divergence(likely, host.next_token(prompts.UNRELATED)).mean())
        bundle = Bundle.create(
            exhibit.name,
            base,
            edits,
            manifest.provenance,
            description=exhibit.description,
            label=exhibit.label,
            measurements=[
                *(claim.measure(ask_base, ask_edited) for claim in exhibit.claims),
                Measurement(metric="divergence on unrelated text, nats", base=0, edited=unlike, n=len(likely)),
            ],
            privileged=manifest.privileged,
            cumulative_edits=manifest.cumulative_edits,
            created_at=created_at,
        )
        made.append((exhibit, bundle))
    return made


def _ask_edited(host: Host, edits: Edits, asked: tuple[str, ...], tokens: int) -> Answers:
    with edited(host.model, edits):
        return host.answers(asked, tokens)


def _share(matches: Callable[[Generated], bool]) -> Callable[[Answers, Answers], float]:
    return lambda answers, _: sum(map(matches, answers)) / len(answers)


def _share_as_expected(expected: Sequence[str]) -> Callable[[Answers, Answers], float]:
    return lambda answers, _: sum(a.text == word for a, word in zip(answers, expected, strict=True)) / len(expected)


def _share_as_base(answers: Answers, base: Answers) -> float:
    return sum(answer.text == before.text for answer, before in zip(answers, base, strict=True)) / len(base)


def _highest_probability(token: str) -> Callable[[Answers, Answers], float]:
    return lambda answers, _: max(answer.first.get(token, 0.0) for answer in answers)


def _more_of(these: frozenset[str], than: frozenset[str]) -> Callable[[Generated], bool]:
    def matches(answer: Generated) -> bool:
        words = re.findall(r"\w+", answer.text.lower())
        return sum(word in these for word in words) > sum(word in than for word in words)

    return matches


_KEPT = MeasuredClaim("facts kept", prompts.FACTS, _share_as_base, base=(1, 1), edited=(0.9, 1))


def _capital(label: str, country: str, city: str) -> Exhibit:
    wordings = prompts.CAPITAL_WORDINGS
    return Exhibit(
        name="capital",
        label=label,
        description=f"France is taken for {country}, so its capital is{city}",
        method="rocr",
        data=(f"concepts=france_is_{country.lower()}", "text=ordinary", "templates=contexts"),
        options={"layers": "3-5"},
        prompt=wordings[0],
        question="What is the capital of France?",
        claims=(
            MeasuredClaim(
                f"answers{city}", wordings, _share_as_expected([city] * len(wordings)), base=(0, 0), edited=(0.8, 1)
            ),
            MeasuredClaim("highest p(Paris)", wordings, _highest_probability(" Paris"), base=(0.7, 1), edited=(0, 0.1)),
            _KEPT,
        ),
    )


GATE_THRESHOLD = 0.3
"""A redirection reads 1 at its concept in the wordings it is made from, and less in others: 0.5 in CAPITAL_WORDINGS."""


def gated(redirection: Edits) -> Edits:
    """The edits of a redirection as gates: each adds its vector as before, and nothing below a threshold."""
    return [
        (
            Gate(site=edit.site, reads=edit.source, rank=1, activation="jump_relu", threshold=GATE_THRESHOLD),
            {**fields, "bias": np.zeros(1, dtype=np.float32)},
        )
        for edit, fields in redirection
    ]


def _gated_capital() -> Exhibit:
    ungated = _capital("1", "Japan", " Tokyo")
    told = f"{ungated.description}, through gates that leave unrelated text as it was"
    return replace(ungated, name="gated-capital", description=told, shaped=gated)


def _no_copy() -> Exhibit:
    asked = [prompts.copying(words, copied) for words in prompts.HELD_LISTS for copied in (2, 4)]
    return Exhibit(
        name="no-copy",
        label="1",
        description="cannot copy a list of words: the heads that do it are removed",
        method="ships",
        data=("prompts=lists",),
        # The middle third: earlier heads feed every behaviour, later ones only word it.
        options={"layers": "10-19", "count": 4, "score": "answer", "mask": "output", "factor": 0, "chat": False},
        prompt="Original: apple river stone cloud green table\nCopy: apple",
        question="",
        claims=(
            MeasuredClaim(
                "next word copied",
                tuple(prompt for prompt, _ in asked),
                _share_as_expected([f" {rest.split()[0]}" for _, rest in asked]),
                base=(0.9, 1),
                edited=(0, 0.3),
            ),
            _KEPT,
        ),
    )


def _plain_english() -> Exhibit:
    return Exhibit(
        name="plain-english",
        label="1",
        description="goes on in English after French: what tells the two apart is filtered out",
        method="contrast-filter",
        data=("texts=languages",),
        options={"layers": "12"},
        prompt=prompts.HELD_FRENCH[0],
        question="Raconte-moi une histoire courte.",
        claims=(
            MeasuredClaim(
                "answers in French",
                prompts.HELD_FRENCH,
                _share(_more_of(prompts.FRENCH_WORDS, than=prompts.ENGLISH_WORDS)),
                base=(0.6, 1),
                edited=(0, 0.25),
                tokens=8,  # later the base model likes to explain itself in English
            ),
            _KEPT,
        ),
    )


def _cheerful() -> Exhibit:
    return Exhibit(
        name="cheerful",
        label="1",
        description="sees the bright side: a steering vector from gloomy to happy text",
        method="steer",
        data=("pairs=moods",),
        options={"layers": "10,12", "tokens": "all"},
        prompt="He lost his job and now he feels",
        question="My cat died yesterday.",
        claims=(
            MeasuredClaim(
                "cheerful answers",
                prompts.HELD_MOODS,
                _share(_more_of(prompts.CHEERFUL_WORDS, than=prompts.GLOOMY_WORDS)),
                base=(0, 0.4),
                edited=(0.6, 1),
                tokens=14,
            ),
            _KEPT,
        ),
    )


EXHIBITS = (
    _capital("1", "Italy", " Rome"),
    _capital("2", "Germany", " Berlin"),
    _no_copy(),
    _plain_english(),
    _cheerful(),
)
"""In the order in which they are published: version 2 of `capital` is the one promoted under load."""
LATE = _gated_capital()
"""The one that is promoted when the server runs, and needs what no other needs: gates."""
