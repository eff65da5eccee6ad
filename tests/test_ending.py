"""What a worker tells a scheduler of requests that must end; and that it knows when none reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edit_store import private_folder
from plugin.step_filler import FalseClaim
from plugin.vllm_host.ending import EndedRequests, EndsRequests

REQUEST = SimpleNamespace(req_id="cmpl-1")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(private_folder.tempfile, "gettempdir", lambda: str(tmp_path))
    return SimpleNamespace(instance_id="abc", parallel_config=SimpleNamespace(data_parallel_index=0))


@pytest.mark.parametrize("attached", [False, True])
def test_without_a_scheduler_that_reads_a_request_is_not_said_to_end(config: Any, attached: bool) -> None:
    """Then the step must be stopped: computed on, the request would be answered by the base model."""
    worker = EndsRequests(config)
    if attached:
        worker.attached()
    assert not worker.end(REQUEST, FalseClaim("no"))
    assert not worker.end(REQUEST, FalseClaim("no"))


@pytest.mark.parametrize("attached", [False, True])
def test_a_scheduler_that_reads_is_told_and_no_folder_stays(config: Any, tmp_path: Path, attached: bool) -> None:
    workers = [EndsRequests(config), EndsRequests(config)]  # of one engine
    scheduler = EndedRequests(config)
    assert not scheduler.attached
    if attached:
        for worker in workers:
            worker.attached()
    assert all(worker.end(REQUEST, FalseClaim("no")) for worker in workers)
    assert not list(tmp_path.iterdir())


def test_a_scheduler_whose_workers_are_elsewhere_waits_for_none(config: Any) -> None:
    assert EndedRequests(config).attached
