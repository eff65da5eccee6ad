"""Changes the engine's weights for a variant in the weights. Runs in the API process that owns the slots.

All requests use the same weights. So during a change, new requests wait; running requests finish first, are aborted, or
continue, as the operator chose. Then every worker exchanges its weights between two steps, the name is switched, and
requests are admitted again. A failure before the exchange is not visible to clients. A worker that fails at the
exchange has restored its own weights, and the other workers are told to restore theirs. If that fails too, no request
is admitted, because the content of the weights is unknown.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.serving.swap import Phase
from vllm_edits.plugin.serving.workers import require_agreement

logger = logging.getLogger("vllm.edits")

Call = Callable[..., Awaitable[list[dict[str, Any]]]]
"""Calls a method on every worker. EditsError if a worker refuses or fails."""
Running = Literal["finish", "abort", "keep"]


class WeightsMode:
    """Admits requests, and changes the weights. key: name and tag of the variant in the weights, or None."""

    def __init__(
        self, key: tuple[str, str] | None, call: Call, *, running: Running, patience_seconds: float,
        inside: Callable[[], int], abort_all: Callable[[], Awaitable[None]],
        probe: Callable[[str], Awaitable[None]],
    ) -> None:  # fmt: skip
        """inside: the number of requests in flight; abort_all: aborts them.
        probe: probes the version that the weights hold now; an error restores what they held before.
        """
        self.key = key
        self.version: str | None = None
        self.epoch = 0
        self.error = ""
        """the reason why the content of the weights is unknown, or '' if it is known"""
        self._call = call
        self._running = running
        self._patience = patience_seconds
        self._inside = inside
        self._abort_all = abort_all
        self._probe = probe
        self._waited_for = 0
        self._open = asyncio.Event()
        self._open.set()
        self._left = asyncio.Event()

    async def admitted(self) -> None:
        """Wait while the weights are being changed. EditsError if their content is unknown."""
        while not self._open.is_set():
            await self._open.wait()
        if self.error:
            raise EditsError(
                f"no request is answered, because the content of the engine's weights is unknown: {self.error}"
            )

    @property
    def open(self) -> bool:
        """True if requests are admitted now."""
        return self._open.is_set() and not self.error

    def left(self) -> None:
        """Report that a request has ended."""
        self._left.set()

    async def exchange(
        self,
        version: str | None,
        entry: int,
        switch: Callable[[], None],
        phase: Callable[[Phase], AbstractContextManager[None]],
    ) -> None:
        """Install a staged version in the weights of every worker, or with None the loaded model; then call `switch`.

        EditsError if it fails; then nothing has changed. entry: number of the tag's entry. phase: times a phase.
        """
        with self._closed():
            with phase("wait"):
                await self._settled(entry)
            with phase("install"):
                await self._put(version)
            self.version = version
            switch()

    @contextmanager
    def _closed(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    async def _settled(self, entry: int) -> None:
        """Wait until no request runs, or until they may continue. For each entry, only the first attempt waits."""
        if self._running == "keep":
            return
        if self._running == "abort" and self._inside():
            try:
                await self._abort_all()
            except Exception as error:
                raise EditsError(
                    f"running requests could not be aborted, so the weights were not changed: {error!r}"
                ) from error
        patience = 0.0 if entry == self._waited_for else self._patience
        deadline, self._waited_for = time.monotonic() + patience, entry
        while running := self._inside():
            self._left.clear()
            try:
                await asyncio.wait_for(self._left.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                waited = f"after {patience:g} s" if patience else "at this read of the store"
                raise EditsError(
                    f"{running} request(s) were still running {waited}, so the weights were not changed. The server "
                    "changes them at the next read of the store when no request runs. To wait again, promote again; or "
                    "set edits.weights_running to abort or keep, or raise edits.weights_patience_seconds"
                ) from None

    async def _put(self, version: str | None) -> None:
        self.epoch += 1
        try:
            await self._all_hold(version)
            if version is not None:
                await self._probe(version)
        except BaseException as failure:
            self.epoch += 1
            try:
                await asyncio.shield(self._all_hold(self.version))
            except BaseException as worse:  # also after a cancellation the content is unknown
                self.error = f"{failure}; restoring the previous weights failed too: {worse}"
                logger.exception(
                    "could not restore the engine's weights; no request is answered until a change of the weights "
                    "succeeds"
                )
            raise
        self.error = ""

    async def _all_hold(self, version: str | None) -> None:
        answers = await self._call("edits_put_weights", version, self.epoch, self._running == "keep")
        if any("absent" in answer for answer in answers):
            raise EditsError(
                "a worker does not have the version ready any more; it is prepared again at the next read of the store"
            )
        require_agreement(answers, "the content of their weights")
