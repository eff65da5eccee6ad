"""Runs a request a second time, beside the one whose answer the client gets, and notes where the two part.

Whatever happens to the second one is no matter of the client's: a slot that is not to be had, an error, and nothing is
noted. When the client goes away it is ended too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from vllm_edits.plugin.claim import address
from vllm_edits.plugin.experiments.records import ShadowRecord
from vllm_edits.plugin.experiments.shadow_pairs import Transcript, shadow_record
from vllm_edits.plugin.serving.lease import Lease

logger = logging.getLogger("vllm.edits")

SLOT_PATIENCE_SECONDS = 5.0
"""how long the second one waits for a slot: two requests that each hold one and wait for another would wait for ever"""

LeaseOf = Callable[[str], Awaitable[Lease]]
_running: set[asyncio.Task[None]] = set()  # what nobody refers to may be collected while it runs


class ShadowRun:
    """The second run of one request. `hear` is told what the first one says, `end` that it has said everything."""

    def __init__(self, lease: Lease, *, deltas: bool, note: Callable[[ShadowRecord], None]) -> None:
        self._lease = lease
        self._deltas = deltas
        self._note = note
        self._first, self._second = Transcript(), Transcript()
        self._started = time.monotonic()
        self._first_ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    def start(self, engine: Any, lease_of: LeaseOf, request: tuple[Any, Any, str], *, forks: bool) -> None:
        """Begin. request: prompt, sampling parameters and id, as the first one's."""
        self._task = asyncio.get_running_loop().create_task(self._run(engine, lease_of, request, forks=forks))
        _running.add(self._task)
        self._task.add_done_callback(_running.discard)

    def hear(self, output: Any) -> None:
        """An output of the first one."""
        self._first.hear(output, deltas=self._deltas)

    def end(self, *, whole: bool) -> None:
        """The first one has ended; unless it said all it had to say, there is nothing to compare."""
        if whole:
            self._first_ended.set_result(time.monotonic() - self._started)
        elif self._task is not None:
            self._task.cancel()

    async def _run(self, engine: Any, lease_of: LeaseOf, request: tuple[Any, Any, str], *, forks: bool) -> None:
        prompt, sampling_params, request_id = request
        choice = self._lease.choice
        try:
            lease = await asyncio.wait_for(lease_of(choice.shadow), SLOT_PATIENCE_SECONDS)
            with lease.hold():
                second = address(prompt, sampling_params, lease.choice, lease.slot, forks=forks)
                outputs = engine.generate(*second, f"{request_id}-beside")
                async with aclosing(outputs):
                    async for output in outputs:
                        self._second.hear(output, deltas=self._deltas)
            seconds = await self._first_ended, time.monotonic() - self._started
        except Exception as error:  # noqa: BLE001  the client's answer is not touched by what happens here
            logger.warning("%s was not compared with %s: %r", choice.requested, choice.shadow, error)
            return
        versions = choice.version or "base", lease.choice.version or "base"
        experiment = choice.assignment.experiment if choice.assignment else ""
        request_id = choice.feedback_token or request_id
        self._note(shadow_record(request_id, versions, (self._first, self._second), seconds, experiment))
