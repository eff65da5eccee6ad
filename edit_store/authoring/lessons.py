"""Prompts with answers, as a model that is changed sees them again and again: how likely the answers are.

Whatever lies below the first layer that changes is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vllm_edits.edit_store.authoring.host import Host, Said, replayed

KEPT_BYTES = 1 << 30
"""Size of the states below the first changed layer up to which they are kept."""


@dataclass(frozen=True)
class Lesson:
    """A prompt with the answer behind it, as token ids."""

    ids: tuple[int, ...]
    prompt: int
    """tokens of the prompt"""


def lesson(tokenizer: Any, prompt: str, answer: str, *, end: bool = False) -> Lesson:
    """A lesson from texts, with the end of the text behind the answer if `end`. The answer brings its own space."""
    ids = [*tokenizer(prompt + answer)["input_ids"], *([tokenizer.eos_token_id] if end else [])]
    return Lesson(tuple(map(int, ids)), len(tokenizer(prompt)["input_ids"]))


class Lessons:
    """Lessons that a model is trained or judged with."""

    def __init__(self, host: Host, lessons: Sequence[Lesson], *, below: int = 0) -> None:
        """below: the first layer that changes."""
        self._host = host
        self._lessons = lessons
        tokens = sum(len(each.ids) for each in lessons)
        self._below = below if tokens * host.widths.hidden * 4 <= KEPT_BYTES else 0
        self._states: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._lessons)

    def loss(self, chosen: Sequence[int]) -> Tensor:
        """Mean negative log-probability per token of the chosen answers."""
        return -self.said(chosen).means().mean()

    def said(self, chosen: Sequence[int]) -> Said:
        """The model's word on the chosen answers."""
        lessons = [self._lessons[number] for number in chosen]
        with self._replayed(chosen):
            return self._host.said([each.ids for each in lessons], [each.prompt for each in lessons])

    @contextmanager
    def _replayed(self, chosen: Sequence[int]) -> Iterator[None]:
        if self._below == 0:
            yield
            return
        new = [number for number in dict.fromkeys(chosen) if number not in self._states]
        if new:
            site = f"layers.{self._below - 1}.resid"
            rows = self._host.activations_of([self._lessons[number].ids for number in new], [site])[site]
            self._states |= dict(zip(new, (row.clone() for row in rows), strict=True))
        # Filled up behind, where causal attention never looks.
        states = nn.utils.rnn.pad_sequence([self._states[number] for number in chosen], batch_first=True)
        with replayed(self._host, states, below=self._below):
            yield
