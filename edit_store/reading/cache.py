"""A node's copies of remote versions. Each is downloaded once, checked while it arrives, and shared by all processes.

    <folder>/blobs/<digest>     tensor files, mapped read-only by every worker of the node
    <folder>/locks/<digest>     held by the process that downloads

A file appears under its digest only after all its bytes were checked. When the folder exceeds its limit, the least
recently used files are deleted. A deleted file that is in use stays readable, because it is mapped.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_edits.edit_store.backends import LocalFolder, in_pieces
from vllm_edits.edit_store.bundle import BlobRef, Bundle
from vllm_edits.edit_store.errors import BundleRefused, NotFound, Reason
from vllm_edits.edit_store.private_folder import cache_folder
from vllm_edits.edit_store.progress import BytesDone
from vllm_edits.edit_store.storage.store import EditStore, blob_key
from vllm_edits.edit_store.tensor_file import MAX_TENSOR_FILE_BYTES

DEFAULT_LIMIT_BYTES = 10 << 30


class NodeCache:
    """Tensor files of remote stores in a folder of this node. A local store is read directly."""

    def __init__(self, folder: Path | None = None, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.folder = folder or cache_folder()
        self._limit = limit_bytes

    def bundle(self, store: EditStore, version: str, progress: BytesDone = lambda _: None) -> Bundle:
        """A version with its tensors mapped from this node's copy. The caller must check it with `verify.check`."""
        if isinstance(store.backend, LocalFolder):
            return store.bundle(version)
        manifest = store.manifest(version)
        path = self._fetch(store, manifest.tensors, f"tensors of version {version[:12]}", progress)
        with path.open("rb") as file:
            return Bundle(manifest, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def _fetch(self, store: EditStore, blob: BlobRef, what: str, progress: BytesDone) -> Path:
        path = self.folder / "blobs" / blob.sha256
        with self._locked(blob.sha256):
            if path.is_file() and path.stat().st_size == blob.size:
                os.utime(path)
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            staged = path.with_name(f".{blob.sha256}.{os.getpid()}.{secrets.token_hex(4)}")
            try:
                self._download(store, blob, what, staged, progress)
                staged.replace(path)
            finally:
                staged.unlink(missing_ok=True)
        self._evict(keep=blob.sha256)
        return path

    def _download(self, store: EditStore, blob: BlobRef, what: str, target: Path, progress: BytesDone) -> None:
        if not 0 < blob.size <= MAX_TENSOR_FILE_BYTES:
            reason = Reason("too_large", f"expected 1 to {MAX_TENSOR_FILE_BYTES} bytes, found {blob.size}")
            raise BundleRefused(what, [reason])
        digest, size = hashlib.sha256(), 0
        with target.open("xb") as file:
            try:
                for piece in in_pieces(store.backend, blob_key(blob.sha256), blob.size):
                    size += len(piece)
                    digest.update(piece)
                    file.write(piece)
                    progress(len(piece))
            except KeyError:
                raise NotFound(f"{what} are not in store {store.url}. Publish the version again from a copy") from None
            file.flush()
            os.fsync(file.fileno())
        if size != blob.size or digest.hexdigest() != blob.sha256:
            found = "more" if size > blob.size else f"{size} bytes {digest.hexdigest()[:12]}"
            reason = Reason(
                "digest",
                f"expected {blob}, as the manifest says, found {found}: the file was truncated, extended or replaced",
            )
            raise BundleRefused(what, [reason])

    @contextmanager
    def _locked(self, digest: str) -> Iterator[None]:
        """Let one process of the node in at a time. The lock ends with its process."""
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / digest).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _evict(self, keep: str) -> None:
        files = []
        for path in (self.folder / "blobs").iterdir():
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            files.append((found.st_mtime, found.st_size, path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used <= self._limit:
                return
            if path.name != keep and not path.name.startswith("."):
                path.unlink(missing_ok=True)
                used -= size
