"""Tests side by side: lanes share the cores out, and who wants every core has the machine alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

import pytest

from tests.conftest import LANE, pytest_runtest_setup
from tests.support.lanes import Lane


@pytest.mark.parametrize(
    ("cores", "lanes", "shares"),
    [
        ({0, 1}, 2, [{0}, {1}]),
        ({2, 3, 5, 7, 8}, 2, [{2, 5, 8}, {3, 7}]),
        ({4}, 2, [{4}, {4}]),
        ({0, 1}, 3, [{0}, {1}, {0}]),
    ],
)
def test_each_lane_has_a_share_of_the_cores(
    tmp_path: Path, cores: set[int], lanes: int, shares: list[set[int]]
) -> None:
    made = [Lane.of(frozenset(cores), number, lanes, tmp_path / "lock") for number in range(lanes)]
    assert [lane.cores for lane in made] == shares
    assert all(lane.every_core == cores for lane in made)


def test_a_lane_that_takes_a_dead_ones_place_has_a_share_too(tmp_path: Path) -> None:
    assert Lane.of(frozenset({0, 1}), 2, 2, tmp_path / "lock").cores == {0}


def test_a_test_has_the_cores_of_its_lane() -> None:
    assert LANE is None or os.sched_getaffinity(0) == LANE.cores


@pytest.mark.devices(2)
def test_a_test_of_two_workers_has_every_core() -> None:
    assert LANE is None or os.sched_getaffinity(0) == LANE.every_core


@pytest.mark.devices(2)
def test_a_test_of_two_workers_is_skipped_on_one_gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpus in (0, 2):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=gpus: count)
        pytest_runtest_setup(request.node)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(pytest.skip.Exception, match="needs 2 GPUs"):
        pytest_runtest_setup(request.node)


def test_without_lanes_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert Lane.here() is None


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """In which turns are taken: the cores of a thread are its own, those of the tests stay as they are."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


def two_lanes(folder: Path) -> tuple[Lane, Lane]:
    """Of as many lanes as there are cores, so that a share is not everything where there is more than one."""
    cores = frozenset(os.sched_getaffinity(0))
    first, second = (Lane.of(cores, number, max(2, len(cores)), folder / "lock") for number in range(2))
    return first, second


@pytest.mark.parametrize(
    ("holds_alone", "comes_alone", "waits"), [(False, False, False), (False, True, True), (True, False, True)]
)
def test_who_is_alone_waits_for_the_others_and_they_for_it(
    tmp_path: Path, threads: ThreadPoolExecutor, holds_alone: bool, comes_alone: bool, waits: bool
) -> None:
    first, second = two_lanes(tmp_path)
    held, begun, end = Event(), Event(), Event()

    def hold() -> None:
        with first.turn(alone=holds_alone):
            held.set()
            end.wait(10)

    def come() -> None:
        with second.turn(alone=comes_alone):
            begun.set()

    holding = threads.submit(hold)
    assert held.wait(10)
    coming = threads.submit(come)
    assert begun.wait(0.3 if waits else 10) is not waits
    end.set()
    holding.result(timeout=10)
    coming.result(timeout=10)
    assert begun.is_set()


def test_who_is_alone_has_every_core_until_it_ends_or_fails(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    lane, _ = two_lanes(tmp_path)

    def cores_of_three_turns() -> list[set[int]]:
        lane.stay()
        found = [os.sched_getaffinity(0)]
        with suppress(ZeroDivisionError), lane.turn(alone=True):
            found.append(os.sched_getaffinity(0))
            raise ZeroDivisionError
        return [*found, os.sched_getaffinity(0)]

    found = threads.submit(cores_of_three_turns).result(timeout=10)
    assert found == [lane.cores, lane.every_core, lane.cores]
