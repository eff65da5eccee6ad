"""A short soak of a tiny model: the long one is `make soak`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from loadtests import soak
from loadtests.harness.object_servers import moto
from tests.support.engine import USUAL_OR_AS_ON_A_GPU

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("how", USUAL_OR_AS_ON_A_GPU)
def test_under_load_every_token_is_of_the_version_in_the_headers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Mapping[str, str]
) -> None:
    """With swaps, paging, clients that leave, and a store that stands still; then the engine is killed."""
    seconds, rate = (90, 2) if how else (40, 10)
    with moto(tmp_path) as bucket:
        for name, value in bucket.items():
            monkeypatch.setenv(name, value)
        found = soak.run(tiny_model, tmp_path, {**bucket, **how}, seconds=seconds, rate=rate, slots=4, seed=1)
    assert (found["wrong"], found["failed"], found["miscounted"]) == ([], [], [])
    assert found["requests"]["answered"] > seconds * rate / 2
    assert found["requests"]["left"] > seconds * rate / 40
    assert found["swaps"] > 10
    killed = found["after the engine was killed"]
    assert (killed["tokens of other versions"], killed["the server ended"], killed["a new start serves"]) == (
        0,
        True,
        True,
    )
