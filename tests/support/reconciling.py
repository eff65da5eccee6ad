"""A reconciler on fakes, and requests in flight."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.fakes import Server
from vllm_edits.plugin.serving.lease import Lease


class InFlight:
    """A request that stays until it is ended."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self._held = lease.hold()
        self._held.__enter__()

    def end(self) -> None:
        self._held.__exit__(None, None, None)


async def start(server: Server, model: str) -> InFlight:
    return InFlight(await server.lease(model))


async def soon(task: asyncio.Task[Any]) -> bool:
    """Whether a task ends within a moment."""
    await asyncio.wait([task], timeout=0.05)
    return task.done()
