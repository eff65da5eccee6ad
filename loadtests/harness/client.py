"""A client that remembers everything about an answer: which version gave it, each token's time, how it ended."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

ANSWER_SECONDS = 900
"""What a plain answer may take: with a GPU's kernels interpreted on a CPU, as tests do, a step may take a second."""


@dataclass
class Answer:
    """One streamed completion."""

    model: str
    status: int = 0
    variant: str = ""
    version: str = ""
    text: str = ""
    finish: str = ""
    error: str = ""
    started: float = 0.0
    ended: float = 0.0
    token_times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    """where the request asked for them (return_token_ids)"""

    @property
    def complete(self) -> bool:
        """Answered, and ended the way a request should."""
        return self.status == httpx.codes.OK and self.finish in ("stop", "length") and not self.error

    @property
    def longest_gap(self) -> float:
        """Longest time between two tokens, in seconds."""
        return max(
            (later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)),
            default=0.0,
        )


async def stream(
    client: httpx.AsyncClient, model: str, prompt: str | list[int], max_tokens: int, *, leave_after: int | None = None,
    pause: float = 0.0, **options: Any,
) -> Answer:  # fmt: skip
    """One streamed completion; trouble is recorded in the answer, never raised.

    leave_after: go away in the middle, after so many events; pause: seconds between reading one event and the next
    """
    answer = Answer(model, started=time.monotonic())
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True, **options}
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            answer.status = response.status_code
            answer.variant = response.headers.get("x-edits-variant", "")
            answer.version = response.headers.get("x-edits-version", "")
            if response.status_code != httpx.codes.OK:
                answer.error = (await response.aread()).decode()
                return answer
            events = 0
            async for line in response.aiter_lines():
                _take(answer, line)
                events += bool(line)
                if events == leave_after:
                    break
                await asyncio.sleep(pause)
    except httpx.HTTPError as error:
        answer.error = repr(error)
    answer.ended = time.monotonic()
    return answer


def _take(answer: Answer, line: str) -> None:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        answer.error = json.dumps(event["error"])
        return
    for choice in event["choices"]:
        answer.token_ids += choice.get("token_ids") or ()
        if choice["text"]:
            answer.text += choice["text"]
            answer.token_times.append(time.monotonic())
        answer.finish = choice["finish_reason"] or answer.finish


def complete(
    url: str, model: str, prompt: str | list[str] | list[int], max_tokens: int = 1, *,
    headers: dict[str, str] | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """One plain completion, of one prompt or of several; raises on an error status."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **options}
    response = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=ANSWER_SECONDS)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    answer["headers"] = response.headers
    return answer
