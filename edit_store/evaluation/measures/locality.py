"""Locality: does the edit leave alone what it does not name?

Neighbours are facts near the edited ones; the edited model shall go on with them as the base model does. On harmless
prompts the distribution of the next token shall stay:

    KL(base | edited)  over the listed tokens of the base model and one class for all others, in nats
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

from pydantic import Field

from vllm_edits.edit_store.authoring.data import Data, PromptRow, Row, Table, Text
from vllm_edits.edit_store.evaluation.figure import Figure
from vllm_edits.edit_store.evaluation.measure import MEASURES, Measure
from vllm_edits.edit_store.evaluation.speaker import Speaker


class Neighbour(Row):
    """A prompt, and how the base model should go on with it."""

    prompt: Text
    answer: Text


class Locality(Measure):
    """Neighbouring facts, greedy continuations, and the next token on harmless prompts, which shall stay."""

    tables: ClassVar[Mapping[str, Table]] = {
        "neighbours": Table(Neighbour, "facts near the edited ones, with their answers", least=0),
        "harmless": Table(PromptRow, "prompts that have nothing to do with the edit", least=0),
    }

    tokens: int = Field(6, gt=0, description="Tokens of a greedy answer.")

    def figures(self, base: Speaker, edited: Speaker, data: Data) -> Iterator[Figure]:
        if rows := data["neighbours"]:
            said = [speaker.continuations([row.prompt for row in rows], self.tokens) for speaker in (base, edited)]
            right = ([row.answer.strip() in text for row, text in zip(rows, side, strict=True)] for side in said)
            yield Figure.share("neighbours: right", right, "more")
            alike = [a == b for a, b in zip(*said, strict=True)]
            yield Figure.share("neighbours: as before", ([True] * len(alike), alike), "more")
        if prompts := [row.prompt for row in data["harmless"]]:
            pairs = zip(base.likeliest(prompts), edited.likeliest(prompts), strict=True)
            moved = [divergence(before, now) for before, now in pairs]
            yield Figure.mean("harmless: divergence, nats", ([0.0] * len(moved), moved), "less")


def divergence(base: Mapping[str, float], edited: Mapping[str, float]) -> float:
    """KL(base | edited) of two lists of likely tokens. One that `edited` does not list counts as its least likely."""
    least = min(edited.values())
    total, rest_base, rest_edited = 0.0, 1.0, 1.0
    for token, value in base.items():
        other = edited.get(token, least)
        total += math.exp(value) * (value - other)
        rest_base -= math.exp(value)
        rest_edited -= math.exp(other)
    if rest_base > 1e-6 and rest_edited > 1e-6:
        total += rest_base * math.log(rest_base / rest_edited)
    return max(0.0, total)


MEASURES.add(Locality.called(), Locality)
