"""A variant in the engine's weights: who is served meanwhile, when they change, and what is left when that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from tests.support.bundles import publish
from tests.support.experiments import created
from tests.support.fakes import BASE, WIDTHS, Answer, Server, version_of
from tests.support.reconciling import InFlight, soon, start
from vllm_edits.edit_store import Bundle, Gate, LowRank, Provenance, Strength
from vllm_edits.edit_store.errors import EditsError, InstallRefused, NotFound, RequestRefused
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange
from vllm_edits.plugin.cli.status_command import show_status
from vllm_edits.plugin.vllm_host.addressing import cache_salt

pytestmark = pytest.mark.anyio
EDIT = LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(f"memory://{tmp_path}", weights="polite")
    yield made
    await made.core.slots.wait_drained()


def version(name: str = "polite") -> Bundle:
    return version_of(name, edit=EDIT)


def in_weights(server: Server) -> str | None:
    """What the workers' weights hold: all the same, and what the API process believes."""
    held = {worker.weights.version for worker in server.workers.workers}
    assert held == {server.status()["weights"]["version"]} == {server.core.reconciler.table.in_weights}
    return held.pop()


def bits(server: Server) -> list[bytes]:
    return [each.detach().numpy().tobytes() for worker in server.workers.workers for each in worker.model.parameters()]


async def refused(server: Server, model: str) -> str:
    with pytest.raises(NotFound) as refusal:
        await server.lease(model)
    return str(refusal.value)


# -- who is served -----------------------------------------------------------------------------------------------------


async def test_what_is_in_the_weights_is_served_alone_and_without_a_slot(server: Server) -> None:
    """By its name, its tag and its version; the base model and all others are refused with the reason, until later."""
    loaded = bits(server)
    (kind,) = await server.promote(version_of("kind"))
    assert await server.ask("tiny") is None
    (polite,) = await server.promote(version())
    assert in_weights(server) == polite
    assert bits(server) != loaded
    for name in ("polite", "polite@prod", f"polite@{polite[:8]}"):
        lease = await server.lease(name)
        with lease.hold():
            assert (lease.slot, lease.choice.version, lease.choice.in_weights) == (0, polite, True)
            server.workers.step(lease)
    for name in ("tiny", "", "kind", f"kind@{kind[:8]}"):
        assert f"version {polite[:12]} is in the engine's weights" in await refused(server, name)
    assert server.core.reconciler.table.names() == ["polite"]
    server.store.withdraw("polite")
    await server.sync()
    assert in_weights(server) is None
    assert bits(server) == loaded
    assert (await server.ask("tiny"), await server.ask("kind")) == (None, kind)
    assert "polite" in await refused(server, "polite")


async def test_another_tag_of_the_variant_is_served_per_request(server: Server) -> None:
    """And refused like any other while the weights hold a version."""
    (beta,) = await server.promote(version_of("polite"), tag="beta")
    assert await server.ask("polite@beta") == beta
    await server.promote(version())
    assert "is in the engine's weights" in await refused(server, "polite@beta")


async def test_a_worker_answers_only_who_wants_what_its_weights_hold(server: Server) -> None:
    """The base model and slots before, the version after; a claim on anything else stops the step."""
    (kind,) = await server.promote(version_of("kind"))
    slot = server.residents()[kind].slot
    (polite,) = await server.promote(version())
    edited = server.workers.workers[0].edited
    assert edited.slot_of([0, polite, 1.0]) == 0
    for claim in (None, [0, "f" * 64, 1.0], [slot, kind, 1.0]):
        with pytest.raises(RuntimeError, match="refusing to answer it with other"):
            edited.slot_of(claim)


async def test_the_operator_sees_what_the_weights_hold(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """In `vllm-edits status`, also after a withdrawal and in error."""

    def shown() -> str:
        show_status(server.status())
        return capsys.readouterr().out

    (polite,) = await server.promote(version())
    assert f"the weights serve polite@prod, and now hold {polite[:14]}" in shown()
    assert "in weights" in shown()
    server.store.withdraw("polite")
    await server.sync()
    told = shown()
    assert "the weights serve polite@prod, and now hold the base model" in told
    assert "last swap polite@prod to none at" in told
    server.workers.overrides["edits_put_weights"] = fails_on(0, after=False)
    server.store.rollback("polite")
    await server.sync()
    assert "the content of the weights is unknown, so no request is answered: a worker failed" in shown()


async def test_strength_is_fixed_in_the_weights(tmp_path: Path) -> None:
    server = Server(f"memory://{tmp_path}", weights="polite")
    strength = Strength(minimum=0, maximum=2, default=0.5)
    fields = {field: np.ones(shape) for field, shape in EDIT.shapes(WIDTHS).items()}
    provenance = Provenance(tool="tests", method="ones")
    await server.promote(Bundle.create("polite", BASE, [(EDIT, fields)], provenance, strength=strength))
    for asked in (None, 0.5):
        assert (await server.lease("polite", asked)).choice.strength == 0.5
    with pytest.raises(RequestRefused, match=r"with the strength 0\.5, but the request asks for 1"):
        await server.lease("polite", 1.0)


# -- what is cached ----------------------------------------------------------------------------------------------------


async def test_blocks_computed_with_other_weights_are_never_shared(server: Server) -> None:
    """Of the base model before and after, and of a version that comes back; nor forged by a caller's salt."""
    salts = list[str | None]()

    async def note(model: str) -> None:
        lease = await server.lease(model)
        with lease.hold():
            salts.extend([cache_salt(lease.choice, None), cache_salt(lease.choice, "mine")])

    await note("tiny")
    first, second = version(), version()
    for bundle in (first, second, first):
        publish(server.store, bundle)
        await server.sync()
        await note("polite")
    server.store.withdraw("polite")
    await server.sync()
    await note("tiny")
    assert salts[0] is None
    assert len(set(salts)) == len(salts) == 10


# -- when they change --------------------------------------------------------------------------------------------------


async def test_running_requests_end_on_the_weights_they_began_with(server: Server) -> None:
    """The exchange waits for them; whoever comes meanwhile waits for the exchange, and gets the new version."""
    (first,) = await server.promote(version())
    running = await start(server, "polite")
    second = publish(server.store, version())
    sync = asyncio.ensure_future(server.sync())
    assert not await soon(sync)
    assert in_weights(server) == first
    late = asyncio.ensure_future(start(server, "polite"))
    assert not await soon(late)
    server.workers.step(running.lease)
    running.end()
    (swap,) = await sync
    assert (swap.error, swap.seconds.keys()) == ("", {"fetch", "verify", "stage", "wait", "install", "switch"})
    newcomer = await late
    server.workers.step(newcomer.lease)
    assert newcomer.lease.choice.version == second == in_weights(server)
    newcomer.end()


async def test_a_request_that_waits_for_a_slot_is_waited_for(server: Server) -> None:
    """The weights do not change between its choice and its slot."""
    await server.promote(*(version_of(name) for name in ("a", "b", "c", "d")))
    with ExitStack() as held:
        for name in ("a", "b", "c"):
            held.enter_context((await server.lease(name)).hold())
        waiting = asyncio.ensure_future(start(server, "d"))
        assert not await soon(waiting)
        publish(server.store, version())
        sync = asyncio.ensure_future(server.sync())
        assert not await soon(sync)
    fourth = await waiting
    server.workers.step(fourth.lease)
    assert not await soon(sync)
    fourth.end()
    assert not (await sync)[0].error


async def test_patience_ends_and_the_next_look_tries_again(tmp_path: Path) -> None:
    server = Server(f"memory://{tmp_path}", weights="polite", weights_patience_seconds=0.05)
    (first,) = await server.promote(version())
    running = await start(server, "polite")
    second = publish(server.store, version())
    (swap,) = await server.sync()
    assert "1 request(s) were still running after 0.05 s" in swap.error
    assert "edits.weights_running" in swap.error
    assert await server.ask("polite") == first == in_weights(server)
    server.workers.step(running.lease)
    running.end()
    assert [each.error for each in await server.sync()] == [""]
    assert await server.ask("polite") == second == in_weights(server)


async def test_for_one_entry_the_door_is_held_shut_once(tmp_path: Path) -> None:
    """A long request must not shut everybody out at every look. Whoever promotes again asks to wait again."""
    server = Server(f"memory://{tmp_path}", weights="polite", weights_patience_seconds=0.05)
    await server.promote(version())
    running = await start(server, "polite")
    second = publish(server.store, version())
    assert "still running" in (await server.sync())[0].error
    server.core.weights._patience = 1000
    for _ in range(2):
        assert "still running at this read of the store" in (await asyncio.wait_for(server.sync(), 10))[0].error
    server.store.promote(f"polite@{second}")
    sync = asyncio.ensure_future(server.sync())
    assert not await soon(sync)
    running.end()
    await sync
    assert in_weights(server) == second


async def test_running_requests_can_be_aborted(tmp_path: Path) -> None:
    server = Server(f"memory://{tmp_path}", weights="polite", weights_running="abort")
    await server.promote(version())
    assert not server.workers.aborted.is_set(), "nobody was there"
    running = await start(server, "polite")
    second = publish(server.store, version())
    sync = asyncio.ensure_future(server.sync())
    await server.workers.aborted.wait()
    assert not await soon(sync), "until the engine has let go of them"
    running.end()
    await sync
    assert in_weights(server) == second


async def test_running_requests_can_be_kept(tmp_path: Path) -> None:
    """They go on with the new weights, as the operator wants it; once they are gone their claim is false."""
    server = Server(f"memory://{tmp_path}", weights="polite", weights_running="keep")
    base = await start(server, "tiny")
    (first,) = await server.promote(version())
    one = await start(server, "polite")
    (second,) = await server.promote(version())
    assert in_weights(server) == second
    server.workers.step(base.lease, one.lease)
    assert one.lease.choice.version == first
    for request in (base, one):
        request.end()


async def test_work_that_outlived_its_request_is_not_done_with_other_weights(server: Server) -> None:
    """A background response renews its lease: on the same weights, or not at all."""
    await server.promote(version())
    lease = await server.lease("polite")
    with lease.hold():
        pass
    renewed = InFlight(await server.core.renew(lease.choice))
    renewed.end()
    await server.promote(version())
    with pytest.raises(InstallRefused, match="were replaced since 'polite' was chosen"):
        await server.core.renew(lease.choice)


# -- what can fail -----------------------------------------------------------------------------------------------------


async def test_a_version_without_a_weight_form_is_refused_and_the_old_one_serves(server: Server) -> None:
    (first,) = await server.promote(version())
    before = bits(server)
    gate = version_of("polite", edit=Gate(site="layers.1.mlp.out", reads="layers.1.mlp.in", rank=1))
    await server.promote(gate)
    assert "a weight is the same for all. Serve it per request" in server.core.reconciler.last_error
    assert bits(server) == before
    assert await server.ask("polite") == first == in_weights(server)
    assert server.metric("swaps_total", result="refused") == 1
    calls = len(server.workers.calls)
    await server.sync()
    assert len(server.workers.calls) == calls, "what breaks a rule stays refused"


def fails_on(number: int, *, after: bool) -> Callable[[int, Callable[[], Answer]], Answer]:
    """One of the workers fails, before or after it did what was asked."""

    def override(worker: int, act: Callable[[], Answer]) -> Answer:
        if worker != number:
            return act()
        if after:
            act()
        return {"error": "planted"}

    return override


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("served", [False, True])
async def test_a_worker_that_fails_at_the_exchange_leaves_everything_as_it_was(
    server: Server, worker: int, after: bool, served: bool
) -> None:
    """With the loaded model or a version in the weights; nothing is left half, and the next look succeeds."""
    first = (await server.promote(version()))[0] if served else None
    before, calls = bits(server), [0]
    fail = fails_on(worker, after=after)

    def once(number: int, act: Callable[[], Answer]) -> Answer:
        calls[0] += 1
        return fail(number, act) if calls[0] <= 2 else act()

    server.workers.overrides["edits_put_weights"] = once
    second = publish(server.store, version())
    (swap,) = await server.sync()
    assert "planted" in swap.error
    assert bits(server) == before
    assert in_weights(server) == first
    assert await server.ask("polite" if served else "tiny") == first
    assert [each.error for each in await server.sync()] == [""]
    assert await server.ask("polite") == second == in_weights(server)


async def test_workers_that_disagree_are_put_back(server: Server) -> None:
    def lies(number: int, act: Callable[[], Answer]) -> Answer:
        return {**act(), "digest": str(number)} if len(server.workers.calls) < 5 else act()

    server.workers.overrides["edits_put_weights"] = lies
    before = bits(server)
    await server.promote(version())
    assert "disagree on the content of their weights" in server.core.reconciler.last_error
    assert bits(server) == before


async def test_weights_that_nobody_vouches_for_answer_nothing(server: Server) -> None:
    """The exchange fails, and putting back fails: every request is refused, until a look mends it."""
    (first,) = await server.promote(version())
    server.workers.overrides["edits_put_weights"] = fails_on(1, after=False)
    second = publish(server.store, version())
    await server.sync()
    assert "planted" in server.status()["weights"]["error"]
    for name in ("polite", "tiny"):
        with pytest.raises(
            EditsError, match="no request is answered, because the content of the engine's weights is unknown"
        ):
            await server.lease(name)
    del server.workers.overrides["edits_put_weights"]
    server.store.rollback("polite")
    assert [swap.error for swap in await server.sync()] == [""]
    assert await server.ask("polite") == first == in_weights(server)
    server.store.promote(f"polite@{second}")
    await server.sync()
    assert await server.ask("polite") == second


async def test_a_change_that_is_cancelled_while_it_is_undone_leaves_a_doubt(server: Server) -> None:
    """The workers may hold either by then: nothing is answered before the next look has made sure."""
    (first,) = await server.promote(version())
    server.workers.gates["edits_put_weights"] = gate = asyncio.Event()
    publish(server.store, version())
    sync = asyncio.ensure_future(server.sync())
    await soon(sync)
    exchange = server.core.reconciler._exchanging
    assert exchange is not None
    for _ in range(2):  # in the exchange, then in putting back
        assert not await soon(exchange)
        exchange.cancel()
    with suppress(asyncio.CancelledError):
        await sync
    with pytest.raises(
        EditsError, match="no request is answered, because the content of the engine's weights is unknown"
    ):
        await server.lease("polite")
    gate.set()
    server.store.rollback("polite")
    await server.sync()
    assert await server.ask("polite") == first == in_weights(server)


async def test_requests_that_cannot_be_aborted_keep_the_weights(tmp_path: Path) -> None:
    server = Server(f"memory://{tmp_path}", weights="polite", weights_running="abort")
    (first,) = await server.promote(version())
    running = await start(server, "polite")

    async def fails() -> None:
        raise ConnectionError("planted")

    server.core.weights._abort_all = fails
    publish(server.store, version())
    (swap,) = await server.sync()
    assert "could not be aborted, so the weights were not changed: ConnectionError('planted')" in swap.error
    server.workers.step(running.lease)
    running.end()
    assert await server.ask("polite") == first == in_weights(server)


async def test_a_store_that_is_down_changes_nothing(server: Server) -> None:
    (first,) = await server.promote(version())
    server.backend.down = ""
    await server.sync()
    assert await server.ask("polite") == first == in_weights(server)


async def test_nothing_else_waits_behind_a_change_of_the_weights(server: Server) -> None:
    """While it waits for a request that runs, another variant is followed, and an experiment begins."""
    (first,) = await server.promote(version())
    running = await start(server, "polite")
    publish(server.store, version())
    changing = asyncio.ensure_future(server.sync())
    assert not await soon(changing)
    other = publish(server.store, version_of("calm"))
    experiments = Experiments(server.store)
    experiments.change(created())
    experiments.change(ExperimentChange(experiment="tone", operation="start"))
    (swap,) = await asyncio.wait_for(server.core.reconciler.sync(), 5)
    assert (swap.variant, swap.error) == ("calm", "")
    assert server.core.reconciler.table.promoted["calm"]["prod"] == other
    assert server.core.experiments.standings["tone"].serving
    assert in_weights(server) == first, "the change still waits"
    running.end()
    (changed,) = await changing
    assert (changed.variant, changed.error) == ("polite", "")
    assert in_weights(server) == changed.to_version != first
