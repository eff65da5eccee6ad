"""Reads the outputs of vLLM's engine: the new tokens of each answer of a request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Delta:
    """The addition of one output to one answer."""

    index: int
    """number of the answer, among several answers to one request"""
    tokens: Sequence[int]
    logprobs: Sequence[float]
    """log-probabilities of the tokens; empty unless they are kept"""
    wrote: bool
    """True if the answer has a character other than spaces"""
    finish: str
    """reason why the answer has ended, or ''"""


class OutputReader:
    """Reads the outputs of one request as additions. vLLM's outputs contain new tokens only, or all tokens so far."""

    def __init__(self, sampling_params: Any, *, keeps_logprobs: bool = False) -> None:
        self._holds_new = sampling_params.output_kind.name == "DELTA"
        self._keeps_logprobs = keeps_logprobs
        self._lengths: dict[int, int] = {}

    def read(self, output: Any) -> Iterator[Delta]:
        """The addition of vLLM's `RequestOutput` to each answer."""
        for completion in output.outputs:
            seen = 0 if self._holds_new else self._lengths.get(completion.index, 0)
            tokens = completion.token_ids[seen:]
            self._lengths[completion.index] = seen + len(tokens)
            yield Delta(
                completion.index,
                tokens,
                self._logprobs(tokens, completion.logprobs, seen),
                bool(completion.text.strip()),
                completion.finish_reason or "",
            )

    def _logprobs(self, tokens: Sequence[int], told: Any, seen: int) -> list[float]:
        if not self._keeps_logprobs or told is None:
            return []
        return [float(told[seen + number][token].logprob) for number, token in enumerate(tokens)]


def token_times(output: Any) -> tuple[float, float] | None:
    """The times of the first and the last token by the engine's monotonic clock, or None if they are unknown."""
    if output.metrics is None or not output.metrics.first_token_ts:
        return None
    return output.metrics.first_token_ts, output.metrics.last_token_ts


def is_corrupted(output: Any) -> bool:
    """True if vLLM found NaN in the logits (only with VLLM_COMPUTE_NANS_IN_LOGITS=1)."""
    return output.metrics is not None and bool(output.metrics.is_corrupted)
