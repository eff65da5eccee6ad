"""Compilation in a thread and in a forked child: how each ends, and what is told of its error."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.vllm_host import compiled
from vllm_edits.plugin.vllm_host.compiled import Compiling, InChild, InThread

Place = Callable[[Callable[[], None]], Compiling]
END_SECONDS = 30.0
EVERY_PLACE = pytest.mark.parametrize("place", [InChild, InThread])


def wait(compiling: Compiling) -> None:
    end = time.monotonic() + END_SECONDS
    while not compiling.done():
        assert time.monotonic() < end, "it does not end"
        time.sleep(0.01)


def fails() -> None:
    message = "no such operator"
    raise RuntimeError(message)


@EVERY_PLACE
def test_it_is_done_when_its_work_is(place: Place) -> None:
    wait(place(lambda: None))


@EVERY_PLACE
def test_its_error_is_told(place: Place) -> None:
    with pytest.raises(EditsError, match=r"(?s)the code could not be compiled: .*RuntimeError: no such operator"):
        wait(place(fails))


def test_a_child_that_is_killed_is_told_with_its_signal() -> None:
    with pytest.raises(EditsError, match="the compiling process was ended by signal 9"):
        wait(InChild(lambda: os.kill(os.getpid(), signal.SIGKILL)))


def test_a_child_is_ended_and_a_thread_is_left() -> None:
    child = InChild(lambda: time.sleep(END_SECONDS))
    assert not child.done(), "positive control"
    began = time.monotonic()
    child.stop()
    assert time.monotonic() - began < END_SECONDS / 2
    leave = threading.Event()
    thread = InThread(lambda: assert_set(leave))
    thread.stop()
    assert not thread.done()
    leave.set()
    wait(thread)


def assert_set(event: threading.Event) -> None:
    assert event.wait(END_SECONDS)


def test_a_child_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILE_SECONDS", 0.1)
    with pytest.raises(EditsError, match=r"not compiled within 0\.1 s"):
        wait(InChild(lambda: time.sleep(END_SECONDS)))


def test_a_child_gives_way_and_uses_any_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """It also leads a session of its own, so that the compilers that it starts end with it."""
    cores = os.sched_getaffinity(0)

    def check() -> None:
        assert os.getsid(0) == os.getpid()
        assert os.nice(0) >= compiled._NICENESS
        assert os.sched_getaffinity(0) >= cores
        assert "GOMP_CPU_AFFINITY" not in os.environ

    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0")
    os.sched_setaffinity(0, [min(cores)])
    try:
        wait(InChild(check))
    finally:
        os.sched_setaffinity(0, cores)


def test_only_where_cuda_is_not_used_a_child_compiles() -> None:
    assert compiled.can_fork(torch.device("cpu"))
    assert not compiled.can_fork(torch.device("cuda"))
