"""What a store asks of the place where its objects live."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

PIECE_BYTES = 8 << 20


class AlreadyExists(Exception):
    """`create` found an object at that key. An answer, not an error: somebody else was first."""


@dataclass(frozen=True)
class Item:
    """An object as a listing shows it."""

    key: str
    size: int
    modified: float
    """seconds since the epoch, by the clock of whoever keeps the object"""


class Backend(Protocol):
    """Objects by key: relative paths with '/'. A missing key is KeyError; trouble is StoreUnavailable."""

    url: str
    parallel: int
    """how many reads are worth having under way at once"""

    def get(self, key: str) -> bytes:
        """The whole object."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the object ends before."""

    def put(self, key: str, data: bytes) -> None:
        """Write an object that has only one possible content (its key is its digest): writing it twice is harmless."""

    def create(self, key: str, data: bytes) -> None:
        """Write an object only if there is none at that key, atomically and durably; else AlreadyExists."""

    def list(self, prefix: str) -> Iterator[Item]:
        """Objects below `prefix`, a folder ending in '/', in any order."""

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""


def get_or_none(backend: Backend, key: str) -> bytes | None:
    """The whole object, or None where there is none."""
    try:
        return backend.get(key)
    except KeyError:
        return None


def get_many(backend: Backend, keys: Sequence[str]) -> Iterator[bytes]:
    """The objects at `keys`, in their order, as many at once as the backend is good for."""
    if backend.parallel == 1 or len(keys) < 2:
        yield from map(backend.get, keys)
        return
    with ThreadPoolExecutor(backend.parallel) as pool:
        yield from pool.map(backend.get, keys)


def in_pieces(backend: Backend, key: str, size: int) -> Iterator[bytes]:
    """An object that ought to have `size` bytes, piece by piece.

    One byte more than is expected is asked for at the end, so that an object that goes on shows; never more than that.
    """
    start = 0
    while start < size:
        wanted = min(PIECE_BYTES, size - start)
        piece = backend.get_range(key, start, wanted + (start + wanted == size))
        if not piece:
            return
        yield piece
        start += len(piece)
