"""The reservation grows for a promoted version that does not fit, and everything serves meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.bundles import publish
from tests.support.fakes import BASE, WIDTHS, Answer, Server, die, refuse, refuse_afterwards, version_of
from vllm_edits.edit_store import Bundle, Gate, LowRank, Offset, Provenance, Scope, WeightDelta
from vllm_edits.edit_store.errors import BundleRefused, NotFound, SettingsError
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange
from vllm_edits.plugin.cli.status_command import show_status
from vllm_edits.plugin.serving.coordinator import CapacityWish, TagChange
from vllm_edits.plugin.serving.growth import PHASES

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


LOW_RANK = LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=2)
FIRST = Offset(site="layers.2.resid", scope=Scope(first=3))
ENTRY = {"kind": "offset", "site": "layers.*.resid"}
BYTES = {"edits_grow": "planned", "edits_grow_poll": "compiling", "edits_grow_switch": "switching"}


def server_with(path: Path, grow: str, **options: Any) -> Server:
    return Server(f"memory://{path}", grow=grow, **options)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    return server_with(tmp_path, "auto")


def still_compiling(_number: int, _act: Callable[[], Answer]) -> Answer:
    return {"phase": "compiling", "pause": 0.0}


async def grown(server: Server) -> dict[str, Any]:
    """The last growth, when none runs any more."""
    await server.core.growth.wait()
    last = server.status()["reservation"]["last"]
    return dict(last)


async def test_a_version_that_does_not_fit_is_served_when_the_reservation_has_grown(server: Server) -> None:
    (old,) = await server.promote(version_of("polite"))
    lease = await server.lease("polite")
    with lease.hold():
        bytes_before = server.metric("reserved_bytes")
        (new,) = await server.promote(version_of("polite", edit=LOW_RANK))
        assert await server.ask("polite") == old, "the old version serves meanwhile"
        assert server.status()["reservation"]["growing"]
        last = await grown(server)
        server.workers.step(lease)  # its version is still in its slot
    assert await server.ask("polite") == new
    assert last["error"] == ""
    assert last["phase"] == "done"
    assert set(last["seconds"]) == {"planned", "compiling", "waiting", "switching"}
    assert last["longest_pause_seconds"] == pytest.approx(0.002)
    assert last["wanted_by"] == [f"version {new[:12]} of 'polite'"]
    assert server.metric("growths_total", result="ok") == 1
    assert {server.metric("growth_seconds_count", phase=phase) for phase in last["seconds"]} == {1}
    assert server.metric("growth_seconds_sum", phase="waiting") == last["seconds"]["waiting"]
    assert server.metric("growth_longest_pause_seconds") == last["longest_pause_seconds"]
    assert server.metric("reserved_bytes") > bytes_before
    assert server.metric("swaps_total", result="error") == server.metric("swaps_total", result="refused") == 0
    assert server.status()["refused"] == []
    assert all(worker.edited.reservation == server.core.growth.reservation for worker in server.workers.workers)
    server.check()


async def test_one_growth_serves_all_that_wait_and_fits_stay_fits(server: Server) -> None:
    versions = await server.promote(version_of("polite", edit=LOW_RANK), version_of("first", edit=FIRST))
    await grown(server)
    assert [await server.ask("polite"), await server.ask("first")] == versions
    grows = [call for call in server.workers.calls if call[0] == "edits_grow"]
    assert len(grows) == 1
    await server.promote(version_of("polite", edit=LOW_RANK))
    assert [call for call in server.workers.calls if call[0] == "edits_grow"] == grows, "it fits now"
    server.check()


async def test_rollbacks_withdrawals_and_other_swaps_do_not_wait(server: Server) -> None:
    first, second = await server.promote(version_of("polite")), await server.promote(version_of("polite"))
    await server.promote(version_of("zealous"))
    server.workers.overrides["edits_grow_poll"] = still_compiling
    publish(server.store, version_of("grown", edit=LOW_RANK))
    await server.sync()
    assert server.status()["reservation"]["growing"]
    server.store.rollback("polite")
    server.store.withdraw("zealous")
    (other,) = await server.promote(version_of("another"))
    assert await server.ask("polite") == first[0] != second[0]
    assert await server.ask("another") == other
    with pytest.raises(NotFound):
        await server.lease("zealous")
    server.workers.overrides = {}
    assert (await grown(server))["error"] == ""
    assert await server.ask("grown")
    server.check()


async def test_a_growth_that_is_about_to_begin_is_told_too(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """For a moment it waits for other versions of the same poll; the growth before it is not told again."""
    for version in (version_of("polite", edit=LOW_RANK), version_of("first", edit=FIRST)):
        (published,) = await server.promote(version)
        show_status(server.status())
        told = capsys.readouterr().out
        name = version.manifest.name
        assert f"the reservation is about to grow for version {published[:12]} of '{name}'" in told
        assert "the reservation grows for" not in told
        await grown(server)
        show_status(server.status())
        assert "grow for" not in capsys.readouterr().out


async def test_the_operator_sees_a_growth_that_runs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """In `vllm-edits status`, and its phase in a metric. The version that waits is told with its reason."""

    def shown() -> str:
        show_status(server.status())
        return capsys.readouterr().out

    server.workers.overrides["edits_grow_poll"] = still_compiling
    (version,) = await server.promote(version_of("polite", edit=LOW_RANK))
    while server.metric("growth_phase", phase="compiling") != 1:  # noqa: ASYNC110  a phase has no event
        await asyncio.sleep(0.001)
    told = shown()
    assert f"the reservation grows for version {version[:12]} of 'polite', phase compiling" in told
    assert "waits polite@prod: " in told
    assert [row["awaits_capacity"] for row in server.status()["refused"]] == [True]
    assert "is growing for it" in told
    phases = {phase: server.metric("growth_phase", phase=phase) for phase in PHASES}
    assert phases == {"planned": 0, "compiling": 1, "waiting": 0, "switching": 0}
    server.workers.overrides = {}
    assert (await grown(server))["error"] == ""
    assert "the reservation grows" not in shown()
    assert "refused" not in shown()
    assert "waits" not in shown()
    assert {server.metric("growth_phase", phase=phase) for phase in PHASES} == {0}


@pytest.mark.parametrize("broken", [refuse, refuse_afterwards, die])
@pytest.mark.parametrize("method", list(BYTES))
async def test_a_growth_that_fails_leaves_the_old_state_serving(server: Server, method: str, broken: Any) -> None:
    (old,) = await server.promote(version_of("polite"))
    before = [worker.edited for worker in server.workers.workers]
    reservation, lease = server.core.growth.reservation, await server.lease("polite")
    server.workers.overrides = {method: broken}
    with lease.hold():
        (new,) = await server.promote(version_of("polite", edit=LOW_RANK))
        last = await grown(server)
        server.workers.step(lease)
    assert last["error"]
    assert last["phase"] == BYTES[method]
    assert await server.ask("polite") == old
    assert [worker.edited for worker in server.workers.workers] == before
    assert server.core.growth.reservation == reservation
    assert f"in phase {BYTES[method]}" in server.refusal("polite")
    assert server.metric("growths_total", result="error") == 1
    server.check()
    # It is not tried again by itself, but when asked for.
    calls = len(server.workers.calls)
    await server.sync()
    assert len(server.workers.calls) == calls
    server.workers.overrides = {}
    await server.sync(retry_refused=True)
    assert (await grown(server))["error"] == ""
    assert await server.ask("polite") == new
    server.check()


async def test_of_several_wishes_only_the_one_that_cannot_be_is_refused(tmp_path: Path) -> None:
    server = server_with(tmp_path, "auto")
    room = server.workers.workers[0].edited.bytes_reserved
    server.core.growth._limit_bytes = 8 * room
    big = [LowRank(site=f"layers.{layer}.mlp.out", reads=f"layers.{layer}.mlp.h", rank=8) for layer in (0, 1, 2)]
    wide = version_of("wide", edit=big[0])
    for name, edit in (("wide-a", big[1]), ("narrow", FIRST)):
        publish(server.store, version_of(name, edit=edit))
    server.core.growth._limit_bytes = room + 2000
    publish(server.store, wide)
    await server.sync()
    await grown(server)
    await server.sync()
    await grown(server)
    assert await server.ask("narrow")
    assert "bytes are allowed" in server.refusal("wide") + server.refusal("wide-a")
    server.check()


@pytest.mark.parametrize("grow", ["ask", "never"])
async def test_without_leave_it_is_refused_with_what_to_do(tmp_path: Path, grow: str) -> None:
    server = server_with(tmp_path, grow)
    (old,) = await server.promote(version_of("polite"))
    calls = len(server.workers.calls)
    (new,) = await server.promote(version_of("polite", edit=LOW_RANK))
    said = server.refusal("polite")
    assert f"edits.grow is {grow}" in said
    assert f"vllm-edits reserve grow polite@{new[:12]} --url URL" in said
    assert "edits.reserve" in said
    assert len(server.workers.calls) == calls
    assert await server.ask("polite") == old
    assert not server.status()["reservation"]["growing"]


async def test_no_growth_begins_for_a_version_that_it_would_not_help(server: Server) -> None:
    """An edit that is served from the weights only is refused, and the advice is not to set what is set."""
    delta = WeightDelta(site="layers.1.mlp.out", reads="layers.1.mlp.h")
    await server.promote(version_of("polite", edit=delta))
    assert "which is not done per request" in server.refusal("polite")
    both = [(edit, {field: np.zeros(shape) for field, shape in edit.shapes(WIDTHS).items()}) for edit in (delta, FIRST)]
    publish(server.store, Bundle.create("both", BASE, both, Provenance(tool="tests", method="zero")))
    await server.sync()
    assert "edits.reserve" in server.refusal("both")
    assert "edits.grow" not in server.refusal("polite") + server.refusal("both")
    assert not server.status()["reservation"]["growing"]


async def test_an_operator_can_grow_ahead_of_a_promotion(tmp_path: Path) -> None:
    server = server_with(tmp_path, "ask")
    version = server.store.publish(version_of("polite", edit=LOW_RANK))
    answer = await server.core.grow(CapacityWish([f"polite@{version}"], [ENTRY]))
    assert answer["growing"]
    last = await grown(server)
    assert last["error"] == ""
    assert last["wanted_by"] == [f"polite@{version}, explicit entries"]
    assert not (await server.core.grow(CapacityWish([f"polite@{version}"])))["growing"], "it fits already"
    server.store.promote(f"polite@{version}")
    await server.sync()
    assert await server.ask("polite") == version
    with pytest.raises(SettingsError, match="fits no site"):
        await server.core.grow(CapacityWish(reserve=[{"kind": "offset", "site": "layers.9.resid"}]))
    with pytest.raises(SettingsError, match="unknown setting"):
        await server.core.grow(CapacityWish(reserve=[{"kind": "offset", "sight": "layers.1.resid"}]))
    with pytest.raises(NotFound):
        await server.core.grow(CapacityWish(["nothing"]))


async def test_an_operator_can_grow_by_a_profile(tmp_path: Path) -> None:
    """Entries of it that fit no site of the model are left out."""
    server = server_with(tmp_path, "ask")
    assert (await server.core.grow(CapacityWish(reserve=["standard", ENTRY], scopes=7)))["growing"]
    last = await grown(server)
    assert (last["error"], last["wanted_by"]) == ("", ["standard, explicit entries, 7 scopes"])
    reservation = server.core.growth.reservation
    assert {"scale", "low_rank", "subspace_filter", "offset", "gate"} == {g.kind for g in reservation.capacities}
    assert reservation.scopes == 7
    assert not (await server.core.grow(CapacityWish(reserve=["standard"])))["growing"], "it fits already"
    with pytest.raises(SettingsError, match="Name the versions"):
        await server.core.grow(CapacityWish(reserve=["promoted"]))
    with pytest.raises(SettingsError, match="unknown profile 'standart'"):
        await server.core.grow(CapacityWish(reserve=["standart", {"kind": "offset"}]))


async def test_a_growth_has_the_headroom_of_the_settings(tmp_path: Path) -> None:
    server = server_with(tmp_path, "auto", headroom=2.0)
    await server.promote(version_of("polite", edit=LOW_RANK))
    await grown(server)
    ranks = {group.kind: capacity.rank for group, capacity in server.core.growth.reservation.capacities.items()}
    assert ranks["low_rank"] == 2 * LOW_RANK.rank
    assert await server.ask("polite")


async def test_what_was_refused_before_is_served_after_an_operator_has_grown_for_it(tmp_path: Path) -> None:
    """Also the version of an arm. Without a growth, it is not tried again by itself."""
    server = server_with(tmp_path, "ask")
    (version,) = await server.promote(version_of("polite", edit=LOW_RANK))
    treatment = server.store.publish(version_of("arm", edit=FIRST))
    arms = [{"name": "control", "serves": "base"}, {"name": "treated", "serves": f"arm@{treatment}"}]
    log = Experiments(server.store)
    log.create(Experiment.parse({"name": "trial", "model": "arm", "arms": [{**arm, "weight": 0.5} for arm in arms]}))
    log.change(ExperimentChange(experiment="trial", operation="start"))
    await server.sync()
    calls = len(server.workers.calls)
    await server.sync()
    assert len(server.workers.calls) == calls
    assert "edits.grow is ask" in server.refusal("polite")
    assert "edits.grow is ask" in server.status()["experiments"][0]["arms"][1]["by_control"]
    await server.core.grow(CapacityWish(["polite", f"arm@{treatment}"]))
    assert (await grown(server))["error"] == ""
    assert await server.ask("polite") == version
    assert server.status()["experiments"][0]["arms"][1]["by_control"] == ""
    server.check()


async def test_never_means_never(tmp_path: Path) -> None:
    server = server_with(tmp_path, "never")
    with pytest.raises(BundleRefused, match=r"edits\.grow is never"):
        await server.core.grow(CapacityWish(reserve=[ENTRY]))


async def test_a_promotion_over_http_says_that_it_waits(server: Server) -> None:
    version = server.store.publish(version_of("polite", edit=LOW_RANK))
    answer = await server.core.change(TagChange("promote", "polite", version=version))
    assert answer["swap"]["awaits_capacity"]
    assert "is growing for it" in answer["swap"]["error"]
    await grown(server)
    assert await server.ask("polite") == version


async def test_a_client_cannot_make_the_server_grow(server: Server) -> None:
    """A request that names a version that is not promoted gets the refusal."""
    await server.promote(version_of("polite"))
    version = server.store.publish(version_of("polite", edit=LOW_RANK))
    with pytest.raises(BundleRefused, match=r"edits\.reserve"):
        await server.lease(f"polite@{version}")
    assert not server.status()["reservation"]["growing"]
    assert not [call for call in server.workers.calls if call[0] == "edits_grow"]


async def test_a_version_installed_while_it_compiles_is_carried_too(server: Server) -> None:
    await server.promote(version_of("polite"))
    server.workers.overrides["edits_grow_poll"] = still_compiling
    publish(server.store, version_of("grown", edit=LOW_RANK))
    await server.sync()
    (gate,) = await server.promote(
        version_of("gated", edit=Gate(site="layers.1.resid", reads="layers.1.resid", rank=1))
    )
    server.workers.overrides = {}
    assert (await grown(server))["error"] == ""
    assert await server.ask("gated") == gate
    server.check()
