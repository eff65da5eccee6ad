"""Versions kept ready in a worker's memory: read once, in the background, as many as fit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from vllm_edits.edit_store.errors import EditsError, StoreUnavailable
from vllm_edits.plugin.graph.edited_model import Prepared
from vllm_edits.plugin.graph.host_cache import HostCache

ROW = 100


class Reading:
    """Stands for the store: counts what is read, waits while `open` is not set, and fails when told."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.down = False

    def __call__(self, version: str) -> Prepared:
        self.open.wait(10)
        self.read.append(version)
        if self.down:
            raise StoreUnavailable("the store is down")
        return Prepared(version, {}, torch.zeros(ROW, dtype=torch.uint8), (), "")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def ready(cache: HostCache, *versions: str) -> None:
    for version in versions:
        cache.stage(version)
        until(lambda version=version: cache.poll(version))  # type: ignore[misc]


def test_a_version_is_read_once_and_does_not_hold_up_whoever_stages_it() -> None:
    store = Reading()
    store.open.clear()
    cache = HostCache(store, 10 * ROW)
    for _ in range(3):
        cache.stage("a")
    assert not cache.poll("a")
    assert cache.get("a") is None
    store.open.set()
    until(lambda: cache.poll("a"))
    found = cache.get("a")
    assert found is not None
    assert (found.version, store.read) == ("a", ["a"])


def test_the_least_recently_used_go_first_and_the_newest_stays() -> None:
    cache = HostCache(Reading(), 2 * ROW)
    ready(cache, "a", "b")
    assert cache.get("a") is not None
    ready(cache, "c")
    assert [version for version in "abc" if cache.get(version)] == ["a", "c"]
    small = HostCache(Reading(), 0)
    ready(small, "a", "b")
    assert [version for version in "ab" if small.get(version)] == ["b"], "what was just asked for can be installed"


def test_what_could_not_be_read_is_told_once_and_then_read_anew() -> None:
    store = Reading()
    store.down = True
    cache = HostCache(store, 10 * ROW)
    cache.stage("a")
    with pytest.raises(StoreUnavailable, match="the store is down"):
        ready(cache, "a")
    assert cache.get("a") is None
    store.down = False
    ready(cache, "a")
    assert cache.get("a") is not None


def test_what_made_way_while_another_worker_still_read_is_read_again() -> None:
    cache = HostCache(Reading(), 0)
    ready(cache, "a", "b")
    assert cache.get("a") is None
    until(lambda: cache.poll("a"))
    assert cache.get("a") is not None


def test_a_thread_that_cannot_be_had_is_told_and_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit on processes. Otherwise the version would be on its way for ever."""

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    cache = HostCache(Reading(), 10 * ROW)
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refused)
        cache.stage("a")
        with pytest.raises(EditsError, match="cannot be read now: can't start new thread"):
            cache.poll("a")
    ready(cache, "a")
