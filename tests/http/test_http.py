"""HTTP from end to end but for vLLM: the middleware, the gate and the routes around handlers written like vLLM's."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.bundles import publish
from tests.support.fakes import BASE, Overtaken, Server, version_of
from tests.support.site import PROMPT_TOKENS, TOKEN, Call, OutputKind, Sampling, Site, another_process, until
from vllm_edits.edit_store import LowRank, Offset
from vllm_edits.edit_store.reading.cache import NodeCache
from vllm_edits.edit_store.reading.reader import Reader
from vllm_edits.edit_store.scope import Scope as EditScope
from vllm_edits.plugin.claim import CLAIM
from vllm_edits.plugin.headers import ADMIN_TOKEN
from vllm_edits.plugin.http.api_key import ApiKeys
from vllm_edits.plugin.http.middleware import VariantMiddleware
from vllm_edits.plugin.serving.lease import CURRENT_LEASE
from vllm_edits.plugin.serving.variants import Choice
from vllm_edits.plugin.vllm_host.addressing import cache_salt
from vllm_edits.plugin.vllm_host.engine_gate import EngineGate

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# -- vLLM, as far as the plugin sees it --------------------------------------------------------------------------------


@pytest.fixture(params=["its own process", "another process"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    """Serves the base as `tiny`; the admin token is `let-me-in`. The slots' owner is in this process or in another."""
    token_file = tmp_path / "token"
    token_file.write_text("let-me-in\n")
    server = Server(f"memory://{tmp_path}")
    async with AsyncExitStack() as processes:
        coordinator = None
        if request.param == "another process":
            coordinator = await processes.enter_async_context(another_process(server, tmp_path / "owner.sock"))
        made = Site(server, token_file, coordinator)
        yield made
        await made.client.aclose()
        await made.server.core.slots.wait_drained()
        while not made.is_quiet():  # noqa: ASYNC110  what is given back over a socket arrives a little later
            await asyncio.sleep(0.001)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_every_endpoint_serves_the_variant_that_is_named(site: Site, path: str) -> None:
    """Base, variant, tag and version by its first digits: the engine gets that version's claim, and headers say so."""
    prod, beta = version_of("polite"), version_of("polite")
    await site.server.promote(prod)
    await site.server.promote(beta, tag="beta")
    for model, variant, version in (
        (None, "base", None),
        ("tiny", "base", None),
        ("polite", "polite", prod.version),
        ("polite@beta", "polite", beta.version),
        (f"polite@{prod.version[:8]}", "polite", prod.version),
    ):
        answer = await site.ask(model, path)
        assert answer.status_code == 200
        assert site.engine.claims[-1] == version
        assert answer.headers["x-edits-variant"] == variant
        assert answer.headers["x-edits-version"] == (version or "base")
        assert answer.json() == {"model": model or "tiny", "tokens": [0, 1, 2]}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/anything/else"])
async def test_an_unknown_name_is_not_found_in_vllms_own_form(site: Site, path: str) -> None:
    """With the nearest names; vLLM is not even asked."""
    await site.server.promote(version_of("polite"))
    answer = await site.ask("polit", path)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)
    assert error["message"].startswith("The model `polit` does not exist. Served: tiny, small, polite.")
    assert "Did you mean 'polite'" in error["message"]
    assert site.engine.requests == []
    assert site.count("unknown", None, "rejected") == 1


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_an_unknown_name_is_not_found_in_anthropics_form(site: Site, path: str) -> None:
    answer = await site.ask("polit", path)
    assert answer.status_code == 404
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "NotFoundError"
    assert "polit" in answer.json()["error"]["message"]


async def test_a_variant_that_cannot_be_served_is_unavailable_with_the_reason(site: Site) -> None:
    """It exists, so it is not a 404; and it is not answered by the base."""
    await site.server.promote(version_of("polite", BASE.model_copy(update={"files": {"x": "b" * 64}})))
    answer = await site.ask("polite")
    assert answer.status_code == 503
    assert "built for tiny" in answer.json()["error"]["message"]
    assert site.engine.requests == []


async def test_a_version_of_an_unreachable_store_is_unavailable(site: Site) -> None:
    await site.server.promote(version_of("polite"))
    site.server.backend.down = ""
    assert (await site.ask("polite@abcdef")).status_code == 503
    assert (await site.ask("polite")).status_code == 200
    site.server.backend.down = None


async def test_the_list_of_models_names_the_base_and_every_variant(site: Site) -> None:
    """Each can be sent back as it stands there."""
    (prod,) = await site.server.promote(version_of("polite"))
    (beta,) = await site.server.promote(version_of("polite"), tag="beta")
    listed = (await site.client.get("/v1/models")).json()
    assert listed == [
        {"id": "tiny", "root": "/models/tiny", "parent": None},
        {"id": "polite@beta", "root": f"polite@{beta}", "parent": "tiny"},
        {"id": "polite", "root": f"polite@{prod}", "parent": "tiny"},
    ]
    assert [(await site.ask(card["id"])).status_code for card in listed] == [200, 200, 200]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[1]", b'"polite"', b'{"model": 7}', b'{"model": null}', b'{"model": ["polite"]}',
        b"\xff\xfe", b'{"model": "polite"} trailing', b'{"model": "\\ud83d"}',
    ],
)  # fmt: skip
async def test_a_body_that_names_nothing_readable_reaches_vllm_as_base(site: Site, body: bytes) -> None:
    """It is vLLM's to refuse. Where vLLM reads a variant's name, it is unknown there: never the base in its place."""
    await site.server.promote(version_of("polite"))
    answer = await site.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    if body == b'{"model": null}':  # none named: the base, as in vLLM
        assert (answer.status_code, answer.json()["model"], site.engine.claims) == (200, "tiny", [None])
    else:
        assert 400 <= answer.status_code < 500
        assert site.engine.requests == []


# -- bodies and answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 3])
async def test_the_body_reaches_the_handler_byte_for_byte(site: Site, pieces: int) -> None:
    """Also when it came in pieces: order, spacing and unknown fields are the client's."""
    await site.server.promote(version_of("polite"))
    body = {"zzz": [1.0, {"é": None}], "model": "polite", "prompt": "  two  spaces "}
    call = Call(site.app, body, pieces=pieces, path="/echo")
    await call.task
    assert b"".join(call.chunks()) == json.dumps(body).encode()


async def test_a_stream_reaches_the_client_token_by_token(site: Site) -> None:
    """The first token is there while the second is still to come; headers say variant and version from the start."""
    (version,) = await site.server.promote(version_of("polite"))
    site.engine.pause()
    call = Call(site.app, {"model": "polite", "stream": True})
    await until(lambda: bool(call.sent))
    headers = dict(call.sent[0]["headers"])
    assert (headers[b"x-edits-variant"], headers[b"x-edits-version"]) == (b"polite", version.encode())
    assert call.chunks() == []
    site.engine.step()
    await until(lambda: len(call.chunks()) == 1)
    assert (call.chunks(), site.engine.running) == ([b"data: [1]\n\n"], 1)
    site.engine.resume()
    await call.task
    assert b"".join(call.chunks()) == b"data: [1]\n\ndata: [2]\n\ndata: [3]\n\ndata: [DONE]\n\n"
    assert site.count("polite", version, "ok") == 1


async def test_an_answer_stays_on_its_version_through_a_swap(site: Site) -> None:
    """It began before the promotion and ends after it, on the old version; the next request gets the new one."""
    (old,) = await site.server.promote(version_of("polite"))
    site.engine.pause()
    call = Call(site.app, {"model": "polite", "stream": True})
    await until(lambda: site.engine.running == 1)
    (new,) = await site.server.promote(version_of("polite"))
    site.engine.resume()
    await call.task
    assert site.engine.claims == [old]
    assert (await site.ask("polite")).headers["x-edits-version"] == new
    assert list(site.server.residents()) == [new]


async def test_different_variants_are_answered_at_once(site: Site) -> None:
    """Requests in flight together do not see each other's lease."""
    versions = await site.server.promote(version_of("polite"), version_of("strict"))
    site.engine.pause()
    tasks = [asyncio.create_task(site.ask(name)) for name in ("polite", "tiny", "strict", "polite")]
    await until(lambda: site.engine.running == 4)
    in_flight = [row["in_flight"] for row in site.server.status()["variants"]]
    site.engine.resume()
    answers = await asyncio.gather(*tasks)
    assert in_flight == [2, 1]
    assert [answer.headers["x-edits-version"] for answer in answers] == [versions[0], "base", versions[1], versions[0]]
    assert sorted(site.engine.claims, key=str) == sorted([versions[0], None, versions[1], versions[0]], key=str)


# -- clients that leave ------------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_a_stream_frees_its_slot_and_is_counted(site: Site) -> None:
    """The engine aborts the request first; then, and not before, the slot is free."""
    (version,) = await site.server.promote(version_of("polite"))
    site.engine.pause()
    call = Call(site.app, {"model": "polite", "stream": True})
    await until(lambda: site.engine.running == 1)
    await site.server.promote(version_of("polite"))
    call.leave()
    await call.task
    await until(site.is_quiet)
    await site.server.core.slots.wait_drained()
    assert site.engine.aborted == 1
    assert version not in site.server.residents()
    assert site.count("polite", version, "aborted") == 1
    assert site.count("polite", version, "ok") == 0


async def test_a_client_that_leaves_while_it_waits_for_its_answer_frees_its_slot(site: Site) -> None:
    (version,) = await site.server.promote(version_of("polite"))
    site.engine.pause()
    call = Call(site.app, {"model": "polite"})
    await until(lambda: site.engine.running == 1)
    call.leave()
    await call.task
    await until(site.is_quiet)
    assert site.engine.aborted == 1
    assert version in site.server.residents()


async def test_a_client_that_leaves_while_it_waits_for_its_answer_is_counted_as_aborted(site: Site) -> None:
    (version,) = await site.server.promote(version_of("polite"))
    site.engine.pause()
    call = Call(site.app, {"model": "polite"})
    await until(lambda: site.engine.running == 1)
    call.leave()
    await call.task
    await until(site.is_quiet)
    assert (site.count("polite", version, "ok"), site.count("polite", version, "aborted")) == (0, 1)


async def test_a_client_that_leaves_while_it_waits_for_a_slot_waits_no_longer(site: Site) -> None:
    """Else its version is brought in for nobody, perhaps in the place of one that somebody needs."""
    await site.server.promote(*(version_of(f"variant-{number}") for number in range(4)))
    site.engine.pause()
    calls = [Call(site.app, {"model": f"variant-{number}", "stream": True}) for number in range(4)]
    await until(lambda: site.engine.running == 3)
    calls[3].leave()
    try:
        await asyncio.wait_for(asyncio.shield(calls[3].task), 0.5)
    finally:
        site.engine.resume()
        await asyncio.gather(*(call.task for call in calls))


async def test_a_client_that_leaves_in_the_middle_of_its_body_reaches_nobody(site: Site) -> None:
    await site.server.promote(version_of("polite"))
    call = Call(site.app, {"model": "polite", "prompt": "x" * 1000}, pieces=2, cut=True)
    done, _ = await asyncio.wait([call.task], timeout=0.02)
    assert not done
    call.leave()
    await asyncio.wait([call.task], timeout=10)
    assert call.task.done()
    assert site.engine.requests == []


# -- what a caller cannot do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "polite"])
async def test_a_caller_cannot_write_the_claim(site: Site, model: str) -> None:
    """Whatever stands in vllm_xargs, the gate's claim or none is what the engine gets; other arguments pass."""
    polite, strict = await site.server.promote(version_of("polite"), version_of("strict"))
    slot = site.server.residents()[strict].slot
    await site.ask(model, vllm_xargs={CLAIM: [slot, strict, 1.0], "theirs": 1})
    assert site.engine.claims == [polite if model == "polite" else None]
    assert site.engine.requests[0].extra_args["theirs"] == 1


async def test_beam_search_on_what_edits_prompt_and_answer_differently_is_a_400(site: Site) -> None:
    """vLLM asks the engine anew for every token, with the answer so far as prompt. Other variants are searched."""
    said = Offset(site="layers.1.resid", scope=EditScope(segment="generated"))
    (scoped,) = await site.server.promote(version_of("scoped", edit=said))
    await site.server.promote(version_of("polite"))
    answer = await site.ask("scoped", use_beam_search=True)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "use_beam_search"
    assert "Leave out use_beam_search" in answer.json()["error"]["message"]
    for truth in (1, "true", "on"):  # pydantic takes all of them for true
        assert (await site.ask("scoped", use_beam_search=truth)).status_code == 400
    assert site.engine.requests == []
    assert (await site.ask("scoped", use_beam_search=False)).headers["x-edits-version"] == scoped
    assert (await site.ask("polite", use_beam_search=True)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "arguments", "told"),
    [
        (
            {"x-edits-strength": "0.5"},
            {},
            "'polite' accepts no strength, because its author set no bounds, but the request asks for 0.5",
        ),
        (
            {},
            {"edits_strength": 0.5},
            "'polite' accepts no strength, because its author set no bounds, but the request asks for 0.5",
        ),
        ({"x-edits-strength": "0.5"}, {"edits_strength": 1}, "expected one number as strength, found '0.5' and '1'"),
        ({"x-edits-strength": "much"}, {}, "expected one number as strength, found 'much'"),
        ({}, {"edits_strength": [1]}, "expected one number as strength"),
    ],
)
async def test_a_strength_that_cannot_be_is_a_400(site: Site, headers: Any, arguments: Any, told: str) -> None:
    """Before anything reaches the engine; the same request without it is served (positive control)."""
    await site.server.promote(version_of("polite"))
    body = {"model": "polite", "prompt": "x", "vllm_xargs": arguments}
    answer = await site.client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert told in answer.json()["error"]["message"]
    assert site.engine.requests == []
    assert (await site.ask("polite")).status_code == 200


def salt_of(version: str, own: str | None = None) -> str | None:
    return cache_salt(Choice("polite", "polite", version), own)


async def test_the_prefix_cache_is_salted_by_version_and_callers_salt(site: Site) -> None:
    """Two versions of a name, and a forged salt, share no block; the base without a salt has none."""
    (old,) = await site.server.promote(version_of("polite"))
    await site.ask("polite")
    await site.ask("polite", cache_salt="tenant")
    (new,) = await site.server.promote(version_of("polite"))
    await site.ask("polite", cache_salt=salt_of(old))
    await site.ask("tiny")
    await site.ask("tiny", cache_salt=salt_of(old))
    salts = [request.prompt.get("cache_salt") for request in site.engine.requests]
    assert salts[:2] == [salt_of(old), salt_of(old, "tenant")]
    assert salts[2] == salt_of(new, salts[0])
    assert salts[3] is None
    assert len(set(salts)) == 5


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "text/plain", "application/octet-stream"])
async def test_a_body_that_is_not_json_serves_the_base_and_no_variant(site: Site, kind: str) -> None:
    """No lease was taken, so a variant's name is unknown there: never the base in its place."""
    await site.server.promote(version_of("polite"))
    for model, status in (("tiny", 200), ("polite", 404)):
        answer = await site.client.post(
            "/v1/audio/transcriptions", params={"model": model}, content=b"...", headers={"content-type": kind}
        )
        assert answer.status_code == status
        assert "x-edits-version" not in answer.headers
    assert site.engine.claims == [None]


async def test_pooling_is_refused_for_a_variant(site: Site) -> None:
    """It has no edited form; for the base it is untouched (positive control)."""
    await site.server.promote(version_of("polite"))
    assert (await site.ask("tiny", "/v1/pooling")).json() == "pooled Hello"
    answer = await site.ask("polite", "/v1/pooling")
    assert answer.status_code == 400
    assert "served by the base model only" in answer.json()["error"]["message"]


async def test_work_that_outlives_its_request_keeps_its_version(site: Site) -> None:
    """A response in the background takes several turns with the engine, after a promotion that cleared its slot."""
    (old,) = await site.server.promote(version_of("polite"))
    answer = await site.client.post("/v1/background?turns=3", json={"model": "polite"})
    assert answer.json() == {"status": "queued"}
    (new,) = await site.server.promote(version_of("polite"))
    await until(lambda: len(site.engine.requests) == 3 and site.is_quiet())
    assert site.engine.claims == [old, old, old]
    assert (await site.ask("polite")).headers["x-edits-version"] == new


async def test_outputs_that_are_abandoned_are_aborted_before_the_slot_is_free(site: Site) -> None:
    """When closing returns the engine knows, and only then the version, no longer promoted, leaves its slot."""
    (old,) = await site.server.promote(version_of("polite"))
    gate, lease = EngineGate(site.engine, site.server.core.renew), await site.server.lease("polite")
    token = CURRENT_LEASE.set(lease)
    outputs: Any = gate.generate("Hello", Sampling(3, OutputKind.DELTA), "request-1")
    await anext(outputs)
    await site.server.promote(version_of("polite"))
    assert old in site.server.residents()
    await outputs.aclose()
    CURRENT_LEASE.reset(token)
    assert site.engine.aborted == 1
    assert old not in site.server.residents()


async def test_a_renewed_lease_is_given_back_when_the_prompt_is_refused(site: Site) -> None:
    await site.server.promote(version_of("polite"))
    gate = EngineGate(site.engine, site.server.core.renew)
    lease = await site.server.lease("polite")
    with lease.hold():
        pass
    token = CURRENT_LEASE.set(lease)
    with pytest.raises(TypeError, match="Send text or tokens"):
        await anext(aiter(gate.generate(object(), Sampling(1, OutputKind.DELTA), "request-1")))
    CURRENT_LEASE.reset(token)
    users = [one.users for one in site.server.residents().values()]
    for _ in range(sum(users)):  # so that the fixture finds the site quiet
        site.server.core.slots.residency.release(lease.choice.version or "")
    assert users == [0]


# -- metrics -----------------------------------------------------------------------------------------------------------


async def test_the_metrics_equal_the_requests_sent(site: Site) -> None:
    """By variant, version and outcome, with their tokens, durations and first tokens."""
    (old,) = await site.server.promote(version_of("polite"))
    for options in ({}, {"max_tokens": 5}, {"stream": True}):
        await site.ask("polite", **options)
    (new,) = await site.server.promote(version_of("polite"))
    await site.ask("polite", stream=True, max_tokens=7)
    await site.ask("tiny")
    await site.ask("tiny", prompt="bad")
    await site.ask("unheard-of")
    await site.ask("unheard-of", "/v1/messages")
    assert site.count("polite", old, "ok") == 3
    assert site.count("polite", new, "ok") == 1
    assert (site.count("base", None, "ok"), site.count("base", None, "rejected")) == (1, 1)
    assert site.count("unknown", None, "rejected") == 2
    counted = [
        sample.value
        for metric in site.server.registry.collect()
        for sample in metric.samples
        if sample.name == "vllm_edits_requests_total"
    ]
    assert sum(counted) == 8
    tokens = functools.partial(site.server.metric, "tokens_total", variant="polite")
    assert tokens(version=old[:12], kind="generation") == 3 + 5 + 3
    assert tokens(version=old[:12], kind="prompt") == 3 * PROMPT_TOKENS
    assert tokens(version=new[:12], kind="generation") == 7
    for name in ("request_seconds", "time_to_first_token_seconds", "time_per_output_token_seconds"):
        assert site.server.metric(f"{name}_count", variant="polite") == 4
        assert site.server.metric(f"{name}_count", variant="base") == 1


async def test_requests_that_do_not_reach_the_engine_are_not_counted(site: Site) -> None:
    """Looking at the status or the models is no request for an answer."""
    await site.client.get("/v1/models")
    await site.client.get("/v1/edits")
    await site.client.post("/v1/edits/sync")
    await site.ask("tiny", "/echo")
    assert site.server.registry.get_sample_value("vllm_edits_requests_total") is None
    assert (site.count("base", None, "ok"), site.count("base", None, "rejected")) == (0, 0)


@pytest.mark.parametrize("prompt", ["crash", "crash late"])
async def test_a_fault_of_the_server_is_counted_as_an_error(site: Site, prompt: str) -> None:
    """Whether it comes before the engine was asked or after."""
    (version,) = await site.server.promote(version_of("polite"))
    assert (await site.ask("polite", prompt=prompt)).status_code == 500
    assert site.count("polite", version, "error") == 1


# -- /v1/edits ---------------------------------------------------------------------------------------------------------


async def history(site: Site) -> list[tuple[str, str]]:
    return [(entry.operation, entry.version) for entry in site.server.store.history("polite")]


async def test_the_status_tells_what_is_served(site: Site) -> None:
    (version,) = await site.server.promote(version_of("polite"))
    answer = (await site.client.get("/v1/edits")).json()
    (row,) = answer["variants"]
    assert (row["name"], row["tag"], row["version"], row["resident"]) == ("polite", "prod", version, True)
    assert answer["slots"]["total"] == 3
    held = {"slot": 1, "version": version, "users": 0, "retired": False, "closed": False}
    assert (answer["slots"]["held"], answer["slots"]["waiting"]) == ([held], [])
    assert answer["base"] == {"names": ["tiny", "small"], "in_flight": 0}
    assert answer["last_swap"]["to_version"] == version
    assert answer["store"]["head_age_seconds"] >= 0


async def test_a_sync_follows_at_once_and_tells_what_moved(site: Site) -> None:
    version = publish(site.server.store, version_of("polite"))
    (swap,) = (await site.client.post("/v1/edits/sync")).json()["swaps"]
    assert (swap["variant"], swap["to_version"], swap["error"]) == ("polite", version, "")
    assert (await site.client.post("/v1/edits/sync")).json() == {"swaps": [], "last_error": ""}
    assert (await site.ask("polite")).headers["x-edits-version"] == version


async def test_promoting_and_rolling_back_append_to_the_store_and_are_followed(site: Site) -> None:
    """When the answer is here, the next request gets the new version; the history says who and why."""
    (first,) = await site.server.promote(version_of("polite"))
    second = publish(site.server.store, version_of("polite"), tag=None)
    body = {"version": second[:8], "reason": "milder"}
    answer = await site.client.put("/v1/edits/polite", json=body, headers=TOKEN)
    assert answer.status_code == 200
    assert answer.json()["entry"]["version"] == answer.json()["swap"]["to_version"] == second
    assert (await site.ask("polite")).headers["x-edits-version"] == second
    entry = site.server.store.history("polite")[-1]
    assert (entry.reason, entry.actor) == ("milder", "http:127.0.0.1")
    answer = await site.client.post("/v1/edits/polite/rollback", json={}, headers=TOKEN)
    assert answer.status_code == 200
    assert (await site.ask("polite")).headers["x-edits-version"] == first
    assert await history(site) == [("promote", first), ("promote", second), ("rollback", first)]


async def test_withdrawing_appends_to_the_store_and_ends_what_is_served(site: Site) -> None:
    (version,) = await site.server.promote(version_of("polite"))
    answer = await site.client.delete("/v1/edits/polite", params={"reason": "leak"}, headers=TOKEN)
    assert answer.status_code == 200
    assert (answer.json()["swap"]["from_version"], answer.json()["swap"]["to_version"]) == (version, None)
    assert site.server.store.history("polite")[-1].reason == "leak"
    assert (await site.ask("polite")).status_code == 404
    answer = await site.client.delete("/v1/edits/polite", headers=TOKEN)
    assert (answer.status_code, "was withdrawn by" in answer.json()["detail"]) == (404, True)


@pytest.mark.parametrize("sent", [{}, {ADMIN_TOKEN: "guess"}, {ADMIN_TOKEN: ""}, {ADMIN_TOKEN: "let-me-in-"}])
async def test_a_change_without_the_admin_token_is_refused(site: Site, sent: dict[str, str]) -> None:
    await site.server.promote(version_of("polite"))
    other = publish(site.server.store, version_of("polite"), tag=None)
    before = await history(site)
    for method, path, body in (("PUT", "", {"version": other}), ("POST", "/rollback", {}), ("DELETE", "", None)):
        answer = await site.client.request(method, f"/v1/edits/polite{path}", json=body, headers=sent)
        assert answer.status_code == 401
        assert ADMIN_TOKEN in answer.json()["detail"]
    assert await history(site) == before
    answer = await site.client.put("/v1/edits/polite", json={"version": other}, headers=TOKEN)
    assert answer.status_code == 200  # positive control


@pytest.mark.parametrize(
    ("contents", "status"),
    [
        (None, 403),
        (b"", 503),
        (b"\r\n", 503),
        (b"two\nlines", 503),
        (b"\x00", 503),
        ("missing", 503),
        ("a folder", 503),
    ],
)
async def test_without_a_token_to_compare_with_nobody_can_change_anything(
    tmp_path: Path, contents: bytes | str | None, status: int
) -> None:
    """Closed, also for who sends an empty token, and the answer says what is wrong with the file."""
    token_file = None if contents is None else tmp_path / "token"
    if token_file is not None and isinstance(contents, bytes):
        token_file.write_bytes(contents)
    elif token_file is not None and contents == "a folder":
        token_file.mkdir()
    site = Site(Server(f"memory://{tmp_path}"), token_file)
    version = publish(site.server.store, version_of("polite"), tag=None)
    answer = await site.client.put("/v1/edits/polite", json={"version": version}, headers={ADMIN_TOKEN: ""})
    assert answer.status_code == status
    assert status == 403 or str(token_file) in answer.json()["detail"]
    assert site.server.store.heads() == {}


@pytest.mark.parametrize(
    "contents", [b"let-me-in", b"let-me-in\r\n", b"\xef\xbb\xbflet-me-in\n", "schlüssel\n".encode()]
)
async def test_a_token_is_one_line_whatever_editor_wrote_it(tmp_path: Path, contents: bytes) -> None:
    token_file = tmp_path / "token"
    token_file.write_bytes(contents)
    site = Site(Server(f"memory://{tmp_path}"), token_file)
    version = publish(site.server.store, version_of("polite"), tag=None)
    for sent, status in ((b"guess", 401), (contents.removeprefix(b"\xef\xbb\xbf").strip(), 200)):
        headers = {ADMIN_TOKEN.encode(): sent}
        answer = await site.client.put("/v1/edits/polite", json={"version": version}, headers=headers)
        assert answer.status_code == status


@pytest.mark.parametrize("content", [b"{", b'{"to": 1}', b"", b"[" * 3000])
@pytest.mark.parametrize("line", ["PUT /v1/edits/polite", "POST /v1/edits/polite/rollback", "DELETE /v1/edits/polite"])
async def test_nothing_of_a_change_is_looked_at_without_the_token(site: Site, line: str, content: bytes) -> None:
    method, path = line.split()
    for headers in ({}, {ADMIN_TOKEN: "guess"}, {ADMIN_TOKEN: "gu\u00ebss".encode("latin-1")}):
        answer = await site.client.request(method, path, content=content, headers=headers)
        assert answer.status_code == 401
    assert (await site.client.request(method, path, content=content, headers=TOKEN)).status_code in (400, 404, 422)


@pytest.mark.parametrize(
    ("request_line", "body", "status", "said"),
    [
        ("PUT polit", {"version": "abcdef"}, 404, "Did you mean 'polite'"),
        ("PUT polite", {"version": "ffffff"}, 404, "no version ffffff"),
        ("PUT Polite", {"version": "abcdef"}, 404, "is not the name of a variant"),
        ("PUT polite", {"version": "prod", "tag": "abcdef"}, 404, "cannot be a tag"),
        ("PUT polite", {}, 422, "version"),
        ("PUT polite", {"version": "abcdef", "force": True}, 422, "force"),
        ("POST polite/rollback", {}, 404, "no earlier version"),
        ("POST polit/rollback", {}, 404, "Did you mean"),
        ("POST polite/rollback", {"to": 1}, 422, "to"),
    ],
)
async def test_an_impossible_change_is_refused_and_nothing_changes(
    site: Site, request_line: str, body: dict[str, Any], status: int, said: str
) -> None:
    (version,) = await site.server.promote(version_of("polite"))
    method, path = request_line.split()
    answer = await site.client.request(method, f"/v1/edits/{path}", json=body, headers=TOKEN)
    assert answer.status_code == status
    assert said in json.dumps(answer.json())
    assert await history(site) == [("promote", version)]


async def test_a_tag_that_is_no_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("let-me-in")
    site = Site(Server(str(tmp_path / "store")), tmp_path / "token")
    await site.server.promote(version_of("polite"))
    answer = await site.client.post("/v1/edits/polite/rollback", json={"tag": "../../x"}, headers=TOKEN)
    assert answer.status_code == 404


async def test_a_change_that_lost_a_race_is_a_conflict(site: Site, tmp_path: Path) -> None:
    (first,) = await site.server.promote(version_of("polite"))
    mine, theirs = (publish(site.server.store, version_of("polite"), tag=None) for _ in range(2))
    late = Overtaken(site.server.store.url)
    late.overtake = lambda: site.server.store.promote(f"polite@{theirs}")
    site.server.core.versions.reader = Reader(late, cache=NodeCache(tmp_path))
    answer = await site.client.put("/v1/edits/polite", json={"version": mine}, headers=TOKEN)
    assert answer.status_code == 409
    assert "another writer changed" in answer.json()["detail"]
    assert await history(site) == [("promote", first), ("promote", theirs)]


async def test_a_promotion_that_this_server_cannot_follow_says_so(site: Site) -> None:
    """It stands in the store, since other servers may follow it; here the old version keeps serving."""
    (good,) = await site.server.promote(version_of("polite"))
    bad = publish(site.server.store, version_of("polite", BASE.model_copy(update={"files": {"x": "b" * 64}})), tag=None)
    answer = await site.client.put("/v1/edits/polite", json={"version": bad}, headers=TOKEN)
    assert answer.status_code == 422
    assert "was written to the store, but this server did not follow it" in answer.json()["detail"]
    assert (await site.ask("polite")).headers["x-edits-version"] == good


async def test_with_the_store_down_a_change_is_unavailable(site: Site) -> None:
    await site.server.promote(version_of("polite"))
    site.server.backend.down = ""
    answer = await site.client.post("/v1/edits/polite/rollback", json={}, headers=TOKEN)
    assert answer.status_code == 503
    site.server.backend.down = None


# -- who may ask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["polite", "unknown", "polite@staging"])
async def test_outside_vllms_api_key_only_the_base_is_served(tmp_path: Path, model: str) -> None:
    """Nothing is brought to the device for a caller without a key, and nobody learns which names there are."""
    site = Site(Server(f"memory://{tmp_path}", slots=1), None, keys=["s3cret", "schlüssel"])
    await site.server.promote(version_of("polite"), version_of("strict"))
    resident = site.server.residents()
    for headers in ({}, {"authorization": "Bearer guess"}, {"authorization": "Basic s3cret"}):
        answer = await site.client.post("/v1/completions", json={"model": model}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthenticationError")
        for base in ({}, {"model": "tiny"}):
            answer = await site.client.post("/v1/completions", json=base, headers=headers)
            assert (answer.status_code, answer.headers["x-edits-version"]) == (200, "base")
            assert answer.json()["model"] == "tiny"
    assert site.server.residents() == resident
    answer = await site.client.post(
        "/v1/completions", json={"model": "polite"}, headers={"authorization": "bearer s3cret"}
    )
    assert (answer.status_code, answer.headers["x-edits-variant"]) == (200, "polite")


async def test_a_script_in_a_browser_may_read_which_version_answered(site: Site) -> None:
    await site.server.promote(version_of("polite"))
    answer = await site.client.post(
        "/v1/completions", json={"model": "polite"}, headers={"origin": "https://a.example"}
    )
    assert answer.headers["access-control-expose-headers"] == "x-edits-variant, x-edits-version"
    assert "access-control-expose-headers" not in (await site.ask("polite")).headers


# -- a variant in the weights ------------------------------------------------------------------------------------------


async def test_a_change_of_the_weights_does_not_wait_for_the_request_that_asks_for_it(tmp_path: Path) -> None:
    """Promote, roll back, sync and withdraw over HTTP; what is not served meanwhile is vLLM's own 404."""
    token_file = tmp_path / "token"
    token_file.write_text("let-me-in")
    site = Site(Server(f"memory://{tmp_path}", weights="polite"), token_file)
    edit = LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=1)
    (first,) = await site.server.promote(version_of("polite", edit=edit))
    second = publish(site.server.store, version_of("polite", edit=edit), tag=None)
    assert (await site.ask("polite")).headers["x-edits-version"] == first
    answer = await site.ask("tiny")
    assert answer.status_code == 404
    assert "is in the engine's weights" in answer.json()["error"]["message"]
    for change, expected in (
        (site.client.put("/v1/edits/polite", json={"version": second}, headers=TOKEN), second),
        (site.client.post("/v1/edits/polite/rollback", json={}, headers=TOKEN), first),
        (site.client.post("/v1/edits/sync", json={}), first),
    ):
        assert (await asyncio.wait_for(change, 10)).status_code == 200
        assert (await site.ask("polite")).headers["x-edits-version"] == expected
    assert [card["id"] for card in (await site.client.get("/v1/models")).json()] == ["polite"]
    assert (await site.client.delete("/v1/edits/polite", headers=TOKEN)).status_code == 200
    assert (await site.ask("tiny")).headers["x-edits-version"] == "base"
    assert site.engine.claims == [first, second, first, first, None]
    await site.client.aclose()


@pytest.mark.parametrize("root", ["", "/behind/a/proxy", "/v", "/v1/e"])
async def test_what_is_said_to_the_plugin_holds_no_lease_below_a_root_path_either(site: Site, root: str) -> None:
    """Positive control: what is said to a model does."""
    held = []

    async def app(*_: Any) -> None:
        held.append(CURRENT_LEASE.get() is not None)

    def client() -> Callable[[], Any]:
        said = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Any:
            return said.pop() if said else await asyncio.Event().wait()

        return receive

    async def send(_: Any) -> None:
        raise AssertionError("nothing is answered here")

    middleware = VariantMiddleware(app, lambda: (site.coordinator, site.server.metrics, site.keys))
    for path in ("/v1/edits/sync", "/v1/edits/polite/rollback", "/v1/completions"):
        for sent in (root + path, path):  # a proxy may leave its prefix in the path or take it away
            scope = {"type": "http", "method": "POST", "path": sent, "root_path": root, "headers": []}
            await middleware(scope, client(), send)
    assert held == [False, False, False, False, True, True]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "outcome"), [("refused", "rejected"), ("given up", "error"), ("broke late", "error"), ("", "ok")]
)
async def test_what_the_engine_refuses_or_gives_up_is_counted_as_that(
    site: Site, monkeypatch: pytest.MonkeyPatch, fault: str, outcome: str, stream: bool
) -> None:
    """Also where the status is 200 by then, or the engine was asked before it refused."""
    (version,) = await site.server.promote(version_of("polite"))
    real = site.engine.generate

    async def generate(prompt: Any, sampling: Sampling, request_id: str) -> AsyncIterator[Any]:
        if fault == "refused":
            raise ValueError("more logprobs than are allowed")
        async for output in real(prompt, sampling, request_id):
            if fault == "given up":
                output.outputs[0].finish_reason = "error"
            yield output
            if fault == "broke late":
                raise RuntimeError("the engine has died")

    monkeypatch.setattr(site.engine, "generate", generate)
    await site.ask("polite", stream=stream)
    counted = {each: site.count("polite", version, each) for each in ("ok", "aborted", "error", "rejected")}
    assert counted == {each: float(each == outcome) for each in counted}


async def test_work_in_the_background_is_counted_when_it_ends(site: Site) -> None:
    (version,) = await site.server.promote(version_of("polite"))
    await site.ask("polite", "/v1/background?turns=2", max_tokens=3)
    await until(lambda: len(site.engine.requests) == 2 and site.is_quiet())
    assert site.count("polite", version, "ok") == 2
    tokens = site.server.metric("tokens_total", variant="polite", version=version[:12], kind="generation")
    assert tokens == 2 * 3


@pytest.mark.parametrize("path", ["/inference/v1/abort_requests", "/v1/responses/resp_1/cancel"])
async def test_what_ends_other_requests_waits_for_none_of_them(site: Site, path: str) -> None:
    """No variant is looked up for it, so it is answered by vLLM whatever is in the weights."""
    answer = await site.client.post(path, json={"model": "absent", "request_ids": ["a"]})
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    assert site.count("unknown", None, "rejected") == 0


async def test_our_own_paths_ask_for_the_api_key_too(site: Site) -> None:
    """Where vLLM's --root-path keeps its own guard from knowing them."""
    site.keys = ApiKeys(["secret"], ["tiny"])
    for method, path in (("GET", "/v1/edits"), ("POST", "/v1/edits/sync"), ("GET", "/v1/edits/experiments")):
        assert (await site.client.request(method, path)).status_code == 401
        answer = await site.client.request(method, path, headers={"authorization": "Bearer secret"})
        assert answer.status_code == 200
