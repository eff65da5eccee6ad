"""The records in the exposure log: requests of experiments, feedback on them, and shadow comparisons.

Each record is one JSON line. It contains no text of a prompt or an answer, and only a hash of the unit.
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
"""The way an arm was chosen: by the hash of the unit; forced by the request; fallback to the control."""
Outcome = Literal["ok", "error", "aborted", "rejected"]
Instant = Annotated[datetime, msgspec.Meta(tz=True)]
Amount = Annotated[float, msgspec.Meta(ge=0)]


class Exposure(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="exposure"):
    """A request of an arm, with its outcome. Times are None if no token was generated."""

    at: Instant
    request: str
    experiment: str
    phase: int
    arm: str
    version: str
    """the complete digest, or base"""
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
        """The built-in metrics in their order. NaN for a metric without a value.

        Only requests with outcome ok or error count for the error metric: the client aborted an aborted request, and
        caused a rejected one. All other metrics count only for complete answers.
        """
        whole = self.outcome == "ok"
        found = {"error": float(not whole) if whole or self.outcome == "error" else math.nan}
        for metric in list(BUILT_IN)[1:]:
            value = getattr(self, metric) if whole else None
            found[metric] = math.nan if value is None else float(value)
        return found


class FeedbackRecord(msgspec.Struct, frozen=True, gc=False, tag_field="kind", tag="feedback"):
    """Feedback of a client on an answer."""

    at: Instant
    request: str
    experiment: str
    phase: int
    arm: str
    unit: str
    metric: str
    value: float


class Said(msgspec.Struct, frozen=True):
    """A token and its log-probability, or None after the end of an answer."""

    token: int | None
    logprob: float | None


class ShadowRecord(msgspec.Struct, frozen=True, tag_field="kind", tag="shadow"):
    """A request with a shadow. In every pair, the first element is about the client's answer."""

    at: Instant
    request: str
    experiment: str
    """'' if the request itself asked for the shadow"""
    versions: tuple[str, str]
    differs_at: int | None
    """place of the first token that differs, counted from 0; None if all are equal"""
    said: tuple[Said | None, Said | None]
    """the tokens at that place"""
    tokens: tuple[int, int]
    finish: tuple[str, str]
    seconds: tuple[float, float]


Record = Exposure | FeedbackRecord | ShadowRecord
