"""From the store's heads to what is served: swaps, failures, slots, and what each request gets meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.bundles import publish
from tests.support.fakes import (
    BASE,
    SLOTS,
    Answer,
    Server,
    as_told,
    die,
    lie,
    refuse,
    refuse_afterwards,
    version_of,
)
from tests.support.reconciling import soon, start
from vllm_edits.edit_store import Bundle, Gate, LowRank
from vllm_edits.edit_store.errors import EditsError, NotFound, StoreUnavailable
from vllm_edits.plugin.cli.status_command import show_status

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(f"memory://{tmp_path}")
    yield made
    await made.core.slots.wait_drained()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long."""
    monkeypatch.setattr("vllm_edits.plugin.serving.slots.PATIENCE_SECONDS", 0.05)


# -- following ---------------------------------------------------------------------------------------------------------


async def test_what_is_promoted_is_served_and_the_next_promotion_follows(server: Server) -> None:
    """Its phases are timed, its result counted, and the status tells all of it."""
    first, second = version_of("polite"), version_of("polite")
    await server.promote(first)
    assert await server.ask("polite") == first.version
    await server.promote(second)
    assert await server.ask("polite") == second.version
    swap = server.core.reconciler.last_swap
    assert swap is not None
    assert (swap.from_version, swap.to_version, swap.error) == (first.version, second.version, "")
    assert swap.seconds.keys() >= {"fetch", "verify", "install"}
    assert (server.metric("swaps_total", result="ok"), server.metric("installs_total", result="ok")) == (2, 2)
    assert server.metric("swap_seconds_count", phase="install") == 2
    (row,) = server.status()["variants"]
    assert (row["version"], row["sequence"], row["resident"], row["refused"]) == (second.version, 2, True, "")
    assert list(server.residents()) == [second.version]
    server.check()


async def test_a_look_at_an_unchanged_store_does_nothing(server: Server) -> None:
    await server.promote(version_of("polite"))
    calls = len(server.workers.calls)
    assert await server.sync() == []
    assert len(server.workers.calls) == calls


async def test_a_rollback_is_followed_like_a_promotion(server: Server) -> None:
    first, second = await server.promote(version_of("polite"), version_of("polite"))
    assert await server.ask("polite") == second
    server.store.rollback("polite")
    await server.sync()
    assert await server.ask("polite") == first
    assert server.status()["variants"][0]["sequence"] == 3
    server.check()


async def test_a_withdrawn_variant_is_not_found_and_ends_with_its_last_request(server: Server) -> None:
    """Whoever began before ends on the version; its other tag goes on; a rollback brings it back."""
    (version,) = await server.promote(version_of("polite"))
    (beta,) = await server.promote(version_of("polite"), tag="beta")
    running = await start(server, "polite")
    server.store.withdraw("polite")
    (swap,) = await server.sync()
    assert (swap.from_version, swap.to_version, swap.error) == (version, None, "")
    with pytest.raises(NotFound, match="polite@beta"):
        await server.lease("polite")
    assert version in server.residents()
    assert server.metric("variant_info", variant="polite", version=version[:12]) == 0
    running.end()
    await server.core.slots.wait_drained()
    assert list(server.residents()) == [beta]
    assert await server.ask("polite@beta") == beta
    server.store.withdraw("polite", tag="beta")
    server.store.rollback("polite")
    await server.sync()
    assert server.core.reconciler.table.names() == ["polite"]
    assert await server.ask("polite") == version
    assert server.metric("variant_info", variant="polite", version=version[:12]) == 1
    server.check()


async def test_a_server_that_starts_after_a_withdrawal_serves_nothing_of_it(server: Server, tmp_path: Path) -> None:
    await server.promote(version_of("polite"), version_of("kind"))
    server.store.withdraw("polite")
    late = Server(f"memory://{tmp_path}")
    await late.sync()
    assert late.core.reconciler.table.names() == ["kind"]


async def test_promoting_what_is_served_already_moves_nothing(server: Server) -> None:
    (version,) = await server.promote(version_of("polite"))
    server.store.promote(f"polite@{version}")
    calls = len(server.workers.calls)
    await server.sync()
    assert len(server.workers.calls) == calls
    assert server.status()["variants"][0]["sequence"] == 2


async def test_tags_and_versions_can_be_named(server: Server) -> None:
    """`variant@tag`, and any published version by its first digits, promoted or not."""
    prod, beta, draft = version_of("polite"), version_of("polite"), version_of("polite")
    await server.promote(prod)
    await server.promote(beta, tag="beta")
    publish(server.store, draft, tag=None)
    assert await server.ask("polite@prod") == await server.ask(f"polite@{prod.version[:6]}") == prod.version
    assert await server.ask("polite@beta") == beta.version
    assert await server.ask(f"polite@{draft.version}") == draft.version
    for unknown in ("polite@ffffff", "polite@nightly", "polit"):
        with pytest.raises(NotFound):
            await server.ask(unknown)
    server.check()


async def test_base_requests_use_slot_0_and_no_other(server: Server) -> None:
    """Under every name of the base, and with none; they hold no slot and call no worker."""
    await server.promote(version_of("polite"))
    calls = len(server.workers.calls)
    for name in ("tiny", "small", ""):
        lease = await server.lease(name)
        assert (lease.slot, lease.choice.variant, lease.choice.version) == (0, "base", None)
        with lease.hold():
            assert server.status()["base"]["in_flight"] == 1
            assert server.metric("requests_in_flight", variant="base") == 1
    assert server.status()["base"]["in_flight"] == server.metric("requests_in_flight", variant="base") == 0
    assert len(server.workers.calls) == calls


async def test_a_variant_named_like_the_base_is_refused(server: Server) -> None:
    """Whoever asks for that variant would be answered by the base model in silence."""
    await server.promote(version_of("tiny"))
    assert [refused["name"] for refused in server.status()["refused"]] == ["tiny"]


# -- failed swaps ------------------------------------------------------------------------------------------------------


OTHER_MODEL = BASE.model_copy(update={"name": "other", "files": {"model.safetensors": "b" * 64}})
UNRESERVED = LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=1)


@pytest.mark.parametrize(
    ("bad", "overrides", "code", "said", "phase"),
    [
        (lambda: version_of("polite", OTHER_MODEL), {}, "base_model", "built for other", "verify"),
        (lambda: version_of("polite", edit=UNRESERVED), {}, "capacity", "edits.reserve", "verify"),
        (lambda: version_of("polite"), {"edits_stage": refuse}, "not_finite", "holds NaN", "stage"),
        (lambda: version_of("polite"), {"edits_staged": refuse}, "not_finite", "holds NaN", "stage"),
        (lambda: version_of("polite"), {"edits_install": refuse}, "not_finite", "holds NaN", "install"),
        (lambda: version_of("polite"), {"edits_install": refuse_afterwards}, "error", "CUDA error", "install"),
        (lambda: version_of("polite"), {"edits_install": lie}, "error", "workers disagree", "install"),
        pytest.param(
            lambda: version_of("polite"),
            {"edits_install": die},
            "error",
            "did not answer",
            "install",
        ),
    ],
    ids=["base", "capacity", "stage", "staged", "install", "half-installed", "disagree", "raise"],
)
async def test_a_failed_swap_keeps_the_old_version_serving(
    server: Server, bad: Callable[[], Bundle], overrides: dict[str, Any], code: str, *, said: str, phase: str
) -> None:
    """Reason and phase are in the status, the reason in a metric; others are followed, a mended version swaps in."""
    good, other, refused = version_of("polite"), version_of("zealous"), bad()
    await server.promote(good)
    in_flight = await start(server, "polite")
    server.workers.overrides, calls = overrides, len(server.workers.calls)
    await server.promote(refused)
    server.workers.overrides = {}
    assert (len(server.workers.calls) == calls) == (not overrides)  # what can be seen here is refused here
    assert await server.ask("polite") == good.version
    server.workers.step(in_flight.lease)
    server.check()
    assert list(server.residents()) == [good.version]
    status = server.status()
    assert said in status["last_error"]
    assert said in status["last_swap"]["error"]
    assert status["last_swap"]["failed_in"] == phase
    assert said in status["variants"][0]["refused"]
    assert [row["sequence"] for row in status["refused"]] == [2]
    assert status["variants"][0]["version"] == good.version
    assert server.metric("swaps_total", result="error" if code == "error" else "refused") == 1
    assert server.metric("bundles_rejected_total", reason=code) == 1
    in_flight.end()
    mended = version_of("polite")
    await server.promote(mended, other)
    assert (await server.ask("polite"), await server.ask("zealous")) == (mended.version, other.version)
    assert server.status()["refused"] == []
    server.check()


async def test_one_bad_variant_does_not_keep_the_others_from_being_followed(server: Server) -> None:
    good = [version_of("anxious"), version_of("zealous")]
    await server.promote(good[0], version_of("middle", OTHER_MODEL), good[1])
    assert [await server.ask(name) for name in ("anxious", "zealous")] == [bundle.version for bundle in good]
    with pytest.raises(NotFound):
        await server.ask("middle")
    assert "built for other" in server.refusal("middle")


async def test_a_worker_that_raises_does_not_keep_other_tags_from_being_followed(server: Server) -> None:
    (good,) = await server.promote(version_of("anxious"))
    server.workers.overrides = {
        "edits_stage": lambda _, act: die(0, act) if server.workers.calls[-1][1] == bad else act()
    }
    bad, other = publish(server.store, version_of("anxious")), publish(server.store, version_of("zealous"))
    await server.sync()
    assert await server.ask("anxious") == good
    assert await server.ask("zealous") == other


async def test_a_refused_version_is_tried_again_only_when_asked(server: Server) -> None:
    """Each look would refuse it anew; the operator who mended the cause asks for it."""
    server.workers.overrides = {"edits_install": refuse}
    (version,) = await server.promote(version_of("polite"))
    server.workers.overrides = {}
    assert await server.sync() == []
    (swap,) = await server.sync(retry_refused=True)
    assert swap.error == ""
    assert await server.ask("polite") == version


async def test_a_trouble_that_passes_is_tried_again_by_itself(server: Server) -> None:
    """The heads could be read but the bundle could not: nobody has to come and ask again."""
    old, new = version_of("polite"), version_of("polite")
    await server.promote(old)
    publish(server.store, new)
    server.backend.down = "blobs/"
    await server.sync()
    assert await server.ask("polite") == old.version
    server.backend.down = None
    await server.sync()
    assert await server.ask("polite") == new.version


async def test_a_refused_first_version_is_not_served_by_the_base(server: Server) -> None:
    """The name is unknown, and why is known."""
    await server.promote(version_of("polite", OTHER_MODEL))
    with pytest.raises(NotFound):
        await server.lease("polite")
    assert "built for other" in server.refusal("polite") == server.refusal("polite@prod")
    assert server.refusal("other") == ""


async def test_a_slot_that_could_not_be_cleared_is_not_used_again(server: Server) -> None:
    """Neither after a failed install nor when a retired version is drained: what it holds is not known."""
    (old,) = await server.promote(version_of("polite"))
    server.workers.overrides = {"edits_clear": die}
    await server.promote(version_of("polite"))
    server.workers.overrides = {}
    assert old not in server.residents()
    assert server.core.slots.residency.used == 2  # the new version, and the slot that is out of use
    for name in ("anxious", "zealous"):
        await server.promote(version_of(name))
        await server.ask(name)
    assert 1 not in {one.slot for one in server.residents().values()}


async def test_a_slot_that_a_worker_refuses_to_clear_is_not_used_again(server: Server) -> None:
    server.workers.overrides = {"edits_install": lie, "edits_clear": refuse}
    await server.promote(version_of("polite"))
    server.workers.overrides = {}
    assert server.core.slots.residency.used == 1
    (version,) = await server.promote(version_of("polite"))
    assert await server.ask("polite") == version


async def test_a_version_whose_slot_was_lost_can_still_be_installed(server: Server) -> None:
    """The slot is out of use, the version is not: asked again, it goes into another one."""
    server.workers.overrides = {"edits_install": lie, "edits_clear": die}
    (version,) = await server.promote(version_of("polite"))
    server.workers.overrides = {}
    await server.sync(retry_refused=True)
    assert await server.ask("polite") == version
    assert server.core.slots.residency.used == 2


async def test_the_gauge_of_used_slots_follows_a_failed_install(server: Server) -> None:
    for number in range(SLOTS):
        await server.promote(version_of(f"variant-{number}"))
    server.workers.overrides = {"edits_install": refuse}
    await server.promote(version_of("variant-0"))
    server.check()


# -- requests in flight ------------------------------------------------------------------------------------------------


async def test_requests_end_on_the_version_they_began_with(server: Server) -> None:
    """Through two swaps; an old slot is cleared after its last lease has ended, and not before."""
    versions = await server.promote(version_of("polite"))
    flights = [await start(server, "polite")]
    for _ in range(2):
        versions += await server.promote(version_of("polite"))
        flights.append(await start(server, "polite"))
    second_reader = await start(server, f"polite@{versions[0]}")
    assert [flight.lease.choice.version for flight in flights] == versions
    server.workers.step(*(flight.lease for flight in flights), second_reader.lease)
    assert [server.residents()[version].retired for version in versions] == [True, True, False]
    flights[1].end()
    await server.core.slots.wait_drained()
    assert versions[1] not in server.residents()
    flights[0].end()
    await server.core.slots.wait_drained()
    server.workers.step(second_reader.lease, flights[2].lease)
    assert server.residents()[versions[0]].users == 1
    second_reader.end()
    await server.core.slots.wait_drained()
    assert list(server.residents()) == [versions[2]]
    flights[2].end()
    server.check()


async def test_a_version_that_returns_while_it_drains_stays(server: Server) -> None:
    """Rolled back to while an old request still reads it: no second copy, no clearing under its feet."""
    first = await server.promote(version_of("polite"))
    old_reader = await start(server, "polite")
    second = await server.promote(version_of("polite"))
    server.store.rollback("polite")
    await server.sync()
    old_reader.end()
    await server.core.slots.wait_drained()
    assert list(server.residents()) == first
    assert await server.ask("polite") == first[0]
    assert server.metric("installs_total", result="ok") == 2
    assert second[0] not in server.residents()
    server.check()


async def test_a_version_that_another_tag_still_promotes_is_not_retired(server: Server) -> None:
    (shared,) = await server.promote(version_of("polite"))
    server.store.promote(f"polite@{shared}", tag="beta")
    (new,) = await server.promote(version_of("polite"))
    assert not server.residents()[shared].retired
    assert (await server.ask("polite"), await server.ask("polite@beta")) == (new, shared)


async def test_which_version_a_variant_serves_is_a_metric(server: Server) -> None:
    first, second = [await server.promote(version_of("polite")) for _ in range(2)]
    assert server.metric("variant_info", variant="polite", version=second[0][:12]) == 1
    assert server.metric("variant_info", variant="polite", version=first[0][:12]) == 0


async def test_a_version_that_one_of_two_tags_leaves_is_still_served(server: Server) -> None:
    (shared,) = await server.promote(version_of("polite"))
    server.store.promote(f"polite@{shared}", tag="beta")
    await server.promote(version_of("polite"))
    assert server.metric("variant_info", variant="polite", version=shared[:12]) == 1


async def test_draining_is_a_timed_phase(server: Server) -> None:
    await server.promote(version_of("polite"))
    await server.promote(version_of("polite"))
    assert server.metric("swap_seconds_count", phase="drain") == 1


async def test_requests_are_not_held_up_by_a_swap_that_takes_its_time(server: Server) -> None:
    """While workers read the new version, the old one answers; the switch comes when all are ready."""
    (old,) = await server.promote(version_of("polite"))
    new = publish(server.store, version_of("polite"))
    server.workers.staging_ready.clear()
    swap = asyncio.create_task(server.sync())
    assert not await soon(swap)
    assert await server.ask("polite") == old
    server.workers.staging_ready.set()
    await swap
    assert await server.ask("polite") == new


async def test_a_released_lease_cannot_be_held_again_but_renewed(server: Server) -> None:
    """Work that outlives its request goes on with the same version, though another is promoted by then."""
    (old,) = await server.promote(version_of("polite"))
    lease = await server.lease("polite")
    with lease.hold():
        pass
    (new,) = await server.promote(version_of("polite"))
    with pytest.raises(RuntimeError, match="lease on 'polite' has ended"), lease.hold():
        pass
    renewed = await server.core.renew(lease.choice)
    with renewed.hold():
        server.workers.step(renewed)
        assert renewed.choice.version == old
    assert await server.ask("polite") == new
    server.check()


# -- more variants than slots ------------------------------------------------------------------------------------------


async def promote_many(server: Server, number: int) -> list[str]:
    names = [f"variant-{index}" for index in range(number)]
    await server.promote(*(version_of(name) for name in names))
    return names


async def test_variants_beyond_the_slots_are_paged_in_by_least_recent_use(server: Server) -> None:
    """The first three have slots; a fourth takes the place of the one used longest ago; all answer."""
    names = await promote_many(server, 5)
    serves = {row["name"]: row["version"] for row in server.status()["variants"]}
    assert [row["resident"] for row in server.status()["variants"]] == [True, True, True, False, False]
    for name in ("variant-1", "variant-0", "variant-3"):
        assert await server.ask(name) == serves[name]
    assert list(server.residents()) == [serves[name] for name in ("variant-1", "variant-0", "variant-3")]
    for name in [*names, *reversed(names)]:
        assert await server.ask(name) == serves[name]
        server.check()


async def test_a_request_waits_while_every_slot_is_in_use(server: Server) -> None:
    """It neither fails nor evicts, it does not hold up requests for what is there, and goes on when one ends."""
    names = await promote_many(server, 4)
    flights = [await start(server, name) for name in names[:3]]
    waiting = asyncio.create_task(server.ask(names[3]))
    assert not await soon(waiting)
    server.workers.step(*(flight.lease for flight in flights))
    await asyncio.wait_for(server.ask(names[0]), 10)
    flights[1].end()
    assert await asyncio.wait_for(waiting, 10) is not None
    assert flights[1].lease.choice.version not in server.residents()
    server.workers.step(flights[0].lease, flights[2].lease)
    for flight in (flights[0], flights[2]):
        flight.end()
    server.check()


async def test_a_router_is_told_which_variants_run_and_which_wait(server: Server) -> None:
    """The names that clients use; one that runs and waits runs. When nobody is there, none is told. Which ones need no
    slot any more is told beside it."""

    def series(name: str) -> list[dict[str, str]]:
        return [sample.labels for metric in server.registry.collect() if metric.name.endswith(name)
                for sample in metric.samples]  # fmt: skip

    def told() -> tuple[str, str]:
        (labels,) = series("variants_info")
        assert labels["max_lora"] == str(SLOTS)
        return labels["running_lora_adapters"], labels["waiting_lora_adapters"]

    def loaded() -> list[str]:
        return [labels["adapter_name"] for labels in series("variant_loaded")]

    names = await promote_many(server, SLOTS + 1)
    with ExitStack() as held:
        leases = [await server.lease(name) for name in names[:SLOTS]]
        for lease in leases:
            held.enter_context(lease.hold())
        assert told() == (",".join(sorted(names[:SLOTS])), "")
        waiting = asyncio.create_task(server.lease(names[SLOTS]))
        assert not await soon(waiting)
        assert told() == (",".join(sorted(names[:SLOTS])), names[SLOTS])
        assert loaded() == sorted(names[:SLOTS])
    with (await waiting).hold():
        assert told() == (names[SLOTS], "")
        assert names[SLOTS] in loaded()
        assert len(loaded()) == SLOTS
    assert told() == ("", "")


async def test_a_swap_waits_for_a_slot_too(server: Server) -> None:
    """With every slot in use the old version serves on until a request ends."""
    names = await promote_many(server, 3)
    flights = [await start(server, name) for name in names]
    new = publish(server.store, version_of(names[0]))
    swap = asyncio.create_task(server.sync())
    assert not await soon(swap)
    assert await server.ask(names[0]) != new
    flights[2].end()
    await asyncio.wait_for(swap, 10)
    assert new in server.residents()
    assert await server.ask(names[0]) == new
    for flight in flights[:2]:
        flight.end()
    await server.core.slots.wait_drained()
    server.check()


@pytest.mark.usefixtures("impatient")
async def test_a_swap_does_not_wait_for_ever(server: Server) -> None:
    """While no slot becomes free it is followed without one: who asks from then on waits for the new version."""
    names = await promote_many(server, 3)
    flights = [await start(server, name) for name in names]
    old = flights[0].lease.choice.version
    new = publish(server.store, version_of(names[0]))
    (swap,) = await asyncio.wait_for(server.sync(), 10)
    assert (swap.error, swap.to_version) == ("", new)
    assert server.core.reconciler.table.promoted[names[0]]["prod"] == new
    asked = asyncio.create_task(server.ask(names[0]))
    assert not await soon(asked)
    server.workers.step(*(flight.lease for flight in flights))  # on the versions that they began with
    assert flights[0].lease.choice.version == old
    flights[0].end()  # of all versions in use, the one that nothing names any more makes way
    assert await asyncio.wait_for(asked, 10) == new
    assert old not in server.residents()
    for flight in flights[1:]:
        flight.end()
    await server.core.slots.wait_drained()
    server.check()


@pytest.mark.usefixtures("impatient")
async def test_a_swap_that_fails_while_it_is_installed_is_no_swap(server: Server) -> None:
    """However long the install takes: only the wait for a slot has an end."""
    names = await promote_many(server, 3)
    serves = await server.ask(names[0])
    publish(server.store, version_of(names[0]))
    server.workers.gates["edits_install"] = asyncio.Event()
    server.workers.overrides = {"edits_install": refuse}
    following = asyncio.create_task(server.sync())
    await asyncio.sleep(0.2)
    server.workers.gates["edits_install"].set()
    (swap,) = await asyncio.wait_for(following, 10)
    assert "holds NaN" in swap.error
    assert await server.ask(names[0]) == serves


class AlwaysInUse:
    """A variant that is never without a request: the next one begins before the one before has ended."""

    def __init__(self, server: Server, name: str) -> None:
        self.answered = 0
        self._over = asyncio.Event()
        self._task = asyncio.create_task(self._run(server, name))

    async def _run(self, server: Server, name: str) -> None:
        flight = await start(server, name)
        while not self._over.is_set():
            coming = asyncio.create_task(start(server, name))
            await soon(coming)
            flight.end()
            flight = await coming
            server.workers.step(flight.lease)
            self.answered += 1
            await asyncio.sleep(0.005)
        flight.end()

    async def end(self) -> None:
        self._over.set()
        await asyncio.wait_for(self._task, 10)


@pytest.mark.usefixtures("impatient")
async def test_a_version_that_waits_is_let_in_though_the_others_are_always_in_use(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them makes way, and comes back; who waits is told of."""
    names = await promote_many(server, 4)
    hot = [AlwaysInUse(server, name) for name in names[:3]]
    await asyncio.sleep(0.02)
    asked = asyncio.create_task(server.ask(names[3]))
    await asyncio.sleep(0.01)
    (waiting,) = server.status()["slots"]["waiting"]
    assert (waiting["requests"], server.metric("requests_waiting")) == (1, 1)
    show_status(server.status())
    assert (
        "1 requests wait for a slot, the first for 0.0 s. If that happens often, raise edits.slots"
        in capsys.readouterr().out
    )
    assert await asyncio.wait_for(asked, 10) is not None
    for _ in range(4):
        assert await asyncio.wait_for(server.ask(names[3]), 10) is not None
    for one in hot:
        await one.end()
    assert min(one.answered for one in hot) > 5
    assert (server.status()["slots"]["waiting"], server.metric("requests_waiting")) == ([], 0)
    server.check()


@pytest.mark.usefixtures("impatient")
async def test_a_request_without_end_keeps_nobody_waiting_without_end(server: Server) -> None:
    """Its version has the fewest users and so makes way first; as it is not idle in time, others do too."""
    names = await promote_many(server, 4)
    endless = await start(server, names[0])
    hot = [AlwaysInUse(server, name) for name in names[1:3]]
    await asyncio.sleep(0.02)
    assert await asyncio.wait_for(server.ask(names[3]), 10) is not None
    assert await asyncio.wait_for(server.ask(names[0]), 10) == endless.lease.choice.version  # and it is lent again
    for one in hot:
        await one.end()
    endless.end()
    server.check()


async def test_many_requests_for_one_absent_version_install_it_once(server: Server) -> None:
    names = await promote_many(server, 4)
    installs = server.metric("installs_total", result="ok")
    answers = await asyncio.gather(*(server.ask(names[3]) for _ in range(20)))
    assert len(set(answers)) == 1
    assert server.metric("installs_total", result="ok") == installs + 1


async def test_an_install_that_fails_once_fails_one_request(server: Server) -> None:
    """The others that wait for the same version try again."""
    names = await promote_many(server, 4)
    first_install = iter([refuse] * len(server.workers.workers))

    def once(number: int, act: Callable[[], Answer]) -> Answer:
        return next(first_install, as_told)(number, act)

    server.workers.overrides = {"edits_install": once}
    answers = await asyncio.gather(*(server.ask(names[3]) for _ in range(5)), return_exceptions=True)
    assert [isinstance(answer, EditsError) for answer in answers] == [True, False, False, False, False]
    assert len(set(answers[1:])) == 1
    server.check()


async def test_a_cancelled_waiter_leaves_nothing_behind(server: Server) -> None:
    """The client went away while its request waited for a slot: the next one gets it."""
    names = await promote_many(server, 5)
    flights = [await start(server, name) for name in names[:3]]
    gone, next_one = asyncio.create_task(server.ask(names[3])), asyncio.create_task(server.ask(names[4]))
    assert not await soon(gone)
    gone.cancel()
    with suppress(asyncio.CancelledError):
        await gone
    assert not await soon(next_one)
    for flight in flights:
        flight.end()
    assert await asyncio.wait_for(next_one, 10) is not None
    assert server.metric("requests_in_flight", variant=names[3]) == 0
    server.check()


async def test_a_request_cancelled_in_the_middle_of_an_install_leaves_nothing_behind(server: Server) -> None:
    names = await promote_many(server, 4)
    serves = {row["name"]: row["version"] for row in server.status()["variants"]}
    server.workers.gates["edits_install"] = asyncio.Event()
    gone = asyncio.create_task(server.ask(names[3]))
    assert not await soon(gone)
    gone.cancel()
    server.workers.gates["edits_install"].set()
    with suppress(asyncio.CancelledError):
        await gone
    installs = server.metric("installs_total", result="ok")
    assert await server.ask(names[3]) == serves[names[3]]
    assert server.metric("installs_total", result="ok") == installs + 1  # that one, finished for whoever comes next
    for name in names:
        assert await server.ask(name) == serves[name]
    server.check()


async def test_a_request_cancelled_while_its_version_is_read_does_not_stop_the_others(server: Server) -> None:
    await server.promote(version_of("polite"))
    version = publish(server.store, version_of("polite"), None)
    server.workers.staging_ready.clear()
    gone, other = (asyncio.create_task(server.ask(f"polite@{version}")) for _ in range(2))
    assert not await soon(gone)
    gone.cancel()
    with suppress(asyncio.CancelledError):
        await gone
    server.workers.staging_ready.set()
    assert await asyncio.wait_for(other, 10) == version
    assert len([call for call in server.workers.calls if call == ("edits_stage", version)]) == 1
    server.check()


async def test_a_reading_that_fails_after_all_have_left_is_told_and_tried_again(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    await server.promote(version_of("polite"))
    version = publish(server.store, version_of("polite"), None)
    server.workers.staging_ready.clear()
    gone = asyncio.create_task(server.ask(f"polite@{version}"))
    assert not await soon(gone)
    gone.cancel()
    with suppress(asyncio.CancelledError):
        await gone
    server.workers.overrides = {"edits_staged": refuse}
    while "could not prepare version" not in caplog.text:  # noqa: ASYNC110  the reconciler decides when
        await asyncio.sleep(0.01)
    server.workers.overrides = {}
    server.workers.staging_ready.set()
    assert await server.ask(f"polite@{version}") == version
    server.check()


async def test_a_version_that_is_slow_to_read_holds_up_nobody_else(server: Server) -> None:
    """Neither what is on the device nor what is ready in the workers' memory."""
    names = await promote_many(server, 4)
    slow = publish(server.store, version_of(names[0]), None)
    server.workers.staging_ready.clear()
    waiting = asyncio.create_task(server.ask(f"{names[0]}@{slow}"))
    assert not await soon(waiting)
    for name in (names[3], *names):
        assert await asyncio.wait_for(server.ask(name), 10) is not None
    server.workers.staging_ready.set()
    assert await asyncio.wait_for(waiting, 10) == slow
    found = {where: server.metric("version_lookups_total", found=where) for where in ("device", "host", "store")}
    assert (found["store"], sum(found.values())) == (1, 6)
    assert found["host"] >= 2


async def test_a_version_that_a_worker_dropped_is_read_again(server: Server) -> None:
    """One worker evicted a prepared version: its word is enough, and the slots are equal on all in the end."""
    names = await promote_many(server, 4)
    server.workers.workers[1].ready.clear()
    assert await server.ask(names[3]) is not None
    server.check()


async def test_a_version_that_cannot_be_paged_in_is_refused_and_the_others_serve_on(server: Server) -> None:
    names = await promote_many(server, 4)
    server.workers.overrides = {"edits_install": refuse}
    with pytest.raises(EditsError, match="holds NaN"):
        await server.ask(names[3])
    server.workers.overrides = {}
    for name in names:
        assert await server.ask(name) is not None
    server.check()


@pytest.mark.parametrize("seed", range(4))
async def test_under_a_random_load_every_request_is_served_by_one_version_that_stays(tmp_path: Path, seed: int) -> None:
    """Promotions, rollbacks and refusals while requests come and go, with fewer slots than live versions."""
    server, chance = Server(f"memory://{tmp_path}", slots=2), random.Random(seed)
    names = await promote_many(server, 4)
    answered: list[str | None] = []

    async def request() -> None:
        lease = await server.lease(chance.choice([*names, "tiny"]))
        with lease.hold():
            for _ in range(chance.randrange(6)):
                server.workers.step(lease)
                await asyncio.sleep(0)
            answered.append(lease.choice.version)

    async def operator() -> None:
        for _ in range(25):
            name = chance.choice(names)
            server.workers.overrides = {"edits_install": chance.choice([refuse, as_told])}
            with suppress(NotFound):
                server.store.rollback(name) if chance.random() < 0.3 else publish(server.store, version_of(name))
            await server.sync()

    async def crowd() -> None:
        for _ in range(60):
            requests = [asyncio.create_task(request()) for _ in range(3)]
            ended = await asyncio.gather(*requests, return_exceptions=True)
            assert not [one for one in ended if one and not isinstance(one, EditsError)]  # an install may be refused

    await asyncio.wait_for(asyncio.gather(operator(), crowd()), 60)
    await server.core.slots.wait_drained()
    assert len(answered) > 50
    assert server.status()["base"]["in_flight"] == 0
    assert all(one.users == 0 for one in server.residents().values())
    assert server.workers.held == {one.slot: version for version, one in server.residents().items()}
    server.workers.overrides = {}
    for name in names:
        assert await server.ask(name) is not None


# -- the store goes away -----------------------------------------------------------------------------------------------


async def test_with_the_store_down_what_is_installed_serves_on(server: Server) -> None:
    """A metric and the status say so, and the next look after it has come back follows by itself."""
    old, new = version_of("polite"), version_of("polite")
    await server.promote(old)
    publish(server.store, new)
    server.backend.down = ""
    assert await server.sync() == []
    assert await server.ask("polite") == await server.ask("polite@prod") == old.version
    assert server.metric("store_errors_total") == 1
    assert "the network is down" in server.status()["last_error"]
    server.backend.down = None
    await server.sync()
    assert await server.ask("polite") == new.version


async def test_with_the_store_down_a_served_version_can_be_named(server: Server) -> None:
    (version,) = await server.promote(version_of("polite"))
    server.backend.down = ""
    assert await server.ask(f"polite@{version}") == version


async def test_with_the_store_down_a_version_that_is_not_there_is_refused(server: Server) -> None:
    """Never another one in its place. What the workers have in memory needs no store."""
    names = await promote_many(server, 5)
    server.backend.down = ""
    with pytest.raises(StoreUnavailable):
        await server.ask("variant-0@abcdef")
    assert await server.ask(names[4]) is not None
    for worker in server.workers.workers:
        worker.ready.clear()
    with pytest.raises(EditsError):
        await server.ask(names[3])
    assert await server.ask(names[4]) is not None
    await server.core.slots.wait_drained()
    server.check()


async def test_polling_outlives_a_store_that_is_down(server: Server) -> None:
    """The loop goes on, the age of what it knows grows, and it follows when the store is back."""
    await server.promote(version_of("polite"))
    polling = asyncio.create_task(server.core.reconciler.follow(0.01))
    server.backend.down = ""
    while server.metric("store_errors_total") < 3:  # noqa: ASYNC110  a metric has no event
        await asyncio.sleep(0.01)
    assert server.metric("store_head_age_seconds") > 0.01
    server.backend.down = None
    new = publish(server.store, version_of("polite"))
    while await server.ask("polite") != new:  # noqa: ASYNC110  a client can only ask
        await asyncio.sleep(0.01)
    polling.cancel()


async def test_firings_that_cannot_be_read_are_counted_at_the_next_look(server: Server) -> None:
    """And are no fault of the store."""
    gate = Gate(site="layers.1.resid", reads="layers.1.resid", rank=1)
    (version,) = await server.promote(version_of("polite", edit=gate))

    def told(times: int, share: int = 0) -> Answer:
        return {"rank": share, "firings": [[version, 10 * times, {"layers.1.resid": times}]]}

    async def counted() -> float:
        await server.sync()
        await server.core.slots.read_firings()
        labels = {"variant": "polite", "version": version[:12]}
        firings = server.metric("gate_firings_total", **labels, edit="layers.1.resid")
        assert server.metric("gate_tokens_total", **labels) == 10 * firings
        return firings

    server.workers.overrides["edits_firings"] = lambda number, _: told(2 + number)
    assert await counted() == 2 + 3, "two engines, each with tokens of its own"
    server.workers.overrides["edits_firings"] = lambda _, __: {"error": "the engine is gone"}
    assert await counted() == 5
    server.workers.overrides["edits_firings"] = lambda number, _: told(7 + number)
    assert await counted() == 7 + 8
    server.workers.overrides["edits_firings"] = lambda number, _: told(9, share=number)
    assert await counted() == 9 + 8, "two workers that divide a model see the same tokens"
    assert server.metric("store_errors_total") == 0


async def test_a_corrupt_history_keeps_what_is_served(server: Server) -> None:
    (version,) = await server.promote(version_of("polite"))
    server.backend.inner.put(f"tags/polite/prod/{2:020d}.json", b"{}")
    assert await server.sync() == []
    assert "cannot be read" in server.core.reconciler.last_error
    assert await server.ask("polite") == version


async def test_the_status_is_json_also_before_the_store_was_ever_read(server: Server) -> None:
    """Strict JSON: an answer with Infinity in it is no answer."""
    server.backend.down = ""
    await server.sync()
    json.dumps(server.status(), allow_nan=False)
