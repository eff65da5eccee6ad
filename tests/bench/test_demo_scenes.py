"""The demo's scenes under load, played on a server around fakes."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from loadtests.demo import __main__ as demo
from loadtests.demo.bundles import Answers, Exhibit, MeasuredClaim
from tests.support.bundles import publish
from tests.support.fakes import BASE, Server, refuse, version_of
from tests.support.listening import Poll, compiles_under_load, counted, listening
from vllm_edits.edit_store import Bundle, Gate

pytestmark = [pytest.mark.anyio, pytest.mark.long]

GATE = Gate(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=1, activation="jump_relu", threshold=0.3)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the demo prints."""
    text = io.StringIO()
    monkeypatch.setattr(demo, "console", Console(width=160, file=text))
    monkeypatch.setattr(demo, "BASE", "tiny")
    monkeypatch.setattr("vllm_edits.plugin.serving.growth.MOST_POLL_SECONDS", 0.1)
    return text


def exhibit(name: str) -> Exhibit:
    """A variant that says its name, as the site's completions do, where the base says another."""

    def share(answers: Answers, _: Answers) -> float:
        return sum(name in each.text for each in answers) / len(answers)

    claim = MeasuredClaim("says its name", ("a", "b"), share, base=(0, 0), edited=(1, 1))
    return Exhibit(name, "1", "", method="rocr", data=(), options={}, prompt="a", question="", claims=(claim,))


@asynccontextmanager
async def followed(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that follows its store."""
    await server.sync()
    following = asyncio.create_task(server.core.reconciler.follow(0.1))
    try:
        async with listening(server) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
            yield client
    finally:
        following.cancel()
    await server.core.slots.wait_drained()


async def played(path: Path, answers: Callable[[Server], Poll]) -> tuple[Server, Bundle, int]:
    """The growth on a server that serves `polite`, and whose workers answer polls of the growth in this way."""
    server, polite, gated = (
        Server(f"memory://{path}", grow="auto"),
        version_of("polite"),
        version_of("gated", BASE, GATE),
    )
    server.workers.overrides["edits_grow_poll"] = answers(server)
    publish(server.store, polite)
    server.store.publish(gated)
    async with followed(server) as client:
        first = {"polite": (exhibit("polite"), polite)}
        sent = await demo.grow_under_load(client, server.store, first, (exhibit("gated"), gated), demo.Claims())
    return server, gated, sent


async def test_the_scene_tells_its_phases_and_every_claim_holds(tmp_path: Path, told: io.StringIO) -> None:
    """It returns as many requests as the server has counted."""
    server, gated, sent = await played(tmp_path, compiling_as(told))
    text = told.getvalue()
    places = [text.index(f"{phase} …") for phase in ("planned", "compiling", "waiting", "switching")]
    assert places == sorted(places)
    for words in (
        "the reservation grew for it, without a restart", "no request failed", "kept answering meanwhile",
        "no worker stood longer than", "2 ms", gated.version[:12], "gated, served: says its name (0.00 → 1.00)",
    ):  # fmt: skip
        assert words in text, words
    assert counted(server).total() == sent
    server.check()


def compiling_as(told: io.StringIO, pause: float = 0.0) -> Callable[[Server], Poll]:
    """Workers that compile until the demo has said so, and the base model and `polite` were answered since."""

    def answers(server: Server) -> Poll:
        poll = compiles_under_load(server, 2, lambda: "compiling …" in told.getvalue())
        return lambda number, act: (answer := poll(number, act)) | {"pause": max(pause, answer["pause"])}

    return answers


@pytest.mark.parametrize(
    ("failing", "claim"),
    [(True, "the reservation grew for it, without a restart"), (False, "no worker stood longer than")],
)
async def test_a_growth_that_fails_or_pauses_for_long_ends_the_demo(
    tmp_path: Path, told: io.StringIO, failing: bool, claim: str
) -> None:
    with pytest.raises(demo.StatementFails, match=claim):
        await played(tmp_path, (lambda _: refuse) if failing else compiling_as(told, pause=31.0))
    assert "planned …" in told.getvalue()


async def test_a_promotion_and_a_rollback_are_followed_under_load(tmp_path: Path, told: io.StringIO) -> None:
    server, old, new = Server(f"memory://{tmp_path}"), version_of("polite"), version_of("polite")
    publish(server.store, old)
    server.store.publish(new)
    shown = exhibit("polite")
    async with followed(server) as client:
        scene = partial(demo.swap_under_load, client, server.store)
        sent = await scene((shown, old), (shown, new), demo.Claims())
        sent += await scene((shown, new), (shown, old), demo.Claims(), rollback=True)
    assert told.getvalue().count("every answer came from exactly one of the two versions") == 2
    assert counted(server).total() == sent
    server.check()
