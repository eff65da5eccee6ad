"""Calls all workers of the engine, and waits for long preparations in them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from vllm_edits.edit_store.errors import EditsError, InstallRefused, Reason

STAGING_POLL_SECONDS = 0.01


class Workers(Protocol):
    """All workers of the engine. Each answers plain data; an answer with 'error' is a refusal."""

    async def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call a method of `EditsWorker` on all workers, between two steps of the engine."""

    async def abort_all(self) -> None:
        """Abort every request in the engine."""


async def ask(workers: Workers, method: str, *args: Any) -> list[dict[str, Any]]:
    """Call all workers; returns their answers. EditsError if one fails, InstallRefused if one refuses."""
    try:
        answers = await workers.call(method, *args)
    except Exception as error:
        raise EditsError(f"the workers did not answer {method}: {error!r}") from error
    for answer in answers:
        if "error" in answer:
            reasons = [Reason(code, message) for code, message in answer.get("reasons", ())]
            raise (
                InstallRefused("the install", reasons)
                if reasons
                else EditsError(f"a worker failed at {method}: {answer['error']}")
            )
    return answers


async def prepare(workers: Workers, stage: str, staged: str, version: str) -> None:
    """Call `stage` on every worker, then wait until `staged` reports the version as prepared on each."""
    await ask(workers, stage, version)
    # Workers prepare it in threads of their own processes, so the only way to wait is to poll them.
    while any("pending" in answer for answer in await ask(workers, staged, version)):  # noqa: ASYNC110
        await asyncio.sleep(STAGING_POLL_SECONDS)


def require_agreement(answers: Iterable[Mapping[str, Any]], on: str) -> None:
    """EditsError unless workers with the same shard of the model report the same digest.

    Workers that divide a model have different numbers. Each has checked its own against the prepared version.
    """
    held = {(answer["rank"], answer["digest"]) for answer in answers}
    if len(held) != len({shard for shard, _ in held}):
        raise EditsError(f"workers disagree on {on}: {sorted(held)}")
