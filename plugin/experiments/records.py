"""What is written down of requests that took part in an experiment, and of what clients said about them.

One JSON line each. No text, and of the unit a hash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from vllm_edits.edit_store.experiments.document import BUILT_IN
from vllm_edits.plugin.request import Source

How = Literal["hash", "forced", "fallback"]
"""By the hash of its unit; because the request asked for it; the control in place of an arm that cannot be served."""
Outcome = Literal["ok", "error", "aborted", "rejected"]
Instant = Annotated[datetime, msgspec.Meta(tz=True)]
Amount = Annotated[float, msgspec.Meta(ge=0)]


class Exposure(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="exposure"):
    """A request that was answered, or not, by an arm. Times are None where nothing was generated."""

    at: Instant
    request: str
    experiment: str
    phase: int
    arm: str
    version: str
    """the digest in full, or base"""
    unit: str
    source: Source
    chosen: How
    outcome: Outcome
    prompt_tokens: int
    output_tokens: int
    seconds: Amount | None
    first_token_seconds: Amount | None
    seconds_per_token: Amount | None
    empty: bool
    looping: bool
    corrupted: bool

    def metrics(self) -> Mapping[str, float]:
        """The built-in metrics in their order, NaN where one has no value.

        Errors are among served requests, ok or error: an aborted one was the client's wish and a rejected one its
        fault. What an answer was like is asked of whole answers only.
        """
        whole = self.outcome == "ok"
        found = {"error": float(not whole) if whole or self.outcome == "error" else math.nan}
        for metric in list(BUILT_IN)[1:]:
            value = getattr(self, metric) if whole else None
            found[metric] = math.nan if value is None else float(value)
        return found


class FeedbackRecord(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="feedback"):
    """What somebody thought of an answer."""

    at: Instant
    request: str
    experiment: str
    phase: int
    arm: str
    unit: str
    metric: str
    value: float


class Said(msgspec.Struct, frozen=True):
    """A token and its log-probability; None behind the end of an answer."""

    token: int | None
    logprob: float | None


class ShadowRecord(msgspec.Struct, frozen=True, tag_field="kind", tag="shadow"):
    """A request that was answered twice; of every pair the client's own answer is the first."""

    at: Instant
    request: str
    experiment: str
    """'' for one that asked for it"""
    versions: tuple[str, str]
    parted_at: int | None
    """the first token that is not the same, counted from 0; None when all are"""
    said: tuple[Said | None, Said | None]
    """what each said there"""
    tokens: tuple[int, int]
    finish: tuple[str, str]
    seconds: tuple[float, float]


Record = Exposure | FeedbackRecord | ShadowRecord
