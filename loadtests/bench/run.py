"""What each part of the benchmark is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from rich.progress import Progress

from loadtests.bench.inputs import Inputs
from loadtests.harness.client import Answer
from vllm_edits.server_config.settings import Profile


class NotMeasured(Exception):
    """What was to be measured did not happen, and why: the run ends with these words."""


def require(answers: Iterable[Answer]) -> None:
    """NotMeasured if one of them is not complete."""
    for answer in answers:
        if not answer.complete:
            raise NotMeasured(f"a request for {answer.model} was not answered: {answer.status} {answer.error}")


@dataclass(frozen=True)
class Run:
    """One call of the benchmark."""

    inputs: Inputs
    dtype: str
    cores: Sequence[int]
    """of each engine, on a CPU"""
    batches: Sequence[int]
    """how many requests at once, from one to what the device bears"""
    progress: Progress
    rounds: int
    swaps: int
    quick: bool
    """little of everything: only to see that the benchmark works"""
    ranks: Sequence[int] = ()
    """of the versions that are told apart; none: the usual ones"""
    all_kinds: bool = True
    """whether they are told apart of versions of all kinds too"""
    once: bool = False
    """no second engines that show the noise"""
    reserve: Sequence[Profile] = ("standard",)
    """profiles whose cost at rest is measured"""
    seconds: float = inf
    """after so many in a part its rounds end, once there are enough to tell the noise"""


@dataclass(frozen=True)
class Measured:
    """A part's figures, with what shaped them and what they were made of."""

    parameters: Mapping[str, Any]
    samples: Any
    summary: Mapping[str, Any]
