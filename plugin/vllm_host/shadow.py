"""Runs a request a second time, in the shadow of the run whose answer the client gets, and notes where the two part.

Whatever happens to the shadow is no matter of the client's: a slot that is not to be had, an error, and nothing is
noted. When the client goes away the shadow is ended too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from vllm_edits.plugin.experiments.records import ShadowRecord
from vllm_edits.plugin.experiments.shadow_pairs import Transcript, shadow_record
from vllm_edits.plugin.serving.lease import Lease
from vllm_edits.plugin.vllm_host.addressing import address
from vllm_edits.plugin.vllm_host.outputs import OutputReader

logger = logging.getLogger("vllm.edits")

SLOT_PATIENCE_SECONDS = 5.0
"""how long a shadow waits for a slot: two requests that each hold one and wait for another would wait for ever"""

LeaseOf = Callable[[str], Awaitable[Lease]]
_running: set[asyncio.Task[None]] = set()  # what nobody refers to may be collected while it runs


def comparable(sampling_params: Any) -> Any:
    """A copy of a request's sampling parameters under which two answers can be compared, for both of them.

    The log-probability of every token is asked for, and one seed for both; the client is answered as it asked.
    """
    made = sampling_params.clone()
    made.logprobs = made.logprobs or 0
    if made.seed is None and made.temperature > 0:
        made.seed = secrets.randbits(31)
    return made


class ShadowRun:
    """The shadow of one request. `hear` is told what the client's run says, `end` that it has said everything."""

    def __init__(self, lease: Lease, sampling_params: Any, *, note: Callable[[ShadowRecord], None]) -> None:
        """sampling_params: those of both runs, as `comparable` makes them."""
        self._lease = lease
        self._sampling_params = sampling_params
        self._note = note
        self._transcripts = Transcript(), Transcript()
        self._reader = OutputReader(sampling_params, keeps_logprobs=True)
        self._started = time.monotonic()
        self._first_ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    def start(self, engine: Any, lease_of: LeaseOf, prompt: Any, request_id: str, *, forks: bool) -> None:
        """Begin. request_id: the client's run's."""
        self._task = asyncio.get_running_loop().create_task(
            self._run(engine, lease_of, prompt, request_id, forks=forks)
        )
        _running.add(self._task)
        self._task.add_done_callback(_running.discard)

    def hear(self, output: Any) -> None:
        """Keep what the client's run says."""
        _write_down(self._transcripts[0], self._reader, output)

    def end(self, *, whole: bool) -> None:
        """The client's run has ended; unless it said all it had to say, there is nothing to compare."""
        if whole:
            self._first_ended.set_result(time.monotonic() - self._started)
        elif self._task is not None:
            self._task.cancel()

    async def _run(self, engine: Any, lease_of: LeaseOf, prompt: Any, request_id: str, *, forks: bool) -> None:
        choice, reader = self._lease.choice, OutputReader(self._sampling_params, keeps_logprobs=True)
        try:
            lease = await asyncio.wait_for(lease_of(choice.shadow), SLOT_PATIENCE_SECONDS)
            with lease.hold():
                shadow = address(prompt, self._sampling_params, lease.choice, lease.slot, forks=forks)
                outputs = engine.generate(*shadow, f"{request_id}-shadow")
                async with aclosing(outputs):
                    async for output in outputs:
                        _write_down(self._transcripts[1], reader, output)
            seconds = await self._first_ended, time.monotonic() - self._started
        except Exception as error:  # noqa: BLE001  the client's answer is not touched by what happens here
            logger.warning(
                "could not compare %s with %s; the client's answer is not affected: %r",
                choice.requested,
                choice.shadow,
                error,
            )
            return
        versions = choice.version or "base", lease.choice.version or "base"
        experiment = choice.assignment.experiment if choice.assignment else ""
        self._note(shadow_record(choice.feedback_token or request_id, versions, self._transcripts, seconds, experiment))


def _write_down(transcript: Transcript, reader: OutputReader, output: Any) -> None:
    """Of several answers the first counts."""
    for delta in reader.read(output):
        if delta.index == 0:
            transcript.add(delta.tokens, delta.logprobs, delta.finish)
