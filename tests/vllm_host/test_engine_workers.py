"""Calls to the workers of one engine or of several, and of one that ends meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_edits.edit_store.errors import EditsError, UnsupportedHost
from vllm_edits.plugin.vllm_host import frontend
from vllm_edits.plugin.vllm_host.frontend import EngineWorkers

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Client:
    """vLLM's engine client, as far as it is called; `engines` is what each one's workers answer."""

    def __init__(self, *engines: list[Any]) -> None:
        self.errored = False
        self.asked: list[Any] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_size=len(engines), _api_process_rank=0, _api_process_count=1)
        )
        self._engines = dict(enumerate(engines))
        self.engine_core: Any = SimpleNamespace(
            core_engines=list(self._engines), _call_utility_async=self._call_utility_async
        )

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.asked.append((method, args))
        await self.may_answer.wait()
        return self._engines[0]

    async def _call_utility_async(self, call: str, method: str, *rest: Any, engine: int) -> list[Any]:
        self.asked.append((call, method, *rest, engine))
        await self.may_answer.wait()
        return self._engines[engine]


async def test_the_workers_of_every_engine_answer() -> None:
    one = Client(["a", "b"])
    assert await EngineWorkers(one).call("edits_clear", 3) == ["a", "b"]
    assert one.asked == [("edits_clear", (3,))]
    two = Client(["a", "b"], ["c", "d"])
    assert await EngineWorkers(two).call("edits_clear", 3) == ["a", "b", "c", "d"]
    assert two.asked == [("collective_rpc", "edits_clear", None, (3,), None, engine) for engine in (0, 1)]
    assert EngineWorkers(two).api_process == (0, 1)


async def test_what_vllm_no_longer_has_is_named() -> None:
    client = Client([], [])
    del client.engine_core.core_engines
    with pytest.raises(UnsupportedHost, match=r"has no SimpleNamespace\.core_engines"):
        await EngineWorkers(client).call("edits_clear", 3)


@pytest.mark.parametrize("engines", [1, 2])
async def test_an_engine_that_ends_answers_nobody_and_nobody_waits_for_ever(
    engines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend, "_LOOK_SECONDS", 0.01)
    client = Client(*([["a"]] * engines))
    client.may_answer.clear()
    calling = asyncio.ensure_future(EngineWorkers(client).call("edits_clear", 3))
    await asyncio.sleep(0.05)
    assert not calling.done(), "a call may take its time"
    client.errored = True
    with pytest.raises(EditsError, match="the engine has ended"):
        await calling


@pytest.mark.parametrize("paused", [True, False])
async def test_an_engine_that_its_operator_paused_stays_paused(paused: bool) -> None:
    """Aborting what runs pauses it; only a pause of our own is ended."""
    said: list[str] = []

    class Engine:
        async def is_paused(self) -> bool:
            return paused

        async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
            said.append(f"{mode} {clear_cache}")
            if not paused:
                raise RuntimeError("no")

        async def resume_generation(self) -> None:
            said.append("resume")

    with nullcontext() if paused else pytest.raises(RuntimeError):
        await EngineWorkers(Engine()).abort_all()
    assert said == ["abort False", *([] if paused else ["resume"])]


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("polite@prod", True),
        ("polite@4f1c9a", True),
        ("tiny", False),
        ("ada/tiny", False),
        ("me@example.org/Model", False),
    ],
)
def test_a_name_of_the_base_that_reads_as_a_variants_is_refused(name: str, refused: bool) -> None:
    with pytest.raises(UnsupportedHost, match="Choose another name") if refused else nullcontext():
        frontend._require_plain(["tiny", name])


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("0", False), ("", False), (None, False)])
def test_a_server_for_development_is_refused(monkeypatch: pytest.MonkeyPatch, value: str | None, refused: bool) -> None:
    """There any client may call what installs versions."""
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_SERVER_DEV_MODE", value)
    with pytest.raises(UnsupportedHost, match="/collective_rpc") if refused else nullcontext():
        frontend._require_no_development()
