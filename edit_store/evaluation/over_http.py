"""A speaker behind a server's completions endpoint, as any client uses it: nothing of the engine is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import Any, Self, TypeVar

import httpx

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.edit_store.evaluation.speaker import merged
from vllm_edits.edit_store.probes import LISTED

T = TypeVar("T")
R = TypeVar("R")
AT_ONCE = 8
ANSWER_SECONDS = 300.0


class ServerSpeaker:
    """`Speaker` that asks a server for one model name. Use it in a with statement, which closes its connections."""

    def __init__(self, url: str, model: str, *, api_key: str = "") -> None:
        self._model = model
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=ANSWER_SECONDS)
        self.versions: set[str] = set()
        """versions that have answered so far"""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def likelihoods(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [-fmean(losses) for losses in self._of_answers(prompts, answers)]

    def totals(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [-sum(losses) for losses in self._of_answers(prompts, answers)]

    def _of_answers(self, prompts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
        """-log p of the tokens of each answer."""

        def one(pair: tuple[str, str]) -> list[float]:
            prompt, answer = pair
            losses = self._told(prompt + answer, behind=len(prompt))
            if not losses:
                raise merged(prompt, answer)
            return losses

        return self._each(one, list(zip(prompts, answers, strict=True)))

    def losses(self, texts: Sequence[str]) -> list[list[float]]:
        return self._each(lambda text: self._told(text, behind=0), texts)

    def continuations(self, prompts: Sequence[str], tokens: int) -> list[str]:
        return self._each(lambda prompt: str(self._complete(prompt, tokens)["text"]), prompts)

    def answers(self, questions: Sequence[str], tokens: int) -> list[str]:
        def one(question: str) -> str:
            messages = [{"role": "user", "content": question}]
            found = self._post("/v1/chat/completions", {"messages": messages, "max_tokens": tokens})
            return str(found["choices"][0]["message"]["content"] or "")

        return self._each(one, questions)

    def likeliest(self, prompts: Sequence[str]) -> list[Mapping[str, float]]:
        def one(prompt: str) -> Mapping[str, float]:
            (row,) = self._complete(prompt, 1, logprobs=LISTED)["logprobs"]["top_logprobs"]
            found: Mapping[str, float] = row
            return found

        return self._each(one, prompts)

    def _told(self, text: str, *, behind: int) -> list[float]:
        """-log p of every token of a text that begins behind so many characters, without the first of all."""
        told = self._complete(text, 1, echo=True, logprobs=0)["logprobs"]
        rows = zip(told["text_offset"], told["token_logprobs"], strict=True)
        return [-value for place, value in list(rows)[:-1] if value is not None and place >= behind]

    def _complete(self, prompt: str, tokens: int, **options: Any) -> dict[str, Any]:
        choice: dict[str, Any] = self._post("/v1/completions", {"prompt": prompt, "max_tokens": tokens, **options})[
            "choices"
        ][0]
        return choice

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            answer = self._client.post(path, json={"model": self._model, "temperature": 0, **body})
        except httpx.HTTPError as error:
            raise EditsError(f"{self._client.base_url} does not answer: {error!r}") from error
        if answer.status_code != httpx.codes.OK:
            raise EditsError(f"{self._client.base_url}{path} answered {answer.status_code}: {answer.text[:500]}")
        self.versions.add(answer.headers.get("x-edits-version", ""))
        return answer.json()

    def _each(self, ask: Callable[[T], R], items: Sequence[T]) -> list[R]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, items))
