"""The routes of the reservation, and a promotion that waits for capacity: asked of the owner of the slots, and of
another process that asks it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.bundles import publish
from tests.support.fakes import BASE, Server, refuse, version_of
from tests.support.site import TOKEN, Site, another_process
from vllm_edits.edit_store import LowRank, Offset
from vllm_edits.plugin.headers import ADMIN_TOKEN

pytestmark = pytest.mark.anyio
PATH = "/v1/edits/reservation"
WIDE = LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=2)
ENTRY = {"kind": "offset", "site": "layers.*.resid"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["its own process", "another process"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    """A server whose policy is `auto`. The admin token is `let-me-in`."""
    (tmp_path / "token").write_text("let-me-in\n")
    server = Server(f"memory://{tmp_path}", grow="auto")
    async with AsyncExitStack() as processes:
        coordinator = None
        if request.param == "another process":
            coordinator = await processes.enter_async_context(another_process(server, tmp_path / "owner.sock"))
        made = Site(server, tmp_path / "token", coordinator)
        yield made
        await made.client.aclose()
        await made.server.core.growth.wait()
        await made.server.core.slots.wait_drained()
        while not made.is_quiet():  # noqa: ASYNC110  what is given back over a socket arrives a little later
            await asyncio.sleep(0.001)


async def shown(site: Site) -> dict[str, Any]:
    answer = await site.client.get(PATH)
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


async def grow(site: Site, **body: Any) -> Any:
    return await site.client.post(PATH, json=body, headers=TOKEN)


async def test_the_reservation_is_what_the_status_says(site: Site) -> None:
    found = await shown(site)
    assert found == (await site.client.get("/v1/edits")).json()["reservation"]
    assert (found["grow"], found["scopes"], found["last"], found["growing"]) == ("auto", 1, None, False)
    assert found["holds"] == "gate at 1 site(s) up to rank 1; offset at 1 site(s) up to rank 1"
    assert found["bytes"] == site.server.metric("reserved_bytes") > 0
    assert (found["waiting"], found["failed"]) == ([], {})


async def test_a_growth_is_accepted_and_what_fits_is_answered_at_once(site: Site) -> None:
    version = publish(site.server.store, version_of("polite", edit=WIDE), tag=None)
    before = await shown(site)
    for body, wanted in (
        ({"versions": [f"polite@{version[:8]}"]}, f"polite@{version[:8]}"),
        ({"reserve": [ENTRY]}, "explicit entries"),
        ({"scopes": 4}, "4 scopes"),
    ):
        answer = await grow(site, **body)
        assert answer.status_code == 202
        assert (answer.json()["growing"], answer.json()["wanted"]) == (True, wanted)
        await site.server.core.growth.wait()
        last = (await shown(site))["last"]
        assert (last["wanted_by"], last["error"], last["phase"]) == ([wanted], "", "done")
        again = await grow(site, **body)
        assert (again.status_code, again.json()["growing"]) == (200, False)
    after = await shown(site)
    assert after["scopes"] == 4
    assert after["bytes"] > before["bytes"]
    assert "low_rank at 1 site(s) up to rank 2; offset at 3 site(s)" in after["holds"]
    answer = await site.client.put("/v1/edits/polite", json={"version": version}, headers=TOKEN)
    assert (answer.status_code, answer.json()["swap"]["awaits_capacity"]) == (200, False), "it fits"
    assert (await site.ask("polite")).headers["x-edits-version"] == version


async def test_a_promotion_that_waits_for_capacity_is_accepted(site: Site) -> None:
    """The old version answers until the new one is served."""
    (old,) = await site.server.promote(version_of("polite"))
    site.server.workers.gates["edits_grow_poll"] = compiled = asyncio.Event()
    new = publish(site.server.store, version_of("polite", edit=WIDE), tag=None)
    answer = await site.client.put("/v1/edits/polite", json={"version": new[:8]}, headers=TOKEN)
    assert answer.status_code == 202
    swap = answer.json()["swap"]
    assert (swap["awaits_capacity"], swap["from_version"], swap["to_version"]) == (True, old, new)
    assert answer.json()["entry"]["version"] == new
    status = (await site.client.get("/v1/edits")).json()
    assert status["reservation"]["growing"]
    assert ["is growing for it" in each["error"] for each in status["refused"]] == [True]
    compiled.set()
    await site.server.core.growth.wait()
    assert (await site.ask("polite")).headers["x-edits-version"] == new
    assert (await site.client.get("/v1/edits")).json()["refused"] == []
    answer = await site.client.post("/v1/edits/polite/rollback", json={}, headers=TOKEN)
    assert answer.status_code == 200, "nothing to wait for"


async def test_a_first_promotion_is_unavailable_until_the_reservation_has_grown(site: Site) -> None:
    site.server.workers.gates["edits_grow_poll"] = compiled = asyncio.Event()
    version = publish(site.server.store, version_of("polite", edit=WIDE), tag=None)
    answer = await site.client.put("/v1/edits/polite", json={"version": version}, headers=TOKEN)
    assert answer.status_code == 202
    asked = await site.ask("polite")
    assert asked.status_code == 503
    assert "the reservation is growing for it" in asked.json()["error"]["message"]
    compiled.set()
    await site.server.core.growth.wait()
    assert (await site.ask("polite")).headers["x-edits-version"] == version


async def test_a_growth_that_fails_refuses_the_promotion_with_its_reason(site: Site) -> None:
    """Until the promotion is repeated, or a sync is asked for."""
    (old,) = await site.server.promote(version_of("polite"))
    site.server.workers.overrides = {"edits_grow": refuse}
    new = publish(site.server.store, version_of("polite", edit=WIDE), tag=None)
    body = {"version": new}
    assert (await site.client.put("/v1/edits/polite", json=body, headers=TOKEN)).status_code == 202
    await site.server.core.growth.wait()
    status = (await site.client.get("/v1/edits")).json()
    assert "in phase planned: tensor x holds NaN" in status["refused"][0]["error"]
    assert "tensor x holds NaN" in status["reservation"]["last"]["error"]
    assert (await site.ask("polite")).headers["x-edits-version"] == old
    site.server.workers.overrides = {}
    (swap,) = (await site.client.post("/v1/edits/sync")).json()["swaps"]
    assert swap["awaits_capacity"]
    await site.server.core.growth.wait()
    assert (await site.ask("polite")).headers["x-edits-version"] == new


@pytest.mark.parametrize("sent", [{}, {ADMIN_TOKEN: "guess"}])
@pytest.mark.parametrize("content", [b"{", b"{}", b'{"reserve": [{"kind": "offset", "site": "layers.*.resid"}]}'])
async def test_nothing_grows_without_the_admin_token(site: Site, sent: dict[str, str], content: bytes) -> None:
    answer = await site.client.post(PATH, content=content, headers=sent)
    assert (answer.status_code, ADMIN_TOKEN in answer.json()["detail"]) == (401, True)
    assert (await shown(site))["last"] is None


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 422, "nothing to make capacity for"),
        ({"versions": [], "reserve": [], "scopes": 0}, 422, "nothing to make capacity for"),
        ({"version": "polite"}, 422, "Extra inputs are not permitted"),
        ({"reserve": [ENTRY], "wait": True}, 422, "Extra inputs are not permitted"),
        ({"versions": "polite"}, 422, "valid list"),
        ({"versions": [7]}, 422, "valid string"),
        ({"reserve": ["standart"]}, 422, "unknown profile 'standart'"),
        ({"scopes": -1}, 422, "greater than or equal to 0"),
        ({"scopes": 65}, 422, "less than or equal to 64"),
        ({"scopes": "many"}, 422, "valid integer"),
        ([], 422, "valid dictionary"),
        ({"reserve": [{"kind": "offset", "site": "layers.9.resid"}]}, 422, "fits no site"),
        ({"reserve": [{"kind": "offset", "sight": "layers.1.resid"}]}, 422, "unknown setting. Did you mean 'site'?"),
        ({"reserve": [{"kind": "ofset", "site": "layers.1.resid"}]}, 422, "edits.reserve.0.kind"),
        ({"reserve": [{**ENTRY, "rank": 0}]}, 422, "edits.reserve.0.rank"),
        ({"reserve": [ENTRY, {}]}, 422, "edits.reserve.1.kind: Field required"),
        ({"versions": ["polit"]}, 404, "Did you mean 'polite'"),
        ({"versions": ["polite@staging"]}, 404, "staging"),
        ({"versions": ["polite@ffffff"]}, 404, "no version ffffff"),
        ({"versions": [""]}, 404, "is not the name of a variant"),
        ({"versions": ["../polite"]}, 404, "is not the name of a variant"),
        ({"versions": ["polite@"]}, 404, "polite"),
        ({"versions": ["polite@a@b"]}, 404, "polite"),
        ({"versions": ["polite@foreign"]}, 422, "built for tiny"),
        ({"versions": ["polite"], "reserve": [{}]}, 422, "Field required"),
    ],
)
async def test_an_impossible_growth_is_refused_and_nothing_changes(
    site: Site, body: Any, status: int, said: str
) -> None:
    await site.server.promote(version_of("polite"))
    other = BASE.model_copy(update={"files": {"x": "b" * 64}})
    publish(site.server.store, version_of("polite", other), tag="foreign")
    before, calls = await shown(site), len(site.server.workers.calls)
    answer = await site.client.post(PATH, json=body, headers=TOKEN)
    assert answer.status_code == status, answer.text
    assert said in json.dumps(answer.json(), ensure_ascii=False)
    assert await shown(site) == before
    assert [call for call in site.server.workers.calls[calls:] if call[0] == "edits_grow"] == []


async def test_with_the_store_down_only_an_empty_server_grows(site: Site) -> None:
    """Versions in slots are read again for the larger reservation."""
    site.server.backend.down = ""
    assert (await grow(site, versions=["polite"])).status_code == 503
    assert (await grow(site, reserve=[ENTRY])).status_code == 202
    await site.server.core.growth.wait()
    assert (await shown(site))["last"]["error"] == ""
    site.server.backend.down = None
    (version,) = await site.server.promote(version_of("polite"))
    site.server.backend.down = ""
    assert (await grow(site, scopes=4)).status_code == 202
    await site.server.core.growth.wait()
    found = await shown(site)
    assert (found["scopes"], "the network is down" in found["failed"]["4 scopes"]) == (1, True)
    assert (await site.ask("polite")).headers["x-edits-version"] == version
    site.server.backend.down = None
    assert (await grow(site, scopes=4)).status_code == 202
    await site.server.core.growth.wait()
    assert ((await shown(site))["scopes"], (await shown(site))["failed"]) == (4, {})


@pytest.mark.parametrize(("policy", "status"), [("never", 422), ("ask", 202)])
async def test_the_policy_decides_whether_an_operator_may(tmp_path: Path, policy: Any, status: int) -> None:
    """And a promotion that does not fit is refused with what to do, not accepted."""
    (tmp_path / "token").write_text("let-me-in")
    site = Site(Server(f"memory://{tmp_path}", grow=policy), tmp_path / "token")
    version = publish(site.server.store, version_of("polite", edit=WIDE), tag=None)
    answer = await site.client.put("/v1/edits/polite", json={"version": version}, headers=TOKEN)
    assert answer.status_code == 422
    assert f"edits.grow is {policy}" in answer.json()["detail"]
    assert f"vllm-edits reserve grow polite@{version[:12]} --url URL" in answer.json()["detail"]
    answer = await grow(site, versions=[f"polite@{version}"])
    assert answer.status_code == status
    await site.server.core.growth.wait()
    if policy == "ask":
        assert (await site.ask("polite")).headers["x-edits-version"] == version
    else:
        assert "Set it to ask or auto, and restart" in answer.json()["detail"]


async def test_a_client_that_names_a_version_without_capacity_is_refused(site: Site) -> None:
    """No request makes the server grow."""
    await site.server.promote(version_of("polite"))
    version = publish(site.server.store, version_of("polite", edit=Offset(site="layers.0.resid")), tag=None)
    answer = await site.ask(f"polite@{version}")
    assert answer.status_code == 503
    assert "nothing is reserved there. Add" in answer.json()["error"]["message"]
    assert (await shown(site))["last"] is None
