"""The one door to the engine: writes on each request which slot it may use, and salts its prefix cache.

It stands in for the engine client in every HTTP handler of vLLM, and passes everything else through. Whatever a caller
put in place of the claim is overwritten here, for every endpoint alike.
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
        settle: Callable[[Lease], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """lease_of: a lease by name, for requests that are answered twice; note: told where the two answers part;
        settle: told when work has ended that outlived its HTTP request.
        """
        self._engine = engine
        self._renew = renew
        self._forks = forks
        self._lease_of = lease_of
        self._note = note
        self._settle = settle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """vLLM's generate, for one version. The lease is held until the engine has let go of the request."""
        lease = CURRENT_LEASE.get()
        if lease is None:
            # What reaches the engine by a way that the middleware does not cover is for the base model.
            lease = await self._renew(None)
        elif lease.released:
            # Work that outlives its HTTP request (a background response) still runs on the version it began with.
            lease = await self._renew(lease.choice)
            lease.when_released(partial(self._settle, lease))
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
        """Pooling has no edited form: refused for a variant, untouched for the base."""
        lease = CURRENT_LEASE.get()
        if lease is not None and lease.choice.version is not None:
            raise ValueError(
                f"{lease.choice.requested!r} is an edited variant; pooling is served by the base model only"
            )
        return self._engine.encode(*args, **kwargs)


class _Watch:
    """Adds what one engine request reports to its lease's usage."""

    def __init__(self, usage: Usage, reader: OutputReader, *, keeps_tail: bool) -> None:
        self._usage = usage
        self._reader = reader
        self._keeps_tail = keeps_tail
        self._prompt_counted = False
        usage.engine_requests += 1

    def broke(self, error: Exception) -> None:
        """vLLM says by a ValueError what is wrong with a request; all else is the engine's own fault."""
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
            # The engine's own stamps are exact where it delivers the whole answer at once.
            usage.add_output(new_tokens, token_times(output) or (time.monotonic(),) * 2)
