"""What a store asks of the place where its objects live."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from edit_store.errors import StoreUnavailable


class AlreadyExists(Exception):
    """`create` found an object at that key. An answer, not an error: somebody else was first."""


class Backend(Protocol):
    """Objects by key: relative paths with '/'. A missing key is KeyError; trouble is StoreUnavailable."""

    url: str

    def get(self, key: str) -> bytes:
        """The whole object."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`."""

    def put(self, key: str, data: bytes) -> None:
        """Write an object that has only one possible content (its key is its digest): writing it twice is harmless."""

    def create(self, key: str, data: bytes) -> None:
        """Write an object only if there is none at that key, atomically and durably; else AlreadyExists."""

    def list(self, prefix: str) -> Iterator[str]:
        """Keys below `prefix`, a folder ending in '/', in any order."""

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""


def open_backend(url: str) -> Backend:
    """The backend for a folder path, a file:// URL or memory://."""
    from edit_store.backends.local import LocalFolder
    from edit_store.backends.memory import Memory

    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return LocalFolder(Path(parts.path if parts.scheme else url))
    if parts.scheme == "memory":
        return Memory.shared(url)
    raise StoreUnavailable(
        f"cannot open store {url!r}: expected a folder, file:// or memory://, found {parts.scheme}://"
    )
