"""Constant load: streams that follow each other without a pause, while something else happens to the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx

from loadtests.harness.client import Answer, stream


class Question(NamedTuple):
    """A prompt for a model, and the largest number of tokens of an answer."""

    model: str
    prompt: str
    tokens: int


@asynccontextmanager
async def constant_load(
    client: httpx.AsyncClient, questions: Iterable[Question], **options: Any
) -> AsyncIterator[list[Answer]]:
    """Ask each question again and again. Gives the answers that have ended.

    When the block ends, it waits for the answers that are still running. A question that failed is not asked again, and
    its failure is among the answers.
    """
    answers, ended = list[Answer](), asyncio.Event()

    async def ask(question: Question) -> None:
        while not ended.is_set():
            answer = await stream(client, *question, **options)
            answers.append(answer)
            if not answer.complete:
                return

    async with asyncio.TaskGroup() as group:
        for question in questions:
            group.create_task(ask(question))
        yield answers
        ended.set()
