"""Prompts with answers, as a model that is changed sees them again and again: how likely the answers are.

Whatever lies below the first layer that changes is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_edits.edit_store.authoring.host import Host, replayed

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


@dataclass(frozen=True)
class _Said:
    """Logits of a model at every token of some answers, one behind the other."""

    logits: Tensor
    """[tokens, vocabulary]"""
    wanted: Tensor
    """the token that the answer has there, [tokens]"""
    counts: Tensor
    """tokens of each answer"""


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

    def likelihood(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probability of each chosen answer, summed over its tokens `[chosen]`, and the number of these."""
        said = self._said(chosen)
        found = -nn.functional.cross_entropy(said.logits, said.wanted, reduction="none")
        row = torch.repeat_interleave(torch.arange(len(chosen), device=found.device), said.counts)
        return torch.zeros(len(chosen), device=found.device).index_add(0, row, found), said.counts

    def loss(self, chosen: Sequence[int]) -> Tensor:
        """Mean negative log-probability per token of the chosen answers."""
        return self.losses(chosen).mean()

    def losses(self, chosen: Sequence[int]) -> Tensor:
        """The same for each of them, [chosen]."""
        summed, counts = self.likelihood(chosen)
        return -summed / counts

    def right(self, chosen: Sequence[int]) -> list[list[bool]]:
        """For each chosen answer, True at every token that is the likeliest one there."""
        said = self._said(chosen)
        found = (said.logits.argmax(-1) == said.wanted).tolist()
        ends = said.counts.cumsum(0).tolist()
        return [found[end - count : end] for end, count in zip(ends, said.counts.tolist(), strict=True)]

    def _said(self, chosen: Sequence[int]) -> _Said:
        lessons = [self._lessons[number] for number in chosen]
        ids = _padded([torch.tensor(each.ids) for each in lessons]).to(self._host.device)
        column = torch.arange(ids.shape[1] - 1)
        told = torch.stack([(column >= each.prompt - 1) & (column < len(each.ids) - 1) for each in lessons])
        first = min(each.prompt for each in lessons) - 1
        place = torch.arange(first, ids.shape[1] - 1, device=self._host.device)
        with self._replayed(chosen):
            logits = self._host.model(ids, use_cache=False, logits_to_keep=place).logits
        told = told[:, first:].to(logits.device)
        return _Said(logits[told], ids[:, first + 1 :][told], told.sum(1))

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
        states = _padded([self._states[number] for number in chosen])
        with replayed(self._host, states, below=self._below):
            yield


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different length as one tensor, filled up behind, where causal attention never looks."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
