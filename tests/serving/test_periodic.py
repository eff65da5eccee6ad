"""What is done for ever outlives what goes wrong once."""

from __future__ import annotations

import asyncio

import pytest

from vllm_edits.plugin.periodic import repeat

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_turn_that_fails_is_told_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    turns, enough = list[int](), asyncio.Event()

    async def act() -> None:
        turns.append(len(turns))
        if len(turns) == 1:
            raise RuntimeError("once")
        enough.set()

    task = asyncio.create_task(repeat(0.001, act, "nothing was done"))
    await asyncio.wait_for(enough.wait(), 10)
    task.cancel()
    (told,) = caplog.records
    assert told.getMessage() == "nothing was done"
    assert told.exc_info is not None
