"""What vLLM's engine says of a request, read in one place: what each output adds to each of the request's answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Delta:
    """What one output adds to one answer."""

    index: int
    """which of several answers to the same request"""
    tokens: Sequence[int]
    logprobs: Sequence[float]
    """of the tokens; empty unless they are kept"""
    wrote: bool
    """whether the text of the answer has a character that is no space"""
    finish: str
    """why the answer has ended, '' while it goes on"""


class OutputReader:
    """Reads the outputs of one request, which hold what is new or all so far, as what is new."""

    def __init__(self, sampling_params: Any, *, keeps_logprobs: bool = False) -> None:
        self._holds_new = sampling_params.output_kind.name == "DELTA"
        self._keeps_logprobs = keeps_logprobs
        self._lengths: dict[int, int] = {}

    def read(self, output: Any) -> Iterator[Delta]:
        """What a `RequestOutput` of vLLM adds to each answer."""
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
    """When the first and the last token came, by the engine's clock, which is monotonic as ours; None if not told."""
    if output.metrics is None or not output.metrics.first_token_ts:
        return None
    return output.metrics.first_token_ts, output.metrics.last_token_ts


def is_corrupted(output: Any) -> bool:
    """Whether vLLM found NaN among the logits (it looks with VLLM_COMPUTE_NANS_IN_LOGITS=1)."""
    return output.metrics is not None and bool(output.metrics.is_corrupted)
