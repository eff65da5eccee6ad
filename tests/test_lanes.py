"""Tests side by side: lanes share the cores out, and who wants every core has the machine alone."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

import pytest

from tests.conftest import LANE
from tests.lanes import Lane


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


def test_without_lanes_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert Lane.here() is None


def two_lanes(folder: Path) -> tuple[Lane, Lane]:
    """Of as many lanes as there are cores, so that a share is not everything where there is more than one."""
    cores = frozenset(os.sched_getaffinity(0))
    first, second = (Lane.of(cores, number, max(2, len(cores)), folder / "lock") for number in range(2))
    return first, second


def test_who_is_alone_waits_for_the_others_and_they_for_it(tmp_path: Path) -> None:
    first, second = two_lanes(tmp_path)
    for waits_alone, holds_alone in ((True, False), (False, True)):
        begun = Event()

        def run(*, alone: bool, begun: Event = begun) -> None:
            with second.turn(alone=alone):
                begun.set()

        with ThreadPoolExecutor(1) as pool:
            with first.turn(alone=holds_alone):
                waiting = pool.submit(run, alone=waits_alone)
                assert not begun.wait(0.2), f"{waits_alone=}, {holds_alone=}"
            waiting.result(timeout=10)
            assert begun.is_set()


def test_what_is_not_alone_runs_beside_others(tmp_path: Path) -> None:
    first, second = two_lanes(tmp_path)
    begun = Event()

    def run() -> None:
        with second.turn(alone=False):
            begun.set()

    with first.turn(alone=False), ThreadPoolExecutor(1) as pool:
        pool.submit(run).result(timeout=10)
        assert begun.is_set()


def test_who_is_alone_has_every_core_until_it_ends_or_fails(tmp_path: Path) -> None:
    lane, _ = two_lanes(tmp_path)

    def cores_of_three_turns() -> list[set[int]]:  # in a thread: the cores of a thread are its own
        lane.stay()
        found = [os.sched_getaffinity(0)]
        with suppress(ZeroDivisionError), lane.turn(alone=True):
            found.append(os.sched_getaffinity(0))
            raise ZeroDivisionError
        return [*found, os.sched_getaffinity(0)]

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(cores_of_three_turns).result(timeout=10)
    assert found == [lane.cores, lane.every_core, lane.cores]
