"""The protocol of a store's backend: objects by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

PIECE_BYTES = 8 << 20


class AlreadyExists(Exception):
    """`create` found an object at this key, because another writer was first. It is an answer, not an error."""


@dataclass(frozen=True)
class Item:
    """An object in a listing."""

    key: str
    size: int
    modified: float
    """seconds since the epoch, by the clock of the backend"""


class Backend(Protocol):
    """Objects by key: relative paths with '/'. A missing key is a KeyError; any other failure is StoreUnavailable."""

    url: str
    parallel: int
    """number of reads that are worth running at the same time"""

    def get(self, key: str) -> bytes:
        """The whole object."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, or fewer if the object ends before."""

    def put(self, key: str, data: bytes) -> None:
        """Write an object whose key determines its content, for example its digest. Writing it again is harmless."""

    def create(self, key: str, data: bytes) -> None:
        """Write an object atomically and durably if the key is free. Else AlreadyExists."""

    def list(self, prefix: str) -> Iterator[Item]:
        """Objects below `prefix`, a folder ending in '/', in any order."""

    def delete(self, key: str) -> None:
        """Remove an object. A missing object is not an error."""


def get_or_none(backend: Backend, key: str) -> bytes | None:
    """The whole object, or None if it does not exist."""
    try:
        return backend.get(key)
    except KeyError:
        return None


def get_many(backend: Backend, keys: Sequence[str]) -> Iterator[bytes]:
    """The objects at `keys`, in their order, read in parallel if the backend profits from it."""
    if backend.parallel == 1 or len(keys) < 2:
        yield from map(backend.get, keys)
        return
    with ThreadPoolExecutor(backend.parallel) as pool:
        yield from pool.map(backend.get, keys)


def in_pieces(backend: Backend, key: str, size: int) -> Iterator[bytes]:
    """Read an object with an expected size of `size` bytes, piece by piece.

    The last read asks for one byte more, so that a longer object is noticed. It never reads more than that.
    """
    start = 0
    while start < size:
        wanted = min(PIECE_BYTES, size - start)
        piece = backend.get_range(key, start, wanted + (start + wanted == size))
        if not piece:
            return
        yield piece
        start += len(piece)
