"""Probes: prompts with what the base model and the edited one say behind them. A server proves a version with them.

A probe has a trace of the base model and one of the edited model, computed by transformers in float32: the greedy
continuation of the prompt, and at each of its places the log-probabilities of the watched tokens. One that is not among
the LISTED likeliest there counts as the least likely of those, since a server lists no more. A server lets its own base
model and the version in its slot continue the prompt, and compares, in nats:

    noise    rms of (served base - recorded base) over all probes; at least the FLOORS of the dtype
    effect   rms of (recorded edited - recorded base)
    error    rms of (served edited - recorded edited)
    share    <served edited - served base, recorded edited - recorded base> / |recorded edited - recorded base|^2,
             over all probes: 1 for edits that are applied, 0 for none, 1/2 for half of them, -1 for their opposite

rms and <,> are over watched tokens, and over places as long as both continuations have the same tokens before them. A
version is proven if

    error <= NOISES noise + ERROR effect            for each probe
    |share - 1| <= SHARE + NOISES noise / (effect sqrt(places))

Where the right side of the last line is 1 or more, a server that applied nothing would pass too: the probes are weak.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from vllm_edits.edit_store.record import FrozenRecord

MAX_PROBES = 32
MAX_PROMPT = 256
MAX_PLACES = 16
MAX_WATCHED = 64
LISTED = 20
"""likeliest tokens at each place; vLLM's servers list no more by default"""
LEAST = -1e4
"""log-probability in place of one that is no number, or infinite"""
DIGITS = 4
"""digits behind the point of a recorded log-probability"""

NOISES = 4.0
ERROR = 0.2
SHARE = 0.25
FLOORS = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2}
"""Least noise by the dtype of the served model: rounding differs from one prompt to the next."""

TokenId = Annotated[int, Field(ge=0)]
LogProbability = Annotated[float, Field(le=0, allow_inf_nan=False)]


class Trace(FrozenRecord):
    """The continuation of a prompt by a model, with the log-probabilities of the watched tokens at each place."""

    tokens: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_PLACES)]
    logprobs: tuple[tuple[LogProbability, ...], ...]
    """[places, watched]"""
    least: tuple[LogProbability, ...]
    """of the tokens that are listed at each place; no watched one counts as less"""


class Probe(FrozenRecord):
    """A prompt, as token ids, with what the base model and the edited one say behind it."""

    prompt: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_PROMPT)]
    strength: float = Field(default=1.0, allow_inf_nan=False)
    watched: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_WATCHED)]
    """tokens whose log-probabilities are compared"""
    base: Trace
    edited: Trace

    @model_validator(mode="after")
    def _of_one_size(self) -> Probe:
        places = len(self.base.tokens)
        for trace in (self.base, self.edited):
            sizes = {len(row) for row in trace.logprobs}
            counts = [len(trace.tokens), len(trace.logprobs), len(trace.least)]
            if set(counts) != {places} or sizes != {len(self.watched)}:
                raise ValueError(
                    f"expected {places} places with {len(self.watched)} log-probabilities each, found {counts} tokens, "
                    f"places and least ones, and places with {sorted(sizes)}"
                )
        if len(set(self.watched)) < len(self.watched):
            raise ValueError("expected every watched token once")
        return self

    @property
    def places(self) -> int:
        """Tokens of each continuation."""
        return len(self.base.tokens)

    def highest_token(self) -> int:
        """The largest token id in it."""
        return max(*self.prompt, *self.watched, *self.base.tokens, *self.edited.tokens)


@dataclass(frozen=True)
class ProbeResult:
    """One probe on one server, in nats."""

    strength: float
    effect: float
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """True if the served version says what was recorded."""
        return self.error <= self.limit


@dataclass(frozen=True)
class ProbeReport:
    """The probes of a version in one engine."""

    noise: float
    share: float
    """part of the recorded effect that is there; 1 where there is none to look for"""
    allowed: float
    """largest difference of the share from 1"""
    results: tuple[ProbeResult, ...]

    @property
    def passed(self) -> bool:
        """True if the served version is the recorded one, as far as the probes can tell."""
        return all(result.passed for result in self.results) and abs(self.share - 1) <= self.allowed

    @property
    def weak(self) -> bool:
        """True if a server that applied nothing would pass too."""
        return self.allowed >= 1

    def told(self) -> str:
        """The figures, for people."""
        worst = max(self.results, key=lambda result: result.error / result.limit)
        failed = sum(not result.passed for result in self.results)
        return (
            f"{self.share:.0%} of the change that its author recorded is there, expected 100% give or take "
            f"{self.allowed:.0%}; {failed} of {len(self.results)} probes differ by more than their limit, the worst by "
            f"{worst.error:.3g} nats (limit {worst.limit:.3g}, effect {worst.effect:.3g}, noise {self.noise:.3g})"
        )

    def as_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "passed": self.passed, "weak": self.weak, "share": self.share, "allowed": self.allowed, "noise": self.noise,
            "probes": [{**asdict(result), "passed": result.passed} for result in self.results],
        }  # fmt: skip


def compare(
    probes: Sequence[Probe], base: Sequence[Trace | None], edited: Sequence[Trace], *, floor: float
) -> ProbeReport:
    """Compare what a server says with what was recorded.

    base: None where the base model could not be asked, since a version is in the weights. floor: least noise, in nats
    """
    noise = max(floor, rms(
        difference for probe, served in zip(probes, base, strict=True) if served is not None
        for difference in _joined(_differences(served, probe.base))
    ))  # fmt: skip
    results, product, square, places = [], 0.0, 0.0, 0
    for probe, served_base, served in zip(probes, base, edited, strict=True):
        recorded = list(_differences(probe.edited, probe.base))
        effect = rms(_joined(recorded))
        error = rms(_joined(_differences(served, probe.edited)))
        results.append(ProbeResult(probe.strength, effect, error, NOISES * noise + ERROR * effect))
        for there, expected in zip(_differences(served, served_base or probe.base), recorded, strict=False):
            product += sum(a * b for a, b in zip(there, expected, strict=True))
            square += sum(b * b for b in expected)
            places += 1
    numbers = sum(len(probe.watched) for probe in probes) / len(probes)
    changed = math.sqrt(square / (places * numbers))
    if changed == 0:
        return ProbeReport(noise, 1.0, math.inf, tuple(results))
    return ProbeReport(noise, product / square, SHARE + NOISES * noise / (changed * math.sqrt(places)), tuple(results))


def rms(numbers: Iterable[float]) -> float:
    """Root of the mean of squares; 0 for none."""
    squares = [number * number for number in numbers]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def effect_of(probe: Probe) -> float:
    """The rms of what the edits change by the record, in nats."""
    return rms(_joined(_differences(probe.edited, probe.base)))


def _joined(rows: Iterable[Sequence[float]]) -> Iterator[float]:
    for row in rows:
        yield from row


def _differences(one: Trace, other: Trace) -> Iterator[list[float]]:
    """Differences of the log-probabilities at each place, up to and with the first place with another token."""
    for number, (row, other_row) in enumerate(zip(one.logprobs, other.logprobs, strict=True)):
        least = max(one.least[number], other.least[number])
        yield [max(a, least) - max(b, least) for a, b in zip(row, other_row, strict=True)]
        if one.tokens[number] != other.tokens[number]:
            return
