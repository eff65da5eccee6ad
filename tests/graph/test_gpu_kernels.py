"""What edits add to a step on an NVIDIA GPU, as far as that can be known without one: the kernels that are written."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from loadtests.micro.gpu_kernels import SIDES


def kernels(*arguments: str) -> dict[str, Any]:
    """In a process of its own: the command takes hold of torch."""
    command = [sys.executable, "-m", "loadtests.micro.gpu_kernels", *arguments, "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@pytest.mark.long
def test_edits_of_rank_one_are_part_of_kernels_that_are_there() -> None:
    found = kernels("plain", "low_rank", "scale")
    assert found["low_rank"] == found["plain"]
    more = found["scale"]["a_layer"] - found["plain"]["a_layer"]
    assert more == 1, "positive control: nothing else stands between attention and the product behind it"


@pytest.mark.slow
def test_kernels_for_every_kind_become_machine_code() -> None:
    found = kernels("--compile")
    assert found.keys() == SIDES.keys()
    plain = found["plain"]
    more = {side: each["a_layer"] - plain["a_layer"] for side, each in found.items()}
    once = {side: each["once"] - plain["once"] for side, each in found.items()}
    assert {side: each for side, each in more.items() if each} == {
        "scale": 1, "low_rank, rank 4": 1, "low_rank, rank 16": 2, "all kinds": 1, "all kinds, rank 4": 5,
    }  # fmt: skip
    assert {side: each for side, each in once.items() if each} == {"gate": 2, "all kinds": 2, "all kinds, rank 4": 2}
    assert all(each["compiled"] > plain["a_layer"] for each in found.values())
