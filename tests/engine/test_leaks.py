"""A thousand swaps leave nothing behind: what the process of an engine holds after them is what it held before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.harness.server import ENVIRONMENT
from tests.engine.offline_swaps import LEAKED, SWAPS
from tests.support.bundles import base_of, publish, random_bundle
from vllm_edits.edit_store import EditStore

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BYTES_OF_A_SWAP, BLOCKS_OF_A_SWAP = 64, 2
"""At most. A swap leaves one short string in a cache of pydantic's, which holds a certain number of them."""


def test_a_thousand_swaps_leave_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    store = EditStore(str(tmp_path / "store"), create=True)
    bundles = [random_bundle("loud", base_of(tiny_model), seed=seed) for seed in range(8)]
    versions = [publish(store, bundle) for bundle in bundles]
    script = Path(__file__).with_name("offline_swaps.py")
    environment = {**ENVIRONMENT, "VLLM_PLUGINS": "edits", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ran = subprocess.run(
        [sys.executable, str(script), str(tiny_model), str(tmp_path / "store"), "loud", *versions],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    settled, swapped, leaked = json.loads(ran.stdout.splitlines()[-1])
    print(f"\n{settled} {swapped} {leaked}")  # noqa: T201
    assert swapped["memory"] - settled["memory"] < BYTES_OF_A_SWAP * SWAPS
    assert swapped["blocks"] - settled["blocks"] < BLOCKS_OF_A_SWAP * SWAPS
    assert leaked["memory"] - swapped["memory"] > LEAKED * SWAPS // 8, "positive control: half of what leaks is seen"
