"""Versions that are ready in a worker's memory, so that paging in is a copy and not a read. No vLLM here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Generic, Protocol, TypeVar

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.short_turns import in_daemon


class Ready(Protocol):
    """A version that is ready to be installed."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""


R = TypeVar("R", bound=Ready)


class HostCache(Generic[R]):
    """Reads, checks and converts versions in the background, and keeps them; the least recently used go first.

    Used from the worker's thread. A version that could not be read is forgotten once its error was raised, so that the
    next attempt reads it again.
    """

    def __init__(self, prepare: Callable[[str], R], limit_bytes: int) -> None:
        self._prepare = prepare
        self._limit_bytes = limit_bytes
        self._versions: OrderedDict[str, Future[R]] = OrderedDict()

    def stage(self, version: str) -> None:
        """Begin to read a version, unless it is ready or being read."""
        if version in self._versions:
            return
        try:
            self._versions[version] = in_daemon(partial(self._prepare, version))
        except RuntimeError as error:  # no thread can be started: the error of the reading, which is tried again
            future = self._versions[version] = Future()
            future.set_exception(EditsError(f"version {version[:12]} cannot be read now: {error}"))

    def poll(self, version: str) -> bool:
        """True if a version can be installed; else it is being read. Raises the error of its reading, once.

        A version that was evicted while another worker still read it is read again.
        """
        self.stage(version)
        future = self._versions[version]
        if not future.done():
            return False
        if future.exception() is not None:
            del self._versions[version]
        future.result()
        self._shrink(version)
        return True

    def get(self, version: str) -> R | None:
        """A ready version, which becomes the most recently used one; None when it is not ready."""
        future = self._versions.get(version)
        if future is None or not future.done() or future.exception() is not None:
            return None
        self._versions.move_to_end(version)
        return future.result()

    def _shrink(self, newest: str) -> None:
        self._versions.move_to_end(newest)
        ready = [(name, future.result().nbytes) for name, future in self._versions.items()
                 if future.done() and future.exception() is None]  # fmt: skip
        excess = sum(size for _, size in ready) - self._limit_bytes
        for name, size in ready[:-1]:
            if excess <= 0:
                break
            del self._versions[name]
            excess -= size
