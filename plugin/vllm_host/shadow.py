"""Runs a request a second time as a shadow, and records the first difference to the client's answer.

It runs in the API process. The shadow never affects the client: without a slot, or after an error, no record is made.
When the client leaves, the shadow is aborted too.
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
"""seconds that a shadow waits for a slot. Without a limit, two requests could wait for each other's slot forever"""

LeaseOf = Callable[[str], Awaitable[Lease]]
_running: set[asyncio.Task[None]] = set()  # a task without a reference may be garbage-collected while it runs


def comparable(sampling_params: Any) -> Any:
    """A copy of a request's sampling parameters for both runs, so that their answers can be compared.

    It adds log-probabilities, and one seed for both. The client's answer keeps its requested form.
    """
    made = sampling_params.clone()
    made.logprobs = made.logprobs or 0
    if made.seed is None and made.temperature > 0:
        made.seed = secrets.randbits(31)
    return made


class ShadowRun:
    """The shadow of one request. `hear` gets the outputs of the client's run, `end` marks its end."""

    def __init__(self, lease: Lease, sampling_params: Any, *, note: Callable[[ShadowRecord], None]) -> None:
        """sampling_params: from `comparable`, for both runs."""
        self._lease = lease
        self._sampling_params = sampling_params
        self._note = note
        self._transcripts = Transcript(), Transcript()
        self._reader = OutputReader(sampling_params, keeps_logprobs=True)
        self._started = time.monotonic()
        self._first_ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    def start(self, engine: Any, lease_of: LeaseOf, prompt: Any, request_id: str, *, forks: bool) -> None:
        """Start the shadow. request_id: the id of the client's run."""
        self._task = asyncio.get_running_loop().create_task(
            self._run(engine, lease_of, prompt, request_id, forks=forks)
        )
        _running.add(self._task)
        self._task.add_done_callback(_running.discard)

    def hear(self, output: Any) -> None:
        """Keep an output of the client's run."""
        _write_down(self._transcripts[0], self._reader, output)

    def end(self, *, whole: bool) -> None:
        """Report the end of the client's run. If it is not complete, the shadow is aborted without a record."""
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
    """Add an output to a transcript. Of several answers, the first one counts."""
    for delta in reader.read(output):
        if delta.index == 0:
            transcript.add(delta.tokens, delta.logprobs, delta.finish)
