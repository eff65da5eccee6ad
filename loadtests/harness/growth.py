"""A growth of a server's reservation, as a client sees it from outside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import httpx

GROW_SECONDS = 1800.0
POLL_SECONDS = 0.1


class SeenGrowth(NamedTuple):
    """The end of the wait for a version."""

    error: str
    """the reason why the version is not served; empty if it is"""
    last: Mapping[str, Any]
    """the server's account of the growth for the version; empty if there was none"""


async def until_served(
    client: httpx.AsyncClient, version: str, begun: Callable[[str], None], *, seconds: float = GROW_SECONDS
) -> SeenGrowth:
    """Wait until a promoted version is served, while the reservation grows for it, or until it is refused.

    begun: called with the name of each phase when it has begun, in order
    """
    last: Mapping[str, Any] = {}
    told, end = {"done"}, time.monotonic() + seconds
    while time.monotonic() < end:
        status = (await client.get("/v1/edits")).raise_for_status().json()
        last = growth_for(version, status)
        for phase in phases_begun(last):
            if phase not in told:
                told.add(phase)
                begun(phase)
        if any(row["version"] == version for row in status["variants"]):
            return SeenGrowth("", last)
        if error := refusal(status, version):
            return SeenGrowth(error, last)
        await asyncio.sleep(POLL_SECONDS)
    return SeenGrowth(f"not served within {seconds:g} s", last)


def growth_for(version: str, status: Mapping[str, Any]) -> Mapping[str, Any]:
    """The last growth of a server, if it was for this version."""
    last: Mapping[str, Any] = status["reservation"]["last"] or {}
    return last if any(version[:12] in wanted for wanted in last.get("wanted_by", ())) else {}


def phases_begun(last: Mapping[str, Any]) -> list[str]:
    """The phases of a growth so far, also those that passed between two looks."""
    return list(dict.fromkeys([*last["seconds"], last["phase"]])) if last else []


def refusal(status: Mapping[str, Any], version: str) -> str:
    """The reason why a server does not serve a version, and does not grow for it either; or ''."""
    swap = status["last_swap"]
    if swap is None or swap["to_version"] != version or swap["awaits_capacity"]:
        return ""
    return str(swap["error"] or "")
