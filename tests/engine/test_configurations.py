"""Every line of tests/proofs/CONFIGURATIONS.md: exact, or refused with that very reason."""

from __future__ import annotations

import re

import pytest

from tests.proofs.configurations import TABLE, WAYS, Way, find, line, told_of

pytestmark = pytest.mark.vllm


def marks_of(way: Way) -> list[pytest.MarkDecorator]:
    """Which tests a way belongs to, and what it needs."""
    devices = 2 if way.flags else way.arguments.get("tensor_parallel_size", 1)
    return [*([] if way.quick else [pytest.mark.slow]), pytest.mark.devices(devices)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(way)) for name, way in WAYS.items()])
def test_every_way_is_what_the_table_says(name: str) -> None:
    if not WAYS[name].runs_here:
        pytest.skip(f"this CPU has no {WAYS[name].needs}")
    outcome = find(name)
    assert not outcome.faults(WAYS[name])
    exact = re.compile(r"exact \([^)]*\)")
    assert exact.sub("exact", line(name, outcome)) == exact.sub("exact", told_of(name))


def test_the_table_has_every_way_and_no_other() -> None:
    told = [row.split("|")[1].strip() for row in TABLE.read_text().splitlines() if row.startswith("| ")][1:]
    assert told == list(WAYS)
