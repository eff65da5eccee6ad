"""One API server process asks another, which owns the slots: what travels, and what happens when one of them ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import Server, version_of
from vllm_edits.edit_store import Strength, private_folder
from vllm_edits.edit_store.errors import (
    BundleRefused,
    EditsError,
    InstallRefused,
    NotFound,
    NotServed,
    Reason,
    RequestRefused,
    SettingsError,
    UnsupportedHost,
)
from vllm_edits.edit_store.scope import Scope
from vllm_edits.plugin.experiments.records import Exposure, Record, Said, ShadowRecord
from vllm_edits.plugin.experiments.routing import Assignment
from vllm_edits.plugin.request import Request
from vllm_edits.plugin.serving import coordinator_socket
from vllm_edits.plugin.serving.coordinator import CapacityWish, Coordinator, NotFollowed, Served, TagChange
from vllm_edits.plugin.serving.coordinator_socket import (
    CoordinatorServer,
    FencedWorkers,
    RemoteCoordinator,
    socket_path,
)
from vllm_edits.plugin.serving.lease import Lease
from vllm_edits.plugin.serving.variants import Choice
from vllm_edits.plugin.version_info import VersionInfo

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Processes:
    """A server's first process, and others that ask it."""

    def __init__(self, path: Path, coordinator: Coordinator) -> None:
        self.path = path
        self.coordinator = coordinator
        self.listening = CoordinatorServer(path)
        self.reached = 0
        self.may_reach = asyncio.Event()
        self.may_reach.set()

    async def another(self) -> RemoteCoordinator:
        async def reach_engine() -> None:
            self.reached += 1
            await self.may_reach.wait()

        remote = RemoteCoordinator(self.path, reach_engine)
        await remote.connect()
        return remote


@asynccontextmanager
async def processes(path: Path, coordinator: Coordinator) -> AsyncIterator[Processes]:
    made = Processes(path / "owner.sock", coordinator)
    await made.listening.start(coordinator)
    yield made
    await made.listening.close()


@pytest.fixture
async def server(tmp_path: Path) -> Server:
    return Server(f"memory://{tmp_path}", grow="ask")


class Says:
    """An owner that answers what it is told to."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[Any] = []
        self.released = 0

    async def _said(self, *asked: Any) -> Any:
        self.asked.append(asked)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def _released(self, _: Lease) -> None:
        self.released += 1

    async def lease(self, request: Request) -> Lease:
        return Lease(await self._said(request), 3, self._released)

    async def renew(self, choice: Choice | None) -> Lease:
        return Lease(await self._said(choice), 2, self._released)

    async def served(self) -> Any:
        return await self._said()

    async def status(self) -> Any:
        return await self._said()

    async def sync(self) -> Any:
        return await self._said()

    async def change(self, change: TagChange) -> Any:
        return await self._said(change)

    async def grow(self, wish: CapacityWish) -> Any:
        return await self._said(wish)

    def record(self, record: Record) -> None:
        self.asked.append(record)

    async def feedback(self, request: str, metric: str, value: float) -> Any:
        return await self._said(request, metric, value)


INFO = VersionInfo(Strength(minimum=0, maximum=2, default=0.5), bound_to_prompt=True, tail=4, name="polite", fires=True)
ASSIGNED = Assignment("tone", 2, "milder", "hash", "0" * 16, "user")
CHOICE = Choice(
    "polite@prod",
    "polite",
    "a" * 64,
    0.5,
    INFO,
    in_weights=False,
    epoch=3,
    assignment=ASSIGNED,
    feedback_token="h",
    shadow="b",
)
REQUEST = Request("polite@prod", ("0.5",), False, "bob", {"x-edits-unit": "ann"}, "key", "request")


@pytest.mark.parametrize("choice", [CHOICE, Choice("base", "base", None), replace(CHOICE, in_weights=True)])
async def test_a_lease_arrives_as_it_was_given_and_is_given_back_once(choice: Choice, tmp_path: Path) -> None:
    async with processes(tmp_path, says := Says(choice)) as made:
        remote = await made.another()
        lease = await remote.lease(REQUEST)
        assert (lease.choice, lease.slot, says.asked) == (choice, 3, [(REQUEST,)])
        assert says.released == 0
        with lease.hold():
            pass
        renewed = await remote.renew(lease.choice)
        assert (renewed.choice, renewed.slot, says.asked[1]) == (choice, 2, (choice,))
        assert says.released == 1
        assert (await remote.renew(None)).choice == choice
        assert says.asked[2] == (None,)
        await remote.close()


@pytest.mark.parametrize(
    "error",
    [
        NotFound("no such model"),
        NotServed("it is refused"),
        SettingsError("no such kind"),
        RequestRefused("too strong"),
        NotFollowed("the old version serves"),
        BundleRefused("version a", [Reason("digest", "is another"), Reason("scope", "is none")]),
        InstallRefused("version b", [Reason("capacity", "no room")]),
        EditsError("the store is away"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_refusal_is_the_same_in_every_process(error: EditsError, tmp_path: Path) -> None:
    async with processes(tmp_path, Says(error)) as made:
        remote = await made.another()
        for ask in (
            remote.lease(Request("x")), remote.status(), remote.change(TagChange("withdraw", "polite")),
            remote.grow(CapacityWish(["polite"])),
        ):  # fmt: skip
            with pytest.raises(EditsError) as told:
                await ask
            assert type(told.value) is type(error)
            assert str(told.value) == str(error)
            assert getattr(told.value, "reasons", ()) == getattr(error, "reasons", ())
        await remote.close()


async def test_a_fault_of_the_owner_is_told_and_it_goes_on(tmp_path: Path) -> None:
    async with processes(tmp_path, says := Says(ZeroDivisionError("oh"))) as made:
        remote = await made.another()
        with pytest.raises(EditsError, match=r"status failed: ZeroDivisionError\('oh'\)"):
            await remote.status()
        says.answer = {"slots": 1}
        assert await remote.status() == {"slots": 1}
        await remote.close()


async def test_everything_that_is_asked_of_an_owner_can_be(server: Server, tmp_path: Path) -> None:
    (first,) = await server.promote(version_of("polite"))
    second = server.store.publish(version_of("polite"))
    async with processes(tmp_path, local := server.core) as made:
        remote = await made.another()
        assert await remote.served() == await local.served() == Served([("polite", "polite", first)], base=True)
        assert (await remote.status())["variants"] == (await local.status())["variants"]
        changed = await remote.change(TagChange("promote", "polite", version=second, reason="better", actor="http:me"))
        assert (changed["entry"]["version"], changed["entry"]["actor"]) == (second, "http:me")
        assert changed["swap"]["from_version"] == first
        await remote.change(TagChange("rollback", "polite"))
        await remote.change(TagChange("withdraw", "polite"))
        assert (await remote.grow(CapacityWish([f"polite@{first}"])))["wanted"] == f"polite@{first}"
        assert (await remote.sync())["swaps"] == []
        assert (await remote.served()).variants == []
        await remote.close()
    await server.core.slots.wait_drained()


async def test_what_requests_of_experiments_came_to_is_told_and_asked(tmp_path: Path) -> None:
    """Records arrive as they were; feedback is answered."""
    now = datetime.now(UTC)
    exposure = Exposure(
        at=now, request="h", experiment="tone", phase=1, arm="milder", version="base", unit="0" * 16, source="user",
        chosen="hash", outcome="ok", prompt_tokens=1, output_tokens=2, seconds=0.5, first_token_seconds=None,
        seconds_per_token=None, empty=False, looping=False, corrupted=False,
    )  # fmt: skip
    pair = ShadowRecord(
        at=now, request="h", experiment="", versions=("a", "base"), differs_at=3,
        said=(Said(token=1, logprob=-0.5), None), tokens=(4, 3), finish=("stop", "length"), seconds=(0.1, 0.2),
    )  # fmt: skip
    async with processes(tmp_path, says := Says({"counted": True})) as made:
        remote = await made.another()
        remote.record(exposure)
        remote.record(pair)
        assert await remote.feedback("h", "thumbs", 1.0) == {"counted": True}
        assert says.asked == [exposure, pair, ("h", "thumbs", 1.0)]
        await remote.close()


async def test_a_wish_for_capacity_arrives_as_it_was_made(tmp_path: Path) -> None:
    wish = CapacityWish(["polite@a", "kind"], [{"kind": "offset", "site": "layers.*.resid", "features": ["dual"]}], 3)
    async with processes(tmp_path, says := Says({"growing": True})) as made:
        remote = await made.another()
        for each in (wish, CapacityWish()):
            assert await remote.grow(each) == {"growing": True}
        assert [CapacityWish(list(a.versions), list(a.reserve), a.scopes) for (a,) in says.asked] == [
            wish, CapacityWish([], []),
        ]  # fmt: skip
        await remote.close()


async def test_who_stops_waiting_for_a_slot_holds_nothing(server: Server, tmp_path: Path) -> None:
    """Three slots, all in use: the fourth waits, and goes."""
    names = [f"variant-{number}" for number in range(4)]
    await server.promote(*map(version_of, names))
    async with processes(tmp_path, server.core) as made:
        remote = await made.another()
        async with AsyncExitStack() as held:
            for name in names[:3]:
                held.enter_context((await remote.lease(Request(name))).hold())
            waiting = asyncio.ensure_future(remote.lease(Request(names[3])))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait({waiting})
            assert sum(one.users for one in server.residents().values()) == 3
        while any(one.users for one in server.residents().values()):  # noqa: ASYNC110  what is given back arrives later
            await asyncio.sleep(0.001)
        assert server.status()["base"]["in_flight"] == 0
        await remote.close()


async def test_a_slot_is_not_changed_before_every_process_has_heard_from_the_engine(
    server: Server, tmp_path: Path
) -> None:
    """Its requests may be on their way there; what is only read, and a slot that was free, does not wait."""
    async with processes(tmp_path, server.core) as made:
        others = [await made.another(), await made.another()]
        await others[0].status(), await others[1].status()  # both are known to the owner
        workers = FencedWorkers(server.workers, made.listening.fence)
        await workers.call("edits_firings")
        assert made.reached == 0
        made.may_reach.clear()
        clearing = asyncio.ensure_future(workers.call("edits_clear", 1))
        await asyncio.sleep(0.05)
        assert (made.reached, clearing.done()) == (2, False)
        assert ("edits_clear", 1) not in server.workers.calls
        made.may_reach.set()
        await clearing
        assert server.workers.calls[-1] == ("edits_clear", 1)
        for other in others:
            await other.close()


@pytest.mark.parametrize("holding", [True, False])
async def test_a_process_that_ends_with_leases_leaves_its_slots_as_they_are(
    server: Server, tmp_path: Path, holding: bool
) -> None:
    """Its requests may still be in the engine. vLLM ends the server when one of its processes ends."""
    await server.promote(version_of("polite"))
    async with processes(tmp_path, server.core) as made:
        remote = await made.another()
        lease = await remote.lease(Request("polite"))
        if not holding:
            with lease.hold():
                pass
        await remote.status()
        await remote.close()
        await asyncio.sleep(0.05)
        workers = FencedWorkers(server.workers, made.listening.fence)
        if holding:
            assert next(iter(server.residents().values())).users == 1
            with pytest.raises(EditsError, match="unknown which of their requests are still in the engine"):
                await workers.call("edits_clear", 1)
        else:
            await workers.call("edits_clear", 3)


async def test_without_its_owner_a_process_answers_nothing(server: Server, tmp_path: Path) -> None:
    """And what it still holds ends in silence."""
    await server.promote(version_of("polite"))
    async with processes(tmp_path, server.core) as made:
        remote = await made.another()
        lease = await remote.lease(Request("polite"))
        await made.listening.close()
        await asyncio.sleep(0.05)
        for ask in (remote.lease(Request("polite")), remote.status()):
            with pytest.raises(EditsError, match="the API server process that owns the slots has ended"):
                await ask
        with lease.hold():
            pass


async def test_a_process_that_does_not_answer_stops_no_owner(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_socket, "ANSWER_SECONDS", 0.05)
    async with processes(tmp_path, server.core) as made:
        remote = await made.another()
        await remote.status()
        made.may_reach.clear()
        with pytest.raises(EditsError, match=r"did not answer within 0\.05 s"):
            await made.listening.fence()
        made.may_reach.set()
        await asyncio.sleep(0.01)
        await made.listening.fence()
        await remote.close()


async def test_who_comes_before_the_owner_waits_for_it(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "owner.sock"
    remote = RemoteCoordinator(path, lambda: asyncio.sleep(0))
    connecting = asyncio.ensure_future(remote.connect())
    await asyncio.sleep(0.05)
    assert not connecting.done()
    listening = CoordinatorServer(path)
    await listening.start(server.core)
    await connecting
    assert (await remote.served()).base
    await remote.close()
    await listening.close()


async def test_scopes_of_a_version_are_told_to_every_process(server: Server, tmp_path: Path) -> None:
    """Whether a request forks the cache, and whether its beams can be searched, is decided where it arrives."""
    from vllm_edits.edit_store import Offset

    await server.promote(version_of("late", edit=Offset(site="layers.1.resid", scope=Scope(segment="generated"))))
    async with processes(tmp_path, server.core) as made:
        remote = await made.another()
        lease = await remote.lease(Request("late"))
        assert lease.choice.info == (await server.lease("late")).choice.info
        assert lease.choice.info.bound_to_prompt
        await remote.close()


def test_a_folder_that_others_may_look_into_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_folder.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = socket_path().parent
    assert socket_path().parent.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(UnsupportedHost, match="a folder that only this user can access"):
        socket_path()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UnsupportedHost, match="a folder that only this user can access"):
        socket_path()
