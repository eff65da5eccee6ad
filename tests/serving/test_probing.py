"""Versions are probed in their slots before the first request; what fails is refused, and what was served goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.bundles import publish
from tests.support.fakes import BASE, Server, version_of, with_probes
from vllm_edits.edit_store import Bundle, LowRank, Strength
from vllm_edits.edit_store.errors import EditsError, InstallRefused, NotFound
from vllm_edits.plugin.serving import probing

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(f"memory://{tmp_path}")


async def test_a_version_that_is_applied_passes_once(server: Server) -> None:
    """In both engines, before its name is switched, and never again while it stays what it is."""
    polite = with_probes(version_of("polite"))
    (version,) = await server.promote(polite)
    assert await server.ask("polite") == version
    assert len([claim for claim in server.engines.claims if claim is not None]) == 4, "two probes, two engines"
    assert server.metric("probes_total", result="passed") == 1
    assert server.metric("probe_share", variant="polite", version=version[:12]) == pytest.approx(1)
    (row,) = server.status()["variants"]
    assert (row["probes"]["result"], row["probes"]["passed"]) == ("passed", True)
    await server.promote(with_probes(version_of("rude")))
    publish(server.store, polite, "again")
    await server.sync()
    assert server.metric("probes_total", result="passed") == 2
    server.check()


@pytest.mark.parametrize("applied", [0.5, 0.0, -1.0])
async def test_a_version_that_is_not_applied_is_refused_with_the_figures(server: Server, applied: float) -> None:
    """Even if only one engine applies it wrongly. The old version keeps serving, and the slot is free again."""
    (old,) = await server.promote(with_probes(version_of("polite")))
    server.engines.applied[1] = applied
    publish(server.store, with_probes(version_of("polite")))
    (swap,) = await server.sync()
    assert swap.failed_in == "install"
    assert f"{applied:.0%} of the change that its author recorded is there" in server.refusal("polite")
    assert server.metric("bundles_rejected_total", reason="probes") == 1
    assert server.metric("probes_total", result="failed") == 1
    assert await server.ask("polite") == old
    server.check()
    assert not await server.sync(), "it is not tried again by itself"
    server.engines.applied[1] = 1.0
    (swap,) = await server.sync(retry_refused=True)
    assert not swap.error
    assert await server.ask("polite") == swap.to_version
    server.check()


async def test_a_first_version_that_fails_is_not_served_at_all(server: Server) -> None:
    server.engines.applied[0] = 0.0
    await server.promote(with_probes(version_of("polite")))
    with pytest.raises(EditsError):
        await server.ask("polite")
    server.check()


async def test_without_probes_it_is_served_with_a_warning_or_refused(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (version,) = await server.promote(version_of("polite"))
    assert await server.ask("polite") == version
    assert "probes none variant=polite" in caplog.text
    assert server.status()["variants"][0]["probes"]["result"] == "none"
    strict = Server(f"memory://{tmp_path}/strict", probes="require")
    await strict.promote(version_of("polite"))
    assert "vllm-edits probes add polite@" in strict.refusal("polite")
    assert strict.core.reconciler.last_swap
    assert strict.core.reconciler.last_swap.failed_in == "verify"
    lax = Server(f"memory://{tmp_path}/lax", probes="off")
    lax.engines.applied[0] = 0.0
    (version,) = await lax.promote(with_probes(version_of("polite")))
    assert await lax.ask("polite") == version
    assert not lax.engines.claims


async def test_what_is_paged_in_by_a_request_is_probed_too(tmp_path: Path) -> None:
    """More versions than slots: those that found no slot at the start are probed by their first request."""
    server = Server(f"memory://{tmp_path}", slots=1)
    first, second = with_probes(version_of("first")), with_probes(version_of("second"))
    publish(server.store, first)
    publish(server.store, second)
    await server.sync()
    (there,) = server.residents()
    absent = "second" if there == first.version else "first"
    server.engines.applied = {0: 0.5, 1: 0.5}
    with pytest.raises(InstallRefused, match=r"50% of the change"):
        await server.ask(absent)
    server.engines.applied = {0: 1.0, 1: 1.0}
    assert await server.ask(absent) in (first.version, second.version)
    server.check()


async def test_other_versions_are_installed_while_one_is_probed(server: Server) -> None:
    await server.promote(version_of("plain"))
    server.engines.answering.clear()
    publish(server.store, with_probes(version_of("slow")))
    swapping = asyncio.create_task(server.sync())
    await _until_asked(server)
    plain = version_of("plain")
    server.store.publish(plain)
    assert await server.ask(f"plain@{plain.version}") == plain.version
    growing = asyncio.create_task(_no_installs(server))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not growing.done(), "a growth waits for the probes"
    server.engines.answering.set()
    await asyncio.wait_for(growing, 5)
    (swap,) = await swapping
    assert not swap.error
    server.check()


async def _until_asked(server: Server) -> None:
    while not server.engines.claims:  # noqa: ASYNC110  the fake has no event for it
        await asyncio.sleep(0)


async def _no_installs(server: Server) -> None:
    async with server.core.slots.no_installs():
        assert all(not resident.closed for resident in server.residents().values())


async def test_an_engine_that_does_not_answer_is_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "ANSWER_SECONDS", 0.05)
    server.engines.answering.clear()
    await server.promote(with_probes(version_of("polite")))
    assert "did not answer a probe within 0.05 s" in server.refusal("polite")
    server.check()
    server.engines.answering.set()
    (swap,) = await server.sync()
    assert not swap.error
    server.check()


async def test_prompts_that_are_too_long_for_the_server_are_left_out(server: Server) -> None:
    bundle = with_probes(version_of("polite"))
    long = bundle.manifest.probes[0].model_copy(update={"prompt": (1, 2, 3, 4)})
    await server.promote(bundle.with_probes([long, bundle.manifest.probes[1]]))
    assert len(server.status()["variants"][0]["probes"]["probes"]) == 1
    await server.promote(version_of("rude").with_probes([long]))
    assert server.metric("probes_total", result="none") == 1


async def test_strengths_have_probes_of_their_own(server: Server) -> None:
    bounded = with_probes(version_of("polite"), 1.0, -1.0, 2.0)
    manifest = bounded.manifest.model_copy(update={"strength": Strength(minimum=-1, maximum=2)})
    await server.promote(Bundle(manifest, bounded.tensor_bytes))
    asked = {claim.strength for claim in server.engines.claims if claim is not None}
    assert asked == {1.0, -1.0, 2.0}


async def test_a_probe_on_demand_takes_a_variant_out_and_lets_it_in_again(server: Server) -> None:
    (version,) = await server.promote(with_probes(version_of("polite")))
    assert (await server.core.probe("polite"))["result"] == "passed"
    server.engines.applied[0] = 0.0
    found = await server.core.probe("polite@prod")
    assert (found["result"], found["version"]) == ("failed", version)
    assert found["share"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(InstallRefused, match="0% of the change"):
        await server.ask("polite")
    server.engines.applied[0] = 1.0
    assert (await server.core.probe("polite"))["result"] == "passed"
    assert await server.ask("polite") == version
    with pytest.raises(NotFound):
        await server.core.probe("tiny")
    server.check()


async def test_what_failed_stays_out_until_its_own_probe_passes(server: Server) -> None:
    """Neither a probe of another variant nor a sync lets it in unprobed."""
    polite, rude = await server.promote(with_probes(version_of("polite")), version_of("rude"))
    server.engines.applied[0] = 0.0
    assert (await server.core.probe("polite"))["result"] == "failed"
    assert (await server.core.probe("rude"))["result"] == "none"
    await server.core.sync()
    with pytest.raises(InstallRefused, match="0% of the change"):
        await server.ask("polite")
    assert await server.ask("rude") == rude
    server.engines.applied[0] = 1.0
    await server.core.sync()
    assert await server.ask("polite") == polite


async def test_in_the_weights_a_probe_on_demand_takes_a_variant_out_too(tmp_path: Path) -> None:
    server = Server(f"memory://{tmp_path}", weights="whole")
    edit = LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=1)
    (version,) = await server.promote(with_probes(version_of("whole", BASE, edit)))
    server.engines.applied[1] = 0.5
    assert (await server.core.probe("whole"))["result"] == "failed"
    with pytest.raises(InstallRefused, match="50% of the change"):
        await server.lease("whole")
    server.engines.applied[1] = 1.0
    await server.core.sync()
    assert await server.ask("whole") == version


async def test_what_is_in_slots_is_probed_again_after_a_growth(tmp_path: Path) -> None:
    server = Server(f"memory://{tmp_path}", grow="auto")
    (version,) = await server.promote(with_probes(version_of("polite")))
    server.engines.applied[1] = 0.5
    low_rank = version_of("wide", BASE, LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=1))
    publish(server.store, low_rank)
    await server.sync()
    await server.core.growth.wait()
    assert await server.ask("wide") == low_rank.version
    with pytest.raises(InstallRefused, match="50% of the change"):
        await server.ask("polite")
    server.engines.applied[1] = 1.0
    await server.core.sync()
    assert await server.ask("polite") == version
    server.check()


async def test_in_the_weights_a_version_that_fails_is_taken_out_again(tmp_path: Path) -> None:
    server = Server(f"memory://{tmp_path}", weights="whole")
    edit = LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=1)
    good = with_probes(version_of("whole", BASE, edit))
    (version,) = await server.promote(good)
    assert server.core.weights.version == version
    assert all(claim and claim[0] == 0 for claim in server.engines.claims), "the base model is not there to be asked"
    server.engines.applied = {0: 0.5, 1: 1.0}
    await server.promote(with_probes(version_of("whole", BASE, edit)))
    assert "50% of the change" in server.refusal("whole")
    assert server.core.weights.version == version
    assert not server.core.weights.error
    assert await server.ask("whole") == version
