"""Kill -9 at any moment: the store verifies clean, nothing half is visible, and the same commands complete after it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loadtests.harness.object_servers import moto, seaweedfs
from tests.support.store_places import Place, bucket, folder
from tests.support.victim import one_of_each
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.backends import LocalFolder
from vllm_edits.edit_store.upkeep.audit import audit
from vllm_edits.edit_store.upkeep.collect import collect

pytestmark = pytest.mark.long

LONGEST_SECONDS = 0.5


KILLS_PER_STORE = 20
"""A new store now and then, since the whole of it is verified after each kill."""


@pytest.mark.parametrize(
    ("place", "kills"),
    [
        pytest.param(folder, 6, id="folder"),
        pytest.param(bucket(moto), 3, id="moto"),
        pytest.param(folder, 300, id="folder-long", marks=pytest.mark.slow),
        pytest.param(bucket(seaweedfs), 100, id="seaweedfs", marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_leaves_a_whole_store(
    place: Place, kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place(tmp_path, monkeypatch) as url:
        for first in range(0, kills, KILLS_PER_STORE):
            kill_and_look(f"{url}/{first}", min(KILLS_PER_STORE, kills - first), seed=first)


def kill_and_look(place: str, kills: int, seed: int) -> None:
    """Kill a busy process, verify the store, finish what it had begun, and once more."""
    urls = [f"{place}/{name}" for name in ("store", "copy")]
    moments = np.random.default_rng(seed)
    grown = 0
    for number in range(kills):
        command = [sys.executable, "-m", "tests.support.victim", *urls, str(seed * 1000 + number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as victim:
            assert victim.stdout is not None
            assert victim.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, LONGEST_SECONDS))
            victim.send_signal(signal.SIGKILL)
            assert victim.wait() == -signal.SIGKILL, "positive control: it did not end by itself"
        store, other = (EditStore(url) for url in urls)
        for each in (store, other):
            assert audit(each).findings == [], f"after kill {number}"
        entries = sum(len(store.history(*tag)) for tag in store.all_tags())
        assert entries >= grown, "what was promoted stays promoted"
        for each in (store, other):
            collect(each, grace_hours=0)  # what it says to do where a collection was cut off
        one_of_each(store, other, f"after-{number}")
        grown = sum(len(store.history(*tag)) for tag in store.all_tags())
    for each in (store, other):
        collect(each, grace_hours=0)
        collect(each, grace_hours=0)
        assert audit(each).findings == audit(each).garbage == []
        if isinstance(each.backend, LocalFolder):
            assert not list((each.backend.root / ".staging").iterdir())
