"""Sends the same prompts to two versions of a server, and finds the first different token of their answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.cli_client import authorization, no_answer
from vllm_edits.plugin.experiments.shadow_pairs import first_difference

AT_ONCE = 8
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Replayed:
    """The answer of one version."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    text: str


@dataclass(frozen=True)
class AnswerPair:
    """The comparison of two answers to one prompt. `differs_at` is None if they are equal."""

    prompt: str
    differs_at: int | None
    tokens: tuple[int, int]
    """number of tokens of each answer"""
    logprobs: tuple[float | None, float | None]
    """log-probabilities of the tokens at the first difference"""
    said: tuple[str, str]

    @classmethod
    def of(cls, prompt: str, one: Replayed, other: Replayed) -> AnswerPair:
        place = first_difference(one.tokens, other.tokens)

        def there(answer: Replayed) -> float | None:
            return answer.logprobs[place] if place is not None and place < len(answer.logprobs) else None

        return cls(
            prompt, place, (len(one.tokens), len(other.tokens)), (there(one), there(other)), (one.text, other.text)
        )


def bodies(path: Path) -> list[dict[str, Any]]:
    """Read the requests of a file: lines of JSON with `prompt` or `messages`, or plain lines of text.

    EditsError with the number of a line that is neither.
    """
    try:
        lines = path.read_text().split("\n")  # splitlines would also split at characters that JSON strings may contain
    except (OSError, UnicodeDecodeError) as error:
        raise EditsError(f"{path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            body = json.loads(line) if line.lstrip().startswith("{") else {"prompt": line}
        except ValueError as error:
            raise EditsError(
                f"{path}, line {number}: expected JSON, because the line begins with a brace: {error}"
            ) from None
        if not {"prompt", "messages"} & body.keys():
            raise EditsError(f"{path}, line {number}: expected a field `prompt` or `messages`, found {', '.join(body)}")
        found.append(body)
    if not found:
        raise EditsError(f"{path} contains no prompt. Write one prompt per line")
    return found


async def replay(
    url: str, pair: tuple[str, str], requests: Sequence[dict[str, Any]], *, max_tokens: int, api_key: str = "",
    progress: Callable[[], None] = lambda: None,
) -> list[AnswerPair]:  # fmt: skip
    """Send each prompt to both versions at the same time, and compare. Greedy, unless a request says otherwise."""
    turns = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, headers=authorization(api_key), timeout=600) as client:

        async def both(body: dict[str, Any]) -> AnswerPair:
            async with turns:
                one, other = await asyncio.gather(*(_ask(client, model, body, max_tokens) for model in pair))
            progress()
            return AnswerPair.of(json.dumps(body.get("prompt", body.get("messages")), ensure_ascii=False), one, other)

        return list(await asyncio.gather(*map(both, requests)))


async def _ask(client: httpx.AsyncClient, model: str, body: dict[str, Any], max_tokens: int) -> Replayed:
    chat = "messages" in body
    told = {"logprobs": True, "top_logprobs": 0} if chat else {"logprobs": 0}
    asked = {"max_tokens": max_tokens, "temperature": 0, "seed": 0, **body, **told, "model": model, "stream": False,
             "return_token_ids": True}  # fmt: skip
    try:
        answer = await client.post(CHAT if chat else COMPLETIONS, json=asked)
    except httpx.HTTPError as error:
        raise no_answer(str(client.base_url), error) from None
    if answer.status_code != httpx.codes.OK:
        raise EditsError(f"{model} answered {answer.status_code}: {answer.text[:300]}")
    choice = answer.json()["choices"][0]
    if chat:
        logprobs = [each["logprob"] for each in choice["logprobs"]["content"]]
        text = choice["message"]["content"] or ""
    else:
        logprobs, text = choice["logprobs"]["token_logprobs"], choice["text"]
    return Replayed(choice["token_ids"], logprobs, text)


def summary(pairs: Sequence[AnswerPair]) -> dict[str, Any]:
    """The number of different answers, and the median place of the first difference."""
    places = [each.differs_at for each in pairs if each.differs_at is not None]
    return {
        "prompts": len(pairs), "differ": len(places), "share": len(places) / len(pairs),
        "median_token": median(places) if places else None,
    }  # fmt: skip
