"""A store backend in this process's memory, for tests. It keeps the protocol honestly; only durability is missing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import ClassVar

from edit_store.backends.protocol import AlreadyExists


class Memory:
    """Objects in a dictionary. `memory://<name>` opened twice is the same store."""

    _shared: ClassVar[dict[str, Memory]] = {}

    def __init__(self, url: str = "memory://") -> None:
        self.url = url
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @classmethod
    def shared(cls, url: str) -> Memory:
        """The one memory store of that URL in this process."""
        return cls._shared.setdefault(url, cls(url))

    def get(self, key: str) -> bytes:
        return self._objects[key]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._objects[key][start : start + length]

    def put(self, key: str, data: bytes) -> None:
        self._objects.setdefault(key, data)

    def create(self, key: str, data: bytes) -> None:
        with self._lock:
            if key in self._objects:
                raise AlreadyExists(key)
            self._objects[key] = data

    def list(self, prefix: str) -> Iterator[str]:
        return iter([key for key in list(self._objects) if key.startswith(prefix)])

    def delete(self, key: str) -> None:
        self._objects.pop(key, None)
