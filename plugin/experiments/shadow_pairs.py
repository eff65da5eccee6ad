"""One request, answered twice: to the client, and unseen by a shadow; and where the two answers part. Pure.

With the same seed, or greedily, both say the same tokens until their distributions differ enough; the first token that
is not the same is where an edit begins to show.
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
    """The two names that a request asks to compare, the client's first; ShadowRefused when they are not two."""
    told = headers.get(SHADOW)
    if told is None:
        return None
    names = [name.strip() for name in told.split(",")]
    if len(names) != 2 or not all(names):
        raise ShadowRefused(f"expected two names in {SHADOW}, as in polite@a,polite@b; found {told!r}")
    return names[0], names[1]


@dataclass
class Transcript:
    """What one of two answers said, token by token."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""

    def add(self, tokens: Sequence[int], logprobs: Sequence[float], finish: str) -> None:
        """What was said since."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.finish = finish or self.finish

    def at(self, place: int) -> Said:
        """The token there and how likely it was; nothing behind the end."""
        token = self.tokens[place] if place < len(self.tokens) else None
        return Said(token=token, logprob=self.logprobs[place] if place < len(self.logprobs) else None)


def parted(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two answers are not the same; None when they are the same to the end."""
    pairs = zip_longest(one, other)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), None)


def shadow_record(
    request: str, versions: tuple[str, str], transcripts: tuple[Transcript, Transcript], seconds: tuple[float, float],
    experiment: str = "",
) -> ShadowRecord:  # fmt: skip
    """The record of a comparison, of what the client got first."""
    place = parted(transcripts[0].tokens, transcripts[1].tokens)
    said = (None, None) if place is None else (transcripts[0].at(place), transcripts[1].at(place))
    return ShadowRecord(
        at=datetime.now(UTC), request=request, experiment=experiment, versions=versions, parted_at=place,
        said=said, tokens=(len(transcripts[0].tokens), len(transcripts[1].tokens)),
        finish=(transcripts[0].finish, transcripts[1].finish), seconds=seconds,
    )  # fmt: skip
