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


@pytest.mark.parametrize("kills", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_a_whole_store(kills: int, tmp_path: Path) -> None:
    urls = [str(tmp_path / name) for name in ("store", "copy")]
    moments = np.random.default_rng(kills)
    grown = 0
    for number in range(kills):
        command = [sys.executable, "-m", "tests.victim", *urls, str(number)]
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
