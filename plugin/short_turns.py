"""Work in a thread beside a loop that must not wait: steps of the engine, or streams of a server.

A thread that wants Python's lock waits until the one that has it lets go, or for the switch interval, which is 5 ms:
longer than a step takes on a GPU.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

TURN_SECONDS = 0.0002
_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Turns:
    """The process's switch interval, short for as long as one piece of work wants it so."""

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
    """Have every thread of the process give Python's lock away after a fifth of a millisecond, if another wants it."""
    _TURNS.shorten()
    try:
        yield
    finally:
        _TURNS.lengthen()


async def in_thread(work: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """What `work` returns, done in a thread in short turns."""

    def do() -> _T:
        with short_turns():
            return work(*arguments, **named)

    return await asyncio.to_thread(do)
