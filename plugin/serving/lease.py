"""The lease of a request on a version, from the request's arrival to the end of its last engine request.

The lease travels in a context variable from the HTTP middleware to the engine gate. So one rule covers every endpoint
of vLLM: a request that reaches the engine without a lease is served by the base model and cannot name a variant.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from vllm_edits.plugin.serving.variants import Choice

CURRENT_LEASE: ContextVar[Lease | None] = ContextVar("vllm_edits_lease", default=None)


@dataclass
class Usage:
    """The engine's report on a request. Times are monotonic seconds."""

    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    engine_requests: int = 0
    aborted: bool = False
    refused: bool = False
    """True if the engine refused it before it began"""
    failed: bool = False
    """True if the engine ended it with an error"""
    wrote: bool = False
    """True if an answer had a character other than spaces"""
    corrupted: bool = False
    """True if vLLM found NaN in the logits (only with VLLM_COMPUTE_NANS_IN_LOGITS=1)"""
    tail: list[int] = field(default_factory=list)
    """the last tokens, for a request of an experiment"""

    def add_output(self, tokens: int, times: tuple[float, float]) -> None:
        """Count new tokens. times: of the request's first token and of its last token so far."""
        first, last = times
        self.output_tokens += tokens
        self.first_token = min(self.first_token or first, first)
        self.last_token = last

    @property
    def seconds(self) -> float:
        """Seconds from the request's arrival until now."""
        return time.monotonic() - self.started

    @property
    def first_token_seconds(self) -> float | None:
        """Seconds from arrival to the first token, or None without a token."""
        return None if self.first_token is None else max(0.0, self.first_token - self.started)

    @property
    def seconds_per_token(self) -> float | None:
        """Mean seconds between two output tokens, or None with less than two."""
        if self.first_token is None or self.last_token is None or self.output_tokens < 2:
            return None
        return max(0.0, self.last_token - self.first_token) / (self.output_tokens - 1)


@dataclass
class Lease:
    """A version in use. While it is held, its slot is not cleared and not given to another version."""

    choice: Choice
    slot: int
    on_release: Callable[[Lease], None]
    usage: Usage = field(default_factory=Usage)
    released: bool = False
    _holders: int = 0
    _on_end: list[Callable[[], None]] = field(default_factory=list)

    @contextmanager
    def hold(self) -> Iterator[Lease]:
        """Keep the version in its slot. When the last holder leaves, the lease ends."""
        if self.released:
            raise RuntimeError(f"the lease on {self.choice.requested!r} has ended; its slot may hold another version")
        self._holders += 1
        try:
            yield self
        finally:
            self._holders -= 1
            if self._holders == 0:
                self.released = True
                self.on_release(self)
                for on_end in self._on_end:
                    on_end()

    def give_back(self) -> None:
        """End a lease that was never used."""
        with self.hold():
            pass

    def when_released(self, on_end: Callable[[], None]) -> None:
        """Call `on_end` when the last holder has left. This may be long after the end of the HTTP request."""
        if self.released:
            on_end()
        else:
            self._on_end.append(on_end)
