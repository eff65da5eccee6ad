"""Repeats an action for the lifetime of the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger("vllm.edits")


async def repeat(seconds: float, act: Callable[[], Awaitable[None]], failed: str) -> None:
    """Call `act` every `seconds` without end. An error is logged with the message `failed`, and the loop continues."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await act()
        except Exception:  # the loop must continue after an error
            logger.exception(failed)
