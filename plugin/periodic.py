"""Doing something for as long as the server lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger("vllm.edits")


async def repeat(seconds: float, act: Callable[[], Awaitable[None]], failed: str) -> None:
    """Act every so often, for ever: whatever goes wrong once is told with its traceback, as `failed`."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await act()
        except Exception:  # the loop must outlive any fault of one turn
            logger.exception(failed)
