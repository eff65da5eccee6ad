"""The tokens of a request to which an edit applies. Pure; positions count from 0, `prompt` is the prompt's length.

A scope looks at absolute positions. So a generated token stays one when its request is preempted and computed again,
and a chunked prefill gives the same as a whole one. The prompt's last position belongs to the prompt, and its output
is the first generated token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_TOKEN_IDS = 1024


def _sorted(ids: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if ids is not None and list(ids) != sorted(set(ids)):
        raise ValueError("expected token ids in order, each once")
    return ids


TokenIds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=MAX_TOKEN_IDS)]


class Scope(BaseModel):
    """Conditions that must all hold. `first` and `last` are windows of the prompt; with both, one of them must hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    segment: Literal["all", "prompt", "generated"] = "all"
    first: int | None = Field(default=None, ge=1, description="only the first so many positions of the prompt")
    last: int | None = Field(default=None, ge=1, description="only the last so many positions of the prompt")
    tokens: Annotated[TokenIds | None, AfterValidator(_sorted)] = None

    @model_validator(mode="after")
    def _windows_are_of_the_prompt(self) -> Scope:
        if self.segment == "generated" and (self.first or self.last):
            raise ValueError("first and last are windows of the prompt, which a scope of generated tokens excludes")
        return self

    @property
    def everything(self) -> bool:
        """True if it covers every token."""
        return self == ALL

    def covers(self, positions: NDArray[Any], prompt: int | NDArray[Any]) -> NDArray[np.bool_]:
        """True for each position that is covered, `tokens` aside, which a caller with the ids looks at.

        prompt: the prompt's length, or one for each position.
        """
        met = np.ones(len(positions), dtype=bool)
        if self.segment == "generated":
            met = positions >= prompt
        elif self.segment == "prompt" or self.windowed:
            met = positions < prompt
        if self.windowed:
            first = positions < (self.first or 0)
            last = positions >= prompt - (self.last or 0)
            met = met & (first | last)
        return met

    @property
    def windowed(self) -> bool:
        """True if it covers windows of the prompt only."""
        return self.first is not None or self.last is not None

    @property
    def bound_to_prompt(self) -> bool:
        """True if the prompt's length decides: the same tokens are edited in another way in a longer prompt."""
        return self.segment != "all" or self.windowed

    def begins(self, prompt: int) -> int:
        """First position that may be edited."""
        if self.segment == "generated":
            return prompt
        if self.windowed and self.first is None:
            return max(0, prompt - (self.last or 0))
        return 0


ALL = Scope()


def distinct(scopes: Iterable[Scope]) -> tuple[Scope, ...]:
    """Scopes that are not everything, each once, in order."""
    return tuple(dict.fromkeys(scope for scope in scopes if not scope.everything))


def shared_prefix(scopes: Iterable[Scope], prompt: int) -> int:
    """Number of tokens at the beginning that the base model computes alike, since no scope covers any of them."""
    return min((scope.begins(prompt) for scope in scopes), default=prompt)
