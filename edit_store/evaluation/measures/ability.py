"""General ability: multiple choice with two answers each, as lm-evaluation-harness judges it, zero-shot.

    acc        the right answer has the higher log-likelihood: the sum over its tokens
    acc_norm   the same, over the length of the answer in bytes

Tasks are files of rows; nothing is fetched. Sequential edits lower such figures after a few dozen (arXiv 2410.18785),
and edits that unlearn one task can lower others (arXiv 2409.02228): a figure by task shows both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from vllm_edits.edit_store.authoring.data import Data, Row, Table, Text
from vllm_edits.edit_store.evaluation.figure import Figure
from vllm_edits.edit_store.evaluation.measure import MEASURES, Measure
from vllm_edits.edit_store.evaluation.speaker import Speaker


class Choice(Row):
    """A question of a task, with the right answer and a wrong one."""

    task: Text
    prompt: Text
    right: Text
    wrong: Text


class Ability(Measure):
    """Share of questions with the right answer likelier, for each task."""

    tables: ClassVar[Mapping[str, Table]] = {"choices": Table(Choice, "questions by task, each with two answers")}

    def figures(self, base: Speaker, edited: Speaker, data: Data) -> Iterator[Figure]:
        for task in dict.fromkeys(row.task for row in data["choices"]):
            rows = [row for row in data["choices"] if row.task == task]
            scores = [_scores(speaker, rows) for speaker in (base, edited)]
            for name in ("acc", "acc_norm"):
                yield Figure.share(f"{task}: {name}", (side[name] for side in scores), "more")


def _scores(speaker: Speaker, rows: list[Choice]) -> dict[str, list[bool]]:
    prompts = [row.prompt for row in rows]
    totals = []
    for column in ("right", "wrong"):
        answers = [f" {getattr(row, column).strip()}" for row in rows]
        totals.append((speaker.totals(prompts, answers), [len(answer.encode()) for answer in answers]))
    (right, right_bytes), (wrong, wrong_bytes) = totals
    return {
        "acc": [a > b for a, b in zip(right, wrong, strict=True)],
        "acc_norm": [a / n > b / m for a, n, b, m in zip(right, right_bytes, wrong, wrong_bytes, strict=True)],
    }


MEASURES.add(Ability.called(), Ability)
