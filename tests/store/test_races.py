"""Many processes append to one tag at once: exactly one wins each round, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtests.harness.object_servers import moto, seaweedfs
from tests.support.store import bundle
from tests.support.store_places import Place, bucket, folder
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.upkeep.audit import audit

pytestmark = pytest.mark.long


@contextmanager
def racing(url: str, version: str, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "tests.support.racer", url, version]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) for _ in range(count)]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        yield racers
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def race(url: str, *, racers: int, rounds: int) -> None:
    store = EditStore(url, create=True)
    version = store.publish(bundle())
    store.promote(f"polite@{version}", tag="race")
    with racing(url, version, racers) as running:
        for number in range(1, rounds + 1):
            for racer in running:
                assert racer.stdin is not None
                racer.stdin.write(f"{number}\n")
                racer.stdin.flush()
            answers = [racer.stdout.readline().strip() for racer in running]  # type: ignore[union-attr]
            assert sorted(answers) == ["lost"] * (racers - 1) + ["won"], f"round {number}: {answers}"
    history = store.history("polite", "race")
    assert [entry.sequence for entry in history] == list(range(1, rounds + 2))
    assert len({entry.nonce for entry in history}) == rounds + 1
    assert len({entry.actor for entry in history}) > 2, "positive control: not always the same one was first"
    assert audit(store).clean


@pytest.mark.parametrize(
    ("place", "racers", "rounds"),
    [
        pytest.param(folder, 8, 30, id="folder"),
        pytest.param(bucket(moto), 6, 10, id="moto"),
        pytest.param(folder, 20, 300, id="folder-long", marks=pytest.mark.slow),
        pytest.param(bucket(moto), 20, 100, id="moto-long", marks=pytest.mark.slow),
        pytest.param(bucket(seaweedfs), 20, 100, id="seaweedfs", marks=pytest.mark.slow),
    ],
)
def test_one_of_many_writers_wins_each_round(
    place: Place, racers: int, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place(tmp_path, monkeypatch) as url:
        race(url, racers=racers, rounds=rounds)
