"""What a worker tells a scheduler of requests that must end; and that it knows when none reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_edits.edit_store import private_folder
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.claim import FalseClaim
from vllm_edits.plugin.vllm_host import ending
from vllm_edits.plugin.vllm_host.ending import EndedRequests, EndsRequests

REQUEST = SimpleNamespace(req_id="cmpl-1")
SCHEDULER = SimpleNamespace(kv_cache_manager=SimpleNamespace(free=None, pop_blocks_for_free=None))


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
    scheduler = EndedRequests(config, SCHEDULER)
    assert not scheduler.attached
    if attached:
        for worker in workers:
            worker.attached()
    assert all(worker.end(REQUEST, FalseClaim("no")) for worker in workers)
    assert not list(tmp_path.iterdir())


def test_workers_that_attach_at_the_same_time_make_no_folder_anew(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One would find it half made, and the other's start would fail."""
    workers = [EndsRequests(config), EndsRequests(config)]
    EndedRequests(config, SCHEDULER)
    monkeypatch.setattr(ending, "private_folder", None)
    for worker in workers:
        worker.attached()


def test_a_scheduler_whose_workers_are_elsewhere_waits_for_none(config: Any) -> None:
    assert EndedRequests(config, SCHEDULER).attached


def test_a_start_ends_where_the_scheduler_cannot_be_told_of_it(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end every request, and say that nothing has attached itself."""
    worker = EndsRequests(config)
    EndedRequests(config, SCHEDULER)
    monkeypatch.setattr(ending.os, "write", lambda *_: 1)
    with pytest.raises(UnsupportedHost, match="No space left on device"):
        worker.attached()
