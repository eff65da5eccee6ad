"""All workers of the engine at once: asking them something, and having them prepare what takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from vllm_edits.edit_store.errors import EditsError, InstallRefused, Reason

STAGING_POLL_SECONDS = 0.01


class Workers(Protocol):
    """Every worker of the engine at once. Each answers plain data; an answer with 'error' is a refusal."""

    async def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call a method of `EditsWorker` on all workers, between two steps of the engine."""

    async def abort_all(self) -> None:
        """End every request that the engine has."""


async def ask(workers: Workers, method: str, *args: Any) -> list[dict[str, Any]]:
    """What every worker answers. EditsError when one fails, InstallRefused with all its reasons when one refuses."""
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
    """Have every worker begin with `stage`, and wait until `staged` answers of each that the version is prepared."""
    await ask(workers, stage, version)
    # Workers read it in threads of their own processes: there is nothing here to wait on but their word.
    while any("pending" in answer for answer in await ask(workers, staged, version)):  # noqa: ASYNC110
        await asyncio.sleep(STAGING_POLL_SECONDS)


def require_agreement(answers: Iterable[Mapping[str, Any]], on: str) -> None:
    """EditsError unless workers that have the same share of the model answer the same digest.

    Those that divide a model hold different numbers; each has checked them there against what was prepared.
    """
    held = {(answer["rank"], answer["digest"]) for answer in answers}
    if len(held) != len({shard for shard, _ in held}):
        raise EditsError(f"workers disagree on {on}: {sorted(held)}")
