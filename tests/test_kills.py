"""Kill -9 at any moment: the store verifies clean, nothing half is visible, and the same commands complete after it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edit_store import EditStore
from edit_store.audit import audit
from edit_store.collect import collect
from tests.victim import one_of_each

LONGEST_SECONDS = 0.5


STORES, KILLS_PER_STORE = 15, 20
"""A new store now and then, since the whole of it is verified after each kill."""


@pytest.mark.slow
def test_hundreds_of_killed_processes_leave_whole_stores(tmp_path: Path) -> None:
    for number in range(STORES):
        kill_and_look(tmp_path / f"{number}", KILLS_PER_STORE, seed=number)


def test_a_killed_process_leaves_a_whole_store(tmp_path: Path) -> None:
    kill_and_look(tmp_path, kills=6, seed=1000)


def kill_and_look(folder: Path, kills: int, seed: int) -> None:
    """Kill a busy process, verify the store, finish what it had begun, and once more."""
    urls = [str(folder / name) for name in ("store", "copy")]
    moments = np.random.default_rng(seed)
    grown = 0
    for number in range(kills):
        command = [sys.executable, "-m", "tests.victim", *urls, str(seed * 1000 + number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as victim:
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
        assert not list(Path(each.url, ".staging").iterdir())
