"""The engine gate: writes the claim on a slot and the cache salt into each request. Runs in the API process.

It replaces the engine client in every HTTP handler of vLLM, and passes all other calls through. A claim from a caller
is overwritten here, on every endpoint.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from vllm_edits.plugin.experiments.records import ShadowRecord
from vllm_edits.plugin.experiments.repeats import LOOKED_AT
from vllm_edits.plugin.serving.lease import CURRENT_LEASE, Lease, Usage
from vllm_edits.plugin.serving.variants import Choice
from vllm_edits.plugin.vllm_host.addressing import address
from vllm_edits.plugin.vllm_host.outputs import OutputReader, is_corrupted, token_times
from vllm_edits.plugin.vllm_host.shadow import LeaseOf, ShadowRun, comparable


class EngineGate:
    """An engine client whose `generate` serves the version of the current lease."""

    def __init__(
        self, engine: Any, renew: Callable[[Choice | None], Awaitable[Lease]], *, forks: bool = False,
        lease_of: LeaseOf | None = None, note: Callable[[ShadowRecord], None] = lambda _: None,
        record_late: Callable[[Lease], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """renew: leases an earlier choice again, or with None the base model.
        forks: the scheduler forks the prefix cache.
        lease_of: leases a name, for shadows. note: called with the record of a shadow.
        record_late: called when engine work that outlived its HTTP request has ended.
        """
        self._engine = engine
        self._renew = renew
        self._forks = forks
        self._lease_of = lease_of
        self._note = note
        self._record_late = record_late

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """vLLM's generate for the leased version. The lease is held until the request has left the engine."""
        lease = CURRENT_LEASE.get()
        if lease is None:
            # A request that did not pass the middleware is for the base model.
            lease = await self._renew(None)
        elif lease.released:
            # Work that outlives its HTTP request (a background response) continues on its first version.
            lease = await self._renew(lease.choice)
            lease.when_released(partial(self._record_late, lease))
        with lease.hold():
            watch = _Watch(lease.usage, OutputReader(sampling_params), keeps_tail=lease.choice.assignment is not None)
            shadow = None
            if self._lease_of is not None and lease.choice.shadow:
                sampling_params = comparable(sampling_params)
                shadow = ShadowRun(lease, sampling_params, note=self._note)
                shadow.start(self._engine, self._lease_of, prompt, request_id, forks=self._forks)
            prompt, sampling_params = address(prompt, sampling_params, lease.choice, lease.slot, forks=self._forks)
            outputs = self._engine.generate(prompt, sampling_params, request_id, *args, **kwargs)
            whole = False
            try:
                # Closing the inner generator awaits the abort, so the slot is not released before the engine knows.
                async with aclosing(outputs):
                    async for output in outputs:
                        watch.see(output)
                        if shadow is not None:
                            shadow.hear(output)
                        yield output
                whole = True
            except Exception as error:
                watch.broke(error)
                raise
            finally:
                if shadow is not None:
                    shadow.end(whole=whole)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse pooling for a variant, because it has no edited form. The base model is not affected."""
        lease = CURRENT_LEASE.get()
        if lease is not None and lease.choice.version is not None:
            raise ValueError(
                f"{lease.choice.requested!r} is an edited variant; pooling is served by the base model only"
            )
        return self._engine.encode(*args, **kwargs)


class _Watch:
    """Adds the outputs of one engine request to its lease's usage."""

    def __init__(self, usage: Usage, reader: OutputReader, *, keeps_tail: bool) -> None:
        self._usage = usage
        self._reader = reader
        self._keeps_tail = keeps_tail
        self._prompt_counted = False
        usage.engine_requests += 1

    def broke(self, error: Exception) -> None:
        """Record an error. A ValueError before the first output means a bad request, any other an engine error."""
        if isinstance(error, ValueError) and not self._prompt_counted:
            self._usage.refused = True
        else:
            self._usage.failed = True

    def see(self, output: Any) -> None:
        usage, new_tokens = self._usage, 0
        if not self._prompt_counted:
            usage.prompt_tokens += len(output.prompt_token_ids or ())
            self._prompt_counted = True
        for delta in self._reader.read(output):
            new_tokens += len(delta.tokens)
            usage.aborted = usage.aborted or delta.finish == "abort"
            usage.failed = usage.failed or delta.finish == "error"
            usage.wrote = usage.wrote or delta.wrote
            if self._keeps_tail and delta.index == 0:
                usage.tail = [*usage.tail, *delta.tokens][-LOOKED_AT:]
        usage.corrupted = usage.corrupted or is_corrupted(output)
        if new_tokens:
            # The engine's own time stamps are exact even if the whole answer arrives at once.
            usage.add_output(new_tokens, token_times(output) or (time.monotonic(),) * 2)
