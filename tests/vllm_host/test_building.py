"""What vLLM's compile cache has in its key of a worker's settings: all that compiled code depends on, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.fakes import BASE
from vllm_edits.edit_store import BaseModelRef
from vllm_edits.edit_store.architectures import supported
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.graph.tensor_parallel import ONLY_RANK
from vllm_edits.plugin.vllm_host import building
from vllm_edits.plugin.vllm_host.building import Building
from vllm_edits.server_config.settings import Reserve, read_settings

OFFSET = Reserve(kind="offset", site="layers.*.resid")


def reserved(*entries: Reserve) -> Reservation:
    return Reservation.from_settings(entries, supported(BASE.architecture), BASE.widths)


def additional(reservation: Reservation, base: BaseModelRef = BASE, **settings: Any) -> dict[str, Any]:
    """The additional config of a worker that was given these settings."""
    given = {"edits": {"store": "/srv/store", **settings}}
    config = SimpleNamespace(
        additional_config=given, model_config=SimpleNamespace(dtype=torch.float32),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
    )  # fmt: skip
    made = Building(
        config, read_settings(given), base, sites={}, device=torch.device("cpu"), rank=ONLY_RANK, in_weights={},
        ending=SimpleNamespace(end=None),  # type: ignore[arg-type]
    )  # fmt: skip
    return made.additional(reservation)


def key(*of: Any, **settings: Any) -> str:
    """What vLLM hashes."""
    return json.dumps(additional(*of, **settings), sort_keys=True)


def test_another_store_or_token_is_the_same_key() -> None:
    found = additional(reserved(OFFSET), store="/elsewhere", poll_seconds=9.0, admin_token_file="/run/token")
    assert json.dumps(found, sort_keys=True) == key(reserved(OFFSET))
    assert read_settings(found).store == "/elsewhere", "positive control: they are still read"


def test_what_is_compiled_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots, what is reserved, the modules of the architecture, and the dtype's products."""
    other = BASE.model_copy(update={"architecture": "Qwen3ForCausalLM"})
    keys = {
        key(reserved(OFFSET)), key(reserved(OFFSET), slots=3), key(reserved()), key(reserved(OFFSET), other),
        key(Reservation(reserved(OFFSET).capacities, scopes=2)),
    }  # fmt: skip
    monkeypatch.setattr(building, "_sources", lambda: "another code")
    keys.add(key(reserved(OFFSET)))
    assert len(keys) == 6


def test_every_file_that_decides_what_is_compiled_is_in_the_digest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digests = []
    for folder in building._COMPILED_FROM:
        assert list((building._PACKAGE / folder).rglob("*.py")), f"{folder} is there"
        (tmp_path / folder / "deep").mkdir(parents=True)
    monkeypatch.setattr(building, "_PACKAGE", tmp_path)
    for folder in building._COMPILED_FROM:
        (tmp_path / folder / "deep" / "module.py").write_text(folder)
        digests.append(building._sources.__wrapped__())
    assert len(set(digests)) == len(building._COMPILED_FROM)
