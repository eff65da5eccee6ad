"""CUDA graphs captured again while serving: with each runner's own way, or refused before anything is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode

from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.vllm_host.cuda_graphs import capture_again, require_capture_again


class Runner:
    """A runner that notes what is done with its graphs."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def capture_model(self) -> None:
        self.done.append("captured")


class V1(Runner):
    """Its dummy batches clear what it keeps of requests, unless it is told to keep it."""

    @contextmanager
    def preserve_serving_state(self) -> Iterator[None]:
        self.done.append("kept")
        yield
        self.done.append("restored")


class Manager:
    """V2's manager of graphs."""

    def __init__(self, name: str, done: list[str]) -> None:
        self._name, self._done = name, done

    def release_graphs(self) -> None:
        self._done.append(f"{self._name} released")


class V2(Runner):
    """It has a manager of graphs, and one in each part of a speculator that has graphs."""

    def __init__(self, speculator: Any = None) -> None:
        super().__init__()
        self.cudagraph_manager: Any = Manager("model", self.done)
        self.speculator = speculator


def worker(runner: Runner, mode: CUDAGraphMode | None = CUDAGraphMode.FULL_AND_PIECEWISE) -> Any:
    """A worker with this runner, that captures graphs in this way."""
    return SimpleNamespace(
        model_runner=runner, vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode))
    )


def test_v1_keeps_what_it_knows_of_requests() -> None:
    runner = V1()
    require_capture_again(worker(runner))
    capture_again(worker(runner))
    assert runner.done == ["kept", "captured", "restored"]


def test_v2_drops_the_graphs_of_every_model_first() -> None:
    runner = V2()
    runner.speculator = SimpleNamespace(prefill=Manager("speculator", runner.done), tokens=3)
    require_capture_again(worker(runner))
    capture_again(worker(runner))
    assert runner.done == ["model released", "speculator released", "captured"]


@pytest.mark.parametrize("mode", [None, CUDAGraphMode.NONE])
def test_where_no_graphs_are_used_nothing_is_captured(mode: CUDAGraphMode | None) -> None:
    for runner in (Runner(), V1(), V2()):
        require_capture_again(worker(runner, mode))
        capture_again(worker(runner, mode))
        assert runner.done == []


@pytest.mark.parametrize("old", ["V1", "V2"])
def test_a_vllm_that_cannot_is_refused_with_what_to_do(old: str) -> None:
    runner = V2() if old == "V2" else Runner()
    if isinstance(runner, V2):
        runner.cudagraph_manager = SimpleNamespace()
    with pytest.raises(UnsupportedHost, match=r"cannot capture CUDA graphs again while it serves\. Restart the server"):
        require_capture_again(worker(runner))
    assert runner.done == []
