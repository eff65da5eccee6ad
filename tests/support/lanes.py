"""Tests side by side (`pytest -n 2 --dist loadfile`): each lane on cores of its own, so that none waits for another's.

What divides a model among workers, or runs several engines, wants every core: it waits until the other lanes have ended
the test that they are at, and they wait for it. pytest without `-n` is one lane with every core.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Lane:
    """What one of the processes that run tests has."""

    cores: frozenset[int]
    every_core: frozenset[int]
    lock: Path

    @classmethod
    def of(cls, cores: frozenset[int], number: int, lanes: int, lock: Path) -> Lane:
        """Every `lanes`-th core from the `number`-th on; with more lanes than cores some share one."""
        known = sorted(cores)
        return cls(frozenset(known[number % len(known) :: lanes]), cores, lock)

    @classmethod
    def here(cls) -> Lane | None:
        """The lane that this process is, as pytest-xdist tells it; None where nothing runs beside it."""
        if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is None:
            return None
        lock = Path(tempfile.gettempdir(), f"{os.environ['PYTEST_XDIST_TESTRUNUID']}.lock")
        number, lanes = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        return cls.of(frozenset(os.sched_getaffinity(0)), number, lanes, lock)

    def stay(self) -> None:
        """This process, and what it starts from now on, runs on this lane's cores."""
        os.sched_setaffinity(0, self.cores)

    @contextlib.contextmanager
    def turn(self, *, alone: bool) -> Iterator[None]:
        """For one test: beside others', or alone and with every core."""
        with self.lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            if alone:
                os.sched_setaffinity(0, self.every_core)
            try:
                yield
            finally:
                self.stay()
                fcntl.flock(lock, fcntl.LOCK_UN)  # were it only closed, a child that was forked meanwhile would keep it
