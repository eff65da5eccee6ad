"""What a server does about signatures: nothing unsigned is served, nothing that was trusted is lost, not even by a
restart."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.support.bundles import publish
from tests.support.fakes import Server, version_of
from tests.support.site import TOKEN, Site
from vllm_edits.edit_store import Bundle, EditStore, Enforcement, Role, SigningKey, TrustedKey, TrustPolicy
from vllm_edits.edit_store.errors import NotFound, NotTrusted, SettingsError
from vllm_edits.edit_store.experiments.document import Experiment, Guardrail
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange
from vllm_edits.edit_store.storage.store import manifest_key
from vllm_edits.edit_store.trust import Trust
from vllm_edits.plugin.experiments.guardrails import Withdraw
from vllm_edits.plugin.serving.coordinator import CapacityWish

pytestmark = pytest.mark.anyio
BOTH = (Role.AUTHOR, Role.PROMOTER)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


ALICE, BOB = SigningKey.generate(), SigningKey.generate()


def trust(enforcement: Enforcement = Enforcement.REQUIRE, promoters: int = 1) -> Trust:
    keys = tuple(
        TrustedKey(name=name, public=key.public_pem(), roles=BOTH) for name, key in (("alice", ALICE), ("bob", BOB))
    )
    return Trust(TrustPolicy(keys=keys, promoters_needed=promoters), enforcement)


def signed(server: Server, signer: SigningKey | None = ALICE) -> EditStore:
    """The server's store, for somebody who signs."""
    return EditStore(server.store.url, signer=signer)


async def follow(server: Server) -> None:
    await server.sync()
    await server.core.slots.wait_drained()


async def test_only_what_is_signed_is_followed(tmp_path: Path) -> None:
    server = Server(f"memory://{tmp_path}", trust=trust())
    good = publish(signed(server), version_of("polite"))
    await follow(server)
    assert await server.ask("polite") == good
    publish(signed(server, None), version_of("polite"))
    await follow(server)
    assert await server.ask("polite") == good
    assert server.metric("bundles_rejected_total", reason="unsigned") == 2
    assert server.metric("swaps_total", result="refused") == 1
    assert "expected 1 author signature(s), found none" in server.refusal("polite")
    await follow(server)
    assert server.metric("swaps_total", result="refused") == 1, "told once, not at every look"


async def test_a_version_that_a_client_names_must_be_signed_by_an_author(tmp_path: Path) -> None:
    """No tag promotes it, so nobody has vouched for it: whoever can write to the store must not be able to serve."""
    server = Server(f"memory://{tmp_path}", trust=trust())
    publish(signed(server), version_of("polite"))
    await follow(server)
    good, bad = signed(server).publish(version_of("polite")), signed(server, None).publish(version_of("polite"))
    assert await server.ask(f"polite@{good}") == good
    for _ in range(2):
        with pytest.raises(NotTrusted, match=r"expected 1 author signature\(s\), found none"):
            await server.ask(f"polite@{bad}")
    assert bad not in server.residents()
    lenient = Server(server.store.url, trust=trust(Enforcement.WARN))
    await follow(lenient)
    assert await lenient.ask(f"polite@{bad}") == bad


async def test_what_takes_safety_away_is_refused_although_it_is_signed(tmp_path: Path) -> None:
    """Unless the trust file allows it. The version before it keeps serving."""
    server = Server(f"memory://{tmp_path}", trust=trust())
    good, bold = publish(signed(server), version_of("polite")), version_of("polite")
    marked = Bundle(bold.manifest.model_copy(update={"privileged": True}), bold.tensor_bytes)
    version = publish(signed(server), marked)
    await follow(server)
    assert await server.ask("polite") == good
    assert "vllm-edits trust privileged FILE allow" in server.refusal("polite")
    assert server.metric("bundles_rejected_total", reason="privileged") == 1
    policy = trust().policy.model_copy(update={"privileged": True})
    allowing = Server(server.store.url, trust=Trust(policy, Enforcement.REQUIRE))
    await follow(allowing)
    assert await allowing.ask("polite") == version


async def test_an_unsigned_entry_for_a_version_that_is_not_there_takes_nothing_away(tmp_path: Path) -> None:
    """Not from a server that runs, and not from one that starts: both serve the last entry that is trusted."""
    server = Server(f"memory://{tmp_path}", trust=trust())
    good = publish(signed(server), version_of("polite"))
    await follow(server)
    vandal = signed(server, None)
    gone = vandal.publish(version_of("polite"))
    vandal.promote(f"polite@{gone}")
    vandal.backend.delete(manifest_key(gone))
    for each in (server, Server(server.store.url, trust=trust())):
        await follow(each)
        assert await each.ask("polite") == good
        assert "expected 1 promoter signature(s), found none" in each.refusal("polite")


async def test_capacity_for_a_version_is_no_trust_in_it(tmp_path: Path) -> None:
    """An operator grows for a version that nobody has signed: it fits, and clients still cannot name it."""
    server = Server(f"memory://{tmp_path}", trust=trust(), grow="ask")
    publish(signed(server), version_of("polite"))
    await follow(server)
    unsigned = signed(server, None).publish(version_of("polite"))
    assert not (await server.core.grow(CapacityWish([f"polite@{unsigned}"])))["growing"]
    with pytest.raises(NotTrusted, match=r"expected 1 author signature\(s\), found none"):
        await server.ask(f"polite@{unsigned}")


async def test_a_second_promoter_lets_a_promotion_through(tmp_path: Path) -> None:
    """Without a restart: the entry is looked at again until enough have signed."""
    server = Server(f"memory://{tmp_path}", trust=trust(promoters=2))
    version = publish(signed(server), version_of("polite"))
    await follow(server)
    with pytest.raises(NotFound):
        await server.ask("polite")
    head = server.store.head("polite")
    assert head is not None
    server.store.attest(head.digest, BOB.sign(Role.PROMOTER, head.digest, "polite"))
    await follow(server)
    assert await server.ask("polite") == version
    assert server.status()["refused"] == []


async def test_a_restart_serves_what_a_server_that_never_stopped_serves(tmp_path: Path) -> None:
    """The last entry that is trusted: an unsigned one after it takes nothing away."""
    url = f"memory://{tmp_path}"
    running = Server(url, trust=trust())
    first = publish(signed(running), version_of("polite"))
    second = publish(signed(running), version_of("polite"))
    publish(signed(running, None), version_of("polite"))
    publish(signed(running, None), version_of("other"))
    await follow(running)
    restarted = Server(url, trust=trust())
    await follow(restarted)
    for server in (running, restarted):
        assert await server.ask("polite") == second != first
        with pytest.raises(NotFound):
            await server.ask("other")
        assert "unsigned" in server.refusal("polite")
    third = publish(signed(running), version_of("polite"))
    await follow(restarted)
    assert await restarted.ask("polite") == third


async def test_warn_serves_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(f"memory://{tmp_path}", trust=trust(Enforcement.WARN))
    version = publish(signed(server, None), version_of("polite"))
    with caplog.at_level(logging.WARNING, "vllm.edits"):
        await follow(server)
    assert await server.ask("polite") == version
    assert "served without trusted signatures" in caplog.text
    assert server.metric("signature_policy", mode="warn") == 1


async def test_off_is_told_at_the_start_and_in_a_gauge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vllm.edits"):
        server = Server(f"memory://{tmp_path}")
    assert "signatures are not checked" in caplog.text
    assert server.metric("signature_policy", mode="off") == 1
    assert server.status()["signatures"] == "off"


async def test_a_history_that_was_wound_back_keeps_what_is_served_and_is_told_once(tmp_path: Path) -> None:
    url, node = str(tmp_path / "store"), tmp_path / "node"
    server = Server(url, node=node)
    first, second = (publish(server.store, version_of("polite")) for _ in range(2))
    await follow(server)
    (tmp_path / "store/tags/polite/prod/00000000000000000002.json").unlink()
    await follow(server)
    assert await server.ask("polite") == second
    restarted = Server(url, node=node)
    await follow(restarted)
    await follow(restarted)
    with pytest.raises(NotFound):
        await restarted.ask("polite")
    assert restarted.metric("bundles_rejected_total", reason="history") == 1
    assert "was cut" in restarted.status()["broken_histories"][0]["error"]
    elsewhere = Server(url)
    await follow(elsewhere)
    assert await elsewhere.ask("polite") == first, "positive control: a node that has seen nothing believes it"


async def test_promotions_over_http_are_signed_by_the_server_or_refused(tmp_path: Path) -> None:
    """Without a key nothing is appended: an entry that nobody would follow helps nobody."""
    (tmp_path / "token").write_text("let-me-in")
    for signer, status in ((None, 403), (ALICE, 200)):
        server = Server(f"memory://{tmp_path}/{status}", trust=trust(), signer=signer)
        version = signed(server).publish(version_of("polite"))
        site = Site(server, tmp_path / "token")
        answer = await site.client.put("/v1/edits/polite", json={"version": version}, headers=TOKEN)
        assert answer.status_code == status, answer.text
        if status == 403:
            assert "edits.signing_key_file" in answer.json()["detail"]
            assert server.store.head("polite") is None
        else:
            assert await server.ask("polite") == version


# -- settings ----------------------------------------------------------------------------------------------------------


def test_a_trust_file_with_a_key_means_require(tmp_path: Path) -> None:
    file = tmp_path / "trust.json"
    TrustPolicy(keys=trust().policy.keys).save(file)
    assert Trust.configured(str(file), None).enforcement is Enforcement.REQUIRE
    assert Trust.configured(str(file), Enforcement.WARN).enforcement is Enforcement.WARN
    assert Trust.configured(None, None).enforcement is Enforcement.OFF


@pytest.mark.parametrize("enforcement", [Enforcement.REQUIRE, Enforcement.WARN])
def test_signatures_without_a_key_are_refused(tmp_path: Path, enforcement: Enforcement) -> None:
    """Nothing could ever be served: that is a mistake, not a policy."""
    (tmp_path / "empty.json").write_text("{}")
    for file in (None, str(tmp_path / "empty.json")):
        with pytest.raises(SettingsError, match=r"no key is trusted.*vllm-edits trust add"):
            Trust.configured(file, enforcement)


async def test_experiments_are_followed_as_promotions_are(tmp_path: Path) -> None:
    """Two promoters are asked for: what one did counts when the other has signed for it; what nobody signed, never."""
    server = Server(f"memory://{tmp_path}", trust=trust(promoters=2))
    arms = [{"name": name, "serves": "base", "weight": 0.5} for name in ("control", "same")]
    log = Experiments(signed(server))
    log.create(Experiment.parse({"name": "tone", "model": "polite", "arms": arms}))
    log.change(ExperimentChange(experiment="tone", operation="start"))
    await follow(server)
    assert server.core.experiments.standings == {}
    assert log.sign("tone", BOB) == [1, 2]
    assert log.sign("tone", BOB) == []
    await follow(server)
    assert server.core.experiments.standings["tone"].status == "running"
    Experiments(signed(server, None)).change(ExperimentChange(experiment="tone", operation="stop"))
    await follow(server)
    assert server.core.experiments.standings["tone"].status == "running"


async def test_an_arm_must_be_signed_by_its_author_and_a_server_without_a_key_withdraws_for_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(f"memory://{tmp_path}", trust=trust())
    good, bad = signed(server).publish(version_of("polite")), signed(server, None).publish(version_of("polite"))
    serves = {"control": "base", "good": f"polite@{good}", "bad": f"polite@{bad}"}
    arms = [{"name": name, "serves": each, "weight": 0.5 if each == "base" else 0.25} for name, each in serves.items()]
    log = Experiments(signed(server))
    log.create(Experiment.parse({"name": "tone", "model": "tone", "arms": arms}))
    log.change(ExperimentChange(experiment="tone", operation="start"))
    await follow(server)
    assert bad not in server.residents()
    (told,) = server.core.experiments.status()
    assert [bool(arm["by_control"]) for arm in told["arms"]] == [False, False, True]
    assert "expected 1 author signature(s), found none" in told["arms"][2]["by_control"]
    experiments = server.core.experiments
    experiments._act("tone", 1, Withdraw("good", Guardrail(metric="error", maximum=0.1), "too many errors"))
    await experiments.measure()
    assert log.standings()[0]["tone"].withdrawn == frozenset()
    assert "Set edits.signing_key_file" in caplog.text
    assert experiments.status()[0]["arms"][1]["by_control"] == "too many errors"
