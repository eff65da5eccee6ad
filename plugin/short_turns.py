"""Runs work in a thread without delaying the main loop: steps of the engine, or streams of a server.

A thread that waits for Python's lock may wait for the switch interval. By default it is 5 ms, longer than a step on a
GPU.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

TURN_SECONDS = 0.0002
_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Turns:
    """The switch interval of the process. It is short while any work runs."""

    def __init__(self) -> None:
        self._lock, self._working, self._usual = threading.Lock(), 0, 0.0

    def shorten(self) -> None:
        with self._lock:
            if not self._working:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(min(TURN_SECONDS, self._usual))
            self._working += 1

    def lengthen(self) -> None:
        with self._lock:
            self._working -= 1
            if not self._working:
                sys.setswitchinterval(self._usual)


_TURNS = _Turns()


@contextmanager
def short_turns() -> Iterator[None]:
    """Shorten the switch interval to 0.2 ms, so that other threads get Python's lock soon."""
    _TURNS.shorten()
    try:
        yield
    finally:
        _TURNS.lengthen()


def in_daemon(work: Callable[[], _T]) -> Future[_T]:
    """Run `work` in a daemon thread with a short switch interval; returns its future result.

    A daemon, so that a store which does not answer keeps no process from ending. RuntimeError if none can be started.
    """
    future: Future[_T] = Future()

    def do() -> None:
        try:
            with short_turns():
                result = work()
        except BaseException as error:  # noqa: BLE001  raised when a caller asks for the result
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=do, daemon=True).start()
    return future


async def in_thread(work: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """Run `work` in a thread with a short switch interval; returns its result."""

    def do() -> _T:
        with short_turns():
            return work(*arguments, **named)

    return await asyncio.to_thread(do)
