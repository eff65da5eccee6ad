"""A store backend in this process's memory, for tests. It implements the whole protocol, except durability."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import ClassVar

from vllm_edits.edit_store.backends.protocol import AlreadyExists, Item


class Memory:
    """Objects in a dictionary. `memory://<name>` opened twice is the same store."""

    parallel = 1
    _shared: ClassVar[dict[str, Memory]] = {}

    def __init__(self, url: str = "memory://") -> None:
        self.url = url
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()

    @classmethod
    def shared(cls, url: str) -> Memory:
        """The memory store with this URL in this process."""
        return cls._shared.setdefault(url, cls(url))

    def get(self, key: str) -> bytes:
        return self._objects[key][0]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.get(key)[start : start + length]

    def put(self, key: str, data: bytes) -> None:
        self._objects[key] = data, time.time()

    def create(self, key: str, data: bytes) -> None:
        with self._lock:
            if key in self._objects:
                raise AlreadyExists(key)
            self._objects[key] = data, time.time()

    def list(self, prefix: str) -> Iterator[Item]:
        found = [(key, *value) for key, value in list(self._objects.items()) if key.startswith(prefix)]
        return (Item(key, len(data), modified) for key, data, modified in found)

    def delete(self, key: str) -> None:
        self._objects.pop(key, None)
