"""A folder as a store backend: durable, atomic, safe with several processes and after a fork. Standard library only.

A new object is written to a temporary file, synced, and then hard-linked to its name. The link fails if the name
exists: this is create-if-absent on every local file system. A rename would overwrite, and an exclusive open would make
an incomplete file visible.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from vllm_edits.edit_store.backends.protocol import AlreadyExists, Item
from vllm_edits.edit_store.errors import StoreUnavailable

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
STAGING = ".staging"
"""The folder of temporary files. `gc` deletes files that a crash left there; `list` does not show them."""


class LocalFolder:
    """Objects as files below `root`."""

    parallel = 1

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.url = str(self.root)

    def get(self, key: str) -> bytes:
        with self._trouble(key):
            return self._path(key).read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._trouble(key), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def put(self, key: str, data: bytes) -> None:
        self._write(key, data, os.replace)

    def create(self, key: str, data: bytes) -> None:
        self._write(key, data, self._link)

    def _link(self, staged: Path, target: Path) -> None:
        try:
            os.link(staged, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise StoreUnavailable(
                f"store {self.url} cannot be written: its file system does not support hard links ({error.strerror}), "
                "as exFAT, FAT and some network mounts. Without hard links, one of two writers could overwrite the "
                "other. Write to a folder on a local Linux file system, or to an object store. Reading works here"
            ) from error

    def _write(self, key: str, data: bytes, name_it: Callable[[Path, Path], None]) -> None:
        target = self._path(key)
        staged = self.root / STAGING / f"{os.getpid()}-{secrets.token_hex(8)}"
        with self._trouble(key):
            _make_folders(staged.parent)
            _make_folders(target.parent)
            try:
                with staged.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    name_it(staged, target)
                except FileExistsError:
                    raise AlreadyExists(key) from None
            finally:
                staged.unlink(missing_ok=True)
            _sync_folder(target.parent)

    def list(self, prefix: str) -> Iterator[Item]:
        folder = self._path(prefix)
        with self._trouble(prefix):
            if folder.is_dir():
                yield from self._below(folder, prefix.rstrip("/"))

    def _below(self, folder: Path, key: str) -> Iterator[Item]:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = f"{key}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    yield from self._below(folder / entry.name, path)
                elif entry.is_file(follow_symlinks=False):
                    try:
                        found = entry.stat()
                    except FileNotFoundError:  # deleted while we looked
                        continue
                    yield Item(path, found.st_size, found.st_mtime)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._trouble(key):
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _sync_folder(path.parent)

    def sweep(self, before: float) -> int:
        """Delete temporary files of crashed writers that are older than `before`; returns their number."""
        swept = 0
        with self._trouble(STAGING):
            for path in (self.root / STAGING).glob("*"):
                if path.stat().st_mtime < before:
                    path.unlink(missing_ok=True)
                    swept += 1
        return swept

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or parts[0] == STAGING:
            raise ValueError(f"not a store key: {key!r}")
        return self.root.joinpath(*parts)

    @contextmanager
    def _trouble(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise KeyError(key) from None
        except OSError as error:
            raise StoreUnavailable(f"store {self.url}: {key}: {error.strerror or error}") from error


def _make_folders(folder: Path) -> None:
    """Create `folder` and sync each new parent entry, so that a crash cannot lose the path to a synced file."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
