"""A variant in the engine's weights: when they may change, who waits meanwhile, and what is undone when it fails.

The weights are everybody's. So a change closes the door: whoever comes waits outside, whoever is inside ends first, is
aborted, or goes on, as the operator chose. Then every worker exchanges its weights between two steps, the name is
switched, and the door opens. What came before the exchange can fail without a client seeing it. A worker that fails at
the exchange has undone its own; the others are told to put back what was. Where even that fails, the door stays shut:
nothing is answered by weights that nobody vouches for.
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
"""Calls a method on every worker; EditsError when one refuses or fails."""
Running = Literal["finish", "abort", "keep"]


class WeightsMode:
    """The door, and what is behind it. `key` is name and tag of the variant, None where no variant has the weights."""

    def __init__(
        self, key: tuple[str, str] | None, call: Call, *, running: Running, patience_seconds: float,
        inside: Callable[[], int], abort_all: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        """inside: how many requests are being answered; abort_all: end them."""
        self.key = key
        self.version: str | None = None
        self.epoch = 0
        self.doubt = ""
        """why nobody knows what the weights hold; '' as long as that is known"""
        self._call = call
        self._running = running
        self._patience = patience_seconds
        self._inside = inside
        self._abort_all = abort_all
        self._waited_for = 0
        self._open = asyncio.Event()
        self._open.set()
        self._left = asyncio.Event()

    async def admitted(self) -> None:
        """Wait while the weights are being changed. EditsError when nobody knows what they hold."""
        while not self._open.is_set():
            await self._open.wait()
        if self.doubt:
            raise EditsError(
                f"no request is answered, because the content of the engine's weights is unknown: {self.doubt}"
            )

    @property
    def open(self) -> bool:
        """Whether requests may go in now."""
        return self._open.is_set() and not self.doubt

    def left(self) -> None:
        """A request has ended."""
        self._left.set()

    async def exchange(
        self,
        version: str | None,
        entry: int,
        switch: Callable[[], None],
        phase: Callable[[Phase], AbstractContextManager[None]],
    ) -> None:
        """Put a staged version into the weights of every worker, or with None the loaded model; then `switch`.

        EditsError when it cannot be done; then everything is as before. `entry`: number of the tag's entry that asks
        for it; `phase` times what goes on inside it.
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
        """Nobody is inside any more, or may stay. For one entry the door is held shut once: then it must be so."""
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
        except BaseException as failure:
            self.epoch += 1
            try:
                await asyncio.shield(self._all_hold(self.version))
            except BaseException as worse:  # whoever is cancelled meanwhile does not know either
                self.doubt = f"{failure}; restoring the previous weights failed too: {worse}"
                logger.exception(
                    "could not restore the engine's weights; no request is answered until a change of the weights "
                    "succeeds"
                )
            raise
        self.doubt = ""

    async def _all_hold(self, version: str | None) -> None:
        answers = await self._call("edits_put_weights", version, self.epoch, self._running == "keep")
        if any("absent" in answer for answer in answers):
            raise EditsError(
                "a worker does not have the version ready any more; it is prepared again at the next read of the store"
            )
        require_agreement(answers, "the content of their weights")
