"""What a rehearsal without a GPU says of the plugin: every place where a GPU matters is in its table."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import report
from tests.gpu.places import PLACES, UNREACHED, Function, found, functions
from tests.gpu.steps import Step, _of_step, run


def test_every_place_where_a_gpu_matters_is_in_the_table() -> None:
    """Whoever writes a line for a GPU says what matters there, and a rehearsal then tells whether it was run."""
    known = {each.place for each in functions()}
    assert not {each.place for each in found()} - PLACES.keys(), "say in tests/gpu/places.py what matters there"
    assert not PLACES.keys() - known, "these are gone"
    lines = {f"{each.place}: {line}" for each in functions() if each.place in PLACES for line in each.lines().values()}
    assert not UNREACHED.keys() - lines, "these lines are gone"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("tensor.is_cuda", True),
        ("torch.zeros(1, pin_memory=True)", True),
        ("device.type == 'cuda'", True),
        ("device.type == 'cpu'", False),
        ("'cuda is only mentioned'", False),
    ],
)
def test_names_tell_where_a_gpu_matters(code: str, told: bool) -> None:
    node = ast.parse(f"def f():\n    {code}").body[0]
    assert isinstance(node, ast.FunctionDef)
    assert Function("file.py", "f", node).names_a_gpu() == told


def last_run(code: int = 0, facts: Any = (), ran: Any = None) -> report.LastRun:
    return report.LastRun(code, 1.0, "abc1234", facts, ran or {})


def test_a_line_that_no_step_ran_is_told_with_the_reason_or_that_there_is_none() -> None:
    place = "graph/device_rows.py:PinnedTurns.end"
    every: dict[str, set[int]] = {}
    for each in functions():
        every.setdefault(each.file, set()).update(each.lines())
    whole = report.written({"a step": last_run(ran=every), "another": None})
    assert f"| `{place}` |" in whole
    assert "| another | not run |" in whole
    assert report.unexplained(whole) == 0
    (missed, *_) = next(each for each in functions() if each.place == place).lines()
    text = report.written(
        {"a step": last_run(ran={**every, "graph/device_rows.py": every["graph/device_rows.py"] - {missed}})}
    )
    assert report.unexplained(text) == 1


def test_costs_are_told_beside_vllm_alone() -> None:
    asked = dict.fromkeys(("kernels", "launches", "graph launches", "copies to the device", "copies to the host",
                           "waits for an event"), 2.0)  # fmt: skip
    facts = [{"what": "step", **asked},
             {"what": "step", "side": "rank 1", "versions": 64, "more": {"kernels": 3.0}, "host_over_alone": 1.01,
              "filling": 60.0}]  # fmt: skip
    text = report.written({"costs": last_run(1, facts)})
    assert "| rank 1 | 64 | +3 kernels | 1.01 | 60 µs |" in text
    assert "| costs | failed (1) | abc1234 |" in text


@pytest.mark.long
def test_a_step_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """Also what it has started in a session of its own, as engines are; and the results say so."""
    script = "import subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
    step, results = Step("too long", [], 1.0), tmp_path / "results.jsonl"
    ended = run(step, [sys.executable, "-c", script], os.environ, log=tmp_path / "log.txt", results=results)
    assert (ended.result, ended.seconds < 30) == ("time was up", True)
    assert not list(_of_step("too long"))
    assert json.loads(results.read_text())["code"] == ended.code
    ended = run(step, [sys.executable, "-c", "exit(3)"], os.environ, log=tmp_path / "log.txt", results=results)
    assert ended.result == "failed (3)", "positive control"
