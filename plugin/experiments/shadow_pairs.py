"""Compares the client's answer with the answer of a shadow, and finds the first token that differs. Pure.

With the same seed, or with greedy decoding, both answers are equal until their distributions differ enough. The first
different token shows where an edit takes effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest

from vllm_edits.edit_store.errors import ShadowRefused
from vllm_edits.plugin.experiments.records import Said, ShadowRecord
from vllm_edits.plugin.headers import SHADOW


def shadow_in(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """The two names that a request asks to compare, the client's first. ShadowRefused unless there are two."""
    told = headers.get(SHADOW)
    if told is None:
        return None
    names = [name.strip() for name in told.split(",")]
    if len(names) != 2 or not all(names):
        raise ShadowRefused(f"expected two names in {SHADOW}, as in polite@a,polite@b; found {told!r}")
    return names[0], names[1]


@dataclass
class Transcript:
    """The tokens of one of the two answers."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""

    def add(self, tokens: Sequence[int], logprobs: Sequence[float], finish: str) -> None:
        """Add new tokens."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.finish = finish or self.finish

    def at(self, place: int) -> Said:
        """The token at a place and its log-probability; None after the end."""
        token = self.tokens[place] if place < len(self.tokens) else None
        return Said(token=token, logprob=self.logprobs[place] if place < len(self.logprobs) else None)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two answers differ, or None if they are equal."""
    pairs = zip_longest(one, other)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), None)


def shadow_record(
    request: str, versions: tuple[str, str], transcripts: tuple[Transcript, Transcript], seconds: tuple[float, float],
    experiment: str = "",
) -> ShadowRecord:  # fmt: skip
    """Make the record of a comparison. In each pair, the client's answer comes first."""
    place = first_difference(transcripts[0].tokens, transcripts[1].tokens)
    said = (None, None) if place is None else (transcripts[0].at(place), transcripts[1].at(place))
    return ShadowRecord(
        at=datetime.now(UTC), request=request, experiment=experiment, versions=versions, differs_at=place,
        said=said, tokens=(len(transcripts[0].tokens), len(transcripts[1].tokens)),
        finish=(transcripts[0].finish, transcripts[1].finish), seconds=seconds,
    )  # fmt: skip
