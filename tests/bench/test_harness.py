"""What the load tests are made of, held against what they read."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from loadtests.harness.growth import phases_begun, until_served
from loadtests.harness.load import Question, constant_load
from loadtests.harness.metrics import Scrape
from loadtests.harness.model import made_whole
from tests.support.bundles import publish
from tests.support.fakes import Server, refuse, version_of
from tests.support.listening import listening
from vllm_edits.edit_store import LowRank


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_metrics_are_added_up_by_name_and_labels() -> None:
    """A name is not a beginning of another, and a label's value may hold anything."""
    registry = CollectorRegistry()
    requests = Counter("requests", "how many", ["variant", "outcome"], registry=registry)
    Counter("requests_refused", "others", registry=registry).inc(100)
    Histogram("seconds", "how long", registry=registry).observe(2.5)
    for variant, outcome, count in (("a", "ok", 2), ("a", "error", 1), ('b", outcome="ok', "ok", 4)):
        requests.labels(variant, outcome).inc(count)
    metrics = Scrape(generate_latest(registry).decode())
    assert metrics.sum("requests_total") == 7
    assert metrics.sum("requests_total", outcome="ok") == 6
    assert metrics.sum("requests_total", outcome="ok", variant="a") == 2
    assert metrics.sum("seconds_sum") == 2.5
    assert metrics.sum("requests") == metrics.sum("requests_total", variant="none") == 0
    assert metrics.by("requests_total", "variant") == {("a",): 3, ('b", outcome="ok',): 4}


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """Of two that make it at once the quicker one's stays; what was not ended leaves nothing."""
    folder = tmp_path / "models" / "tiny"
    with suppress(KeyboardInterrupt), made_whole(folder) as made:
        made.mkdir()
        raise KeyboardInterrupt
    assert not list(folder.parent.iterdir())
    with made_whole(folder) as slower:
        slower.mkdir()
        with made_whole(folder) as quicker:
            quicker.mkdir()
            (quicker / "weights").touch()
    assert [file.name for file in folder.iterdir()] == ["weights"]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.anyio
async def test_load_goes_on_without_a_pause_until_the_block_ends(tmp_path: Path) -> None:
    """Every answer is whole then. A question that fails is asked once, and its failure is told."""
    questions = [Question("tiny", "a", 5), Question("small", "b", 7), Question("nobody", "c", 5)]
    async with (
        listening(Server(f"memory://{tmp_path}")) as url,
        httpx.AsyncClient(base_url=url) as client,
        constant_load(client, questions, ignore_eos=True) as answers,
    ):
        while len(answers) < 12:  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.01)
    tokens = {"tiny": 5, "small": 7}
    failed = [answer for answer in answers if not answer.complete]
    assert [(answer.model, answer.status) for answer in failed] == [("nobody", 404)]
    for answer in answers:
        if answer.complete:
            assert len(answer.token_times) == tokens[answer.model]
    assert {answer.model for answer in answers} == {"tiny", "small", "nobody"}


def test_the_phases_of_a_growth_are_told_in_order() -> None:
    """Also one that began after the last look; nothing of a server that has not grown."""
    assert phases_begun({}) == []
    assert phases_begun({"phase": "planned", "seconds": {}}) == ["planned"]
    seconds = {"planned": 0.1, "compiling": 3.0, "waiting": 0.1}
    assert phases_begun({"phase": "waiting", "seconds": seconds}) == ["planned", "compiling", "waiting"]
    assert phases_begun({"phase": "done", "seconds": seconds})[-2:] == ["waiting", "done"]


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["edits_grow", "edits_grow_switch"])
async def test_a_version_is_waited_for_until_it_is_served_or_refused(tmp_path: Path, method: str) -> None:
    """A growth that fails ends the wait with the server's reason; so does a wait that is too long."""
    server, told = Server(f"memory://{tmp_path}", grow="auto"), list[str]()
    edit = LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=2)
    async with listening(server) as url, httpx.AsyncClient(base_url=url) as client:
        assert await until_served(client, "0" * 64, told.append, seconds=0.2) == ("not served within 0.2 s", {})
        server.workers.overrides[method] = refuse
        version = publish(server.store, version_of("polite", edit=edit))
        await client.post("/v1/edits/sync")
        refused = await until_served(client, version, told.append)
        server.workers.overrides.clear()
        await client.post("/v1/edits/sync")
        error, last = await until_served(client, version, told.append)
        assert (await client.get("/v1/edits")).json()["variants"][0]["version"] == version
    assert "in phase" in refused.error
    assert refused.last["error"]
    assert (error, last["phase"]) == ("", "done")
    assert told[-4:] == ["planned", "compiling", "waiting", "switching"]
