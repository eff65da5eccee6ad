"""A growth that fails in any phase leaves everything as it was, and many growths leave no memory behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests.harness.server import ENVIRONMENT
from tests.engine.offline_growth import GROWTHS

pytestmark = pytest.mark.vllm

FAILURES = {
    "memory": ("planned", "100 bytes are allowed by edits.grow_bytes"),
    "compile error": ("compiling", "broken on purpose"),
    "killed compiler": ("compiling", "ended by signal 9"),
    "load error": ("compiling", "broken on purpose"),
    "build error": ("compiling", "broken on purpose"),
    "carry error": ("waiting", "broken on purpose"),
    "switch error": ("switching", "could not prove the new edits"),
    "capture error": ("switching", "could not prove the new edits"),
}
OF_COMPILING = {"compile error", "killed compiler", "load error"}
BYTES_OF_A_GROWTH = 8 << 20
"""At most. The code of a compiled model stays loaded: torch unloads no library."""


def run(model: Path, folder: Path, *words: str) -> dict[str, Any]:
    environment = {**ENVIRONMENT, "VLLM_PLUGINS": "edits", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment["VLLM_CACHE_ROOT"] = str(folder / "cache")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.engine.offline_growth", str(model), str(folder / "store"), *words],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    facts: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return facts


@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_growth_that_fails_leaves_everything_as_it_was(how: str, tiny_model: Path, tmp_path: Path) -> None:
    """Positive control: afterwards the same version is served by a growth that does not fail."""
    facts = run(tiny_model, tmp_path, how, "fail")
    print(json.dumps(facts))  # noqa: T201
    failed = facts["failed"]
    assert failed.keys() == FAILURES.keys() - (OF_COMPILING if how == "eager" else set())
    for name, fact in failed.items():
        phase, said = FAILURES[name]
        assert fact["phase"] == phase, name
        assert said in fact["error"], name
        assert said in fact["refused"], name
        assert fact["same"], f"{name}: the old answers, bit for bit"
        assert not fact["growing"], f"{name}: nothing of the growth is left"
    assert facts["thread"]["differ"] == {"in-thread": True, "new": True}
    assert facts["thread"]["same"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_many_growths_leave_no_memory_behind(how: str, tiny_model: Path, tmp_path: Path) -> None:
    growths = run(tiny_model, tmp_path, how, "many")["growths"]
    assert len(growths) == GROWTHS
    for number, fact in enumerate(growths):
        print(number, fact)  # noqa: T201
        assert fact["error"] == ""
        assert fact["same"], "the old answers, bit for bit"
        assert fact["differs"], "positive control"
    half = GROWTHS // 2
    assert growths[-1]["memory"] - growths[half - 1]["memory"] < BYTES_OF_A_GROWTH * half
