"""A short soak of a tiny model: the long one is `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests import soak
from loadtests.object_servers import moto

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_under_load_every_token_is_of_the_version_in_the_headers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With swaps, paging, clients that leave, and a store that stands still; then the engine is killed."""
    with moto(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        found = soak.run(tiny_model, tmp_path, environment, seconds=40, rate=10, slots=4, seed=1)
    assert (found["wrong"], found["failed"], found["miscounted"]) == ([], [], [])
    assert found["requests"]["answered"] > 200
    assert found["requests"]["left"] > 10
    assert found["swaps"] > 10
    killed = found["after the engine was killed"]
    assert (killed["tokens of other versions"], killed["the server ended"], killed["a new start serves"]) == (
        0,
        True,
        True,
    )
