"""Calls to the workers of one engine or of several, and of one that ends meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from edit_store.errors import EditsError, UnsupportedHost
from plugin.vllm_host import frontend
from plugin.vllm_host.frontend import EngineWorkers

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
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=len(engines)))
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
