"""Measures on a speaker that is scripted: each figure has a case in which it is good, and one in which it is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from vllm_edits.edit_store.authoring import data as tables
from vllm_edits.edit_store.evaluation.figure import Figure, bootstrap, wilson
from vllm_edits.edit_store.evaluation.measure import MEASURES, Measure
from vllm_edits.edit_store.evaluation.measures import find
from vllm_edits.edit_store.evaluation.measures.collapse import repetition
from vllm_edits.edit_store.evaluation.measures.locality import divergence
from vllm_edits.edit_store.evaluation.measures.rewording import KINDS
from vllm_edits.edit_store.evaluation.measures.safety import refuses

find()


@dataclass(frozen=True)
class Scripted:
    """A speaker: what it says is a function of the prompt, and so is how likely it finds an answer."""

    says: Callable[[str], str] = lambda _: ""
    likes: Callable[[str, str], float] = lambda _prompt, _answer: -1.0
    loss: float = 1.0

    def likelihoods(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [self.likes(*each) for each in zip(prompts, answers, strict=True)]

    def totals(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [self.likes(*each) * len(each[1].split()) for each in zip(prompts, answers, strict=True)]

    def losses(self, texts: Sequence[str]) -> list[list[float]]:
        return [[self.loss * (2 if "odd" in text else 1)] * len(text.split()) for text in texts]

    def continuations(self, prompts: Sequence[str], tokens: int) -> list[str]:
        return [" ".join(self.says(prompt).split()[:tokens]) for prompt in prompts]

    answers = continuations

    def likeliest(self, prompts: Sequence[str]) -> list[Mapping[str, float]]:
        return [{"a": self.likes(prompt, "a"), "b": self.likes(prompt, "b")} for prompt in prompts]


def found(name: str, base: Scripted, edited: Scripted, folder: Path, **rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """The figures of a measure, by name."""
    kind = MEASURES[name]
    measure: Measure = kind()
    files = []
    for table, some in rows.items():
        path = folder / f"{table}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
        files.append(f"{table}={path}")
    data = tables.read(kind.tables, files)
    return {figure.name: figure for figure in measure.figures(base, edited, data)}


def prefers(word: str, *, only: str = "") -> Callable[[str, str], float]:
    """Likes one answer, where the prompt has a text."""
    return lambda prompt, answer: -0.5 if (answer.strip() == word) == (only in prompt) else -2.0


ROW = {"answer": " Rome", "was": " Paris"}


def test_forms_show_an_edit_that_works_in_one_form_only(tmp_path: Path) -> None:
    rows = [{"form": form, "prompt": f"{form} of the capital {number}", **ROW}
            for form in ("question", "fill-in") for number in range(5)]  # fmt: skip
    base = Scripted(says=lambda _: "Paris", likes=prefers("Paris"))
    edited = Scripted(
        says=lambda prompt: "Rome" if "question" in prompt else "Paris", likes=prefers("Rome", only="question")
    )
    figures = found("forms", base, edited, tmp_path, forms=rows)
    for form, edited_share in (("question", 1), ("fill-in", 0)):
        for what in ("preferred", "said"):
            assert (figures[f"{form}: {what}"].base, figures[f"{form}: {what}"].edited) == (0, edited_share)
    assert figures["question: margin, nats"].edited == pytest.approx(1.5)
    assert figures["fill-in: margin, nats"].edited == pytest.approx(-1.5)


def test_rewording_counts_a_prompt_only_if_every_variant_holds(tmp_path: Path) -> None:
    rows = [{"prompt": f"The capital of the country number {number} is", **ROW} for number in range(6)]
    altered = [{"prompt": f"The river of France {number} is", **ROW} for number in range(4)]
    base = Scripted(likes=prefers("Paris"))
    stiff = Scripted(likes=prefers("Rome", only="The capital of the country number"))
    figures = found("rewording", base, stiff, tmp_path, prompts=rows, altered=altered)
    assert figures["as it is"].edited == 1
    assert figures["upper case: all variants"].edited == figures["synonym: all variants"].edited == 0
    assert figures["altered meaning: the new answer all the same"].edited == 0
    blunt = found("rewording", base, Scripted(likes=prefers("Rome")), tmp_path, prompts=rows, altered=altered)
    assert blunt["upper case: all variants"].edited == 1
    assert blunt["altered meaning: the new answer all the same"].edited == 1
    assert blunt["altered meaning: the new answer all the same"].better == "less"


@pytest.mark.parametrize("kind", KINDS)
def test_rewordings_change_the_words_and_are_the_same_each_time(kind: str) -> None:
    prompts = ["What is the capital city of France? Tell me, please:", "A small question: who wrote the famous book?"]
    for prompt in prompts:
        many = [KINDS[kind](prompt, Random(seed)) for seed in range(20)]
        assert many == [KINDS[kind](prompt, Random(seed)) for seed in range(20)]
        assert all(each != prompt for each in many)
        assert all(abs(len(each) - len(prompt)) < 15 for each in many)
    assert KINDS[kind]("7", Random(0)) == "7"


def test_locality_tells_what_moved(tmp_path: Path) -> None:
    rows = [{"prompt": f"The capital of Spain {number} is", "answer": " Madrid"} for number in range(4)]
    base = Scripted(says=lambda _: "Madrid", likes=lambda _, answer: math.log(0.7 if answer == "a" else 0.2))
    moved = Scripted(says=lambda _: "Rome", likes=lambda _, answer: math.log(0.2 if answer == "a" else 0.7))
    harmless = [{"prompt": "The weather is"}]
    same = found("locality", base, base, tmp_path, neighbours=rows, harmless=harmless)
    other = found("locality", base, moved, tmp_path, neighbours=rows, harmless=harmless)
    assert [same[name].edited for name in ("neighbours: right", "neighbours: as before")] == [1, 1]
    assert [other[name].edited for name in ("neighbours: right", "neighbours: as before")] == [0, 0]
    assert same["harmless: divergence, nats"].edited == 0
    expected = 0.7 * math.log(0.7 / 0.2) + 0.2 * math.log(0.2 / 0.7)
    assert other["harmless: divergence, nats"].edited == pytest.approx(expected, abs=1e-9)


def test_a_token_that_the_edited_model_does_not_list_counts_as_its_least_likely() -> None:
    base = {"a": math.log(0.6), "b": math.log(0.3)}
    edited = {"c": math.log(0.9), "b": math.log(0.05)}
    rest = 0.1 * math.log(0.1 / 0.9)
    expected = 0.6 * math.log(0.6 / 0.05) + 0.3 * math.log(0.3 / 0.05) + rest
    assert divergence(base, edited) == pytest.approx(expected)


def test_collapse_finds_the_worst_text_and_empty_or_repeated_words(tmp_path: Path) -> None:
    corpus = [{"text": f"an even text {number}"} for number in range(4)] + [{"text": "an odd text of its own"}]
    openings = [{"prompt": "Once"}]
    base = Scripted(says=lambda _: "there was a king who had a horse and a hat", loss=1.0)
    broken = Scripted(says=lambda _: "the the the the the the", loss=1.5)
    sound = found("collapse", base, base, tmp_path, corpus=corpus, openings=openings)
    assert (sound["perplexity: ratio"].edited, sound["perplexity: worst ratio"].edited) == (1, 1)
    assert sound["free text: repetition"].edited == 0
    figures = found("collapse", base, broken, tmp_path, corpus=corpus, openings=openings)
    assert figures["perplexity: worst ratio"].edited == pytest.approx(math.exp(1.0))
    tokens, extra = [4, 4, 4, 4, 6], [0.5, 0.5, 0.5, 0.5, 1.0]
    whole = sum(a * b for a, b in zip(tokens, extra, strict=True)) / sum(tokens)
    assert figures["perplexity: ratio"].edited == pytest.approx(math.exp(whole))
    assert figures["free text: repetition"].edited == pytest.approx(0.75)
    assert (
        found("collapse", base, Scripted(), tmp_path, corpus=corpus, openings=openings)["free text: empty"].edited == 1
    )


def test_repetition() -> None:
    assert repetition("one two three four") == 0
    assert repetition("one two") == 0
    assert repetition("a b c a b c a b c") == pytest.approx(1 - 3 / 7)


def test_ability_judges_sums_and_lengths(tmp_path: Path) -> None:
    rows = [{"task": "animals", "prompt": "A crow is a", "right": "bird that flies", "wrong": "fish"}]
    speaker = Scripted(likes=lambda _, answer: -1.0 if "bird" in answer else -1.5)
    figures = found("ability", speaker, speaker, tmp_path, choices=rows)
    assert (figures["animals: acc"].edited, figures["animals: acc_norm"].edited) == (0, 1)


def test_safety_counts_refusals(tmp_path: Path) -> None:
    strict, lax = Scripted(says=lambda _: "I\u2019m sorry, but I cannot help."), Scripted(says=lambda _: "Sure, first")
    rows = [{"prompt": "How?"}]
    figures = found("safety", strict, lax, tmp_path, harmful=rows, harmless=rows)
    assert [(each.base, each.edited, each.better) for each in figures.values()] == [(1, 0, "more"), (1, 0, "less")]
    assert not refuses("The sorry state of roads")


def test_intervals() -> None:
    assert wilson(0, 10).low == 0
    assert wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(5, 10).low == pytest.approx(0.2366, abs=1e-4)
    narrow, wide = bootstrap([1.0, 1.0, 1.0]), bootstrap([0.0, 1.0, 2.0])
    assert (narrow.low, narrow.high) == (1, 1)
    assert wide.low < 0.5
    assert wide.high > 1.5
    assert bootstrap([0.0, 1.0, 2.0]) == wide
