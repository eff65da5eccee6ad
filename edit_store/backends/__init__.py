"""The backends of a store: a local folder (the default), object stores, and memory, with one small protocol."""

from __future__ import annotations

import secrets
from pathlib import Path
from urllib.parse import urlsplit

from vllm_edits.edit_store.backends.local import LocalFolder
from vllm_edits.edit_store.backends.memory import Memory
from vllm_edits.edit_store.backends.objects import SCHEMES, ObjectStore
from vllm_edits.edit_store.backends.protocol import AlreadyExists, Backend, Item, get_many, get_or_none, in_pieces
from vllm_edits.edit_store.errors import StoreUnavailable

__all__ = [
    "PROBES", "AlreadyExists", "Backend", "Item", "LocalFolder", "Memory", "ObjectStore", "get_many", "get_or_none",
    "in_pieces", "open_backend", "require_exclusive_create",
]  # fmt: skip

PROBES = "probes"


def open_backend(url: str) -> Backend:
    """Open the backend for a folder path, or for a file://, s3://, gs://, az:// or memory:// URL."""
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        return LocalFolder(Path(parts.path if parts.scheme else url))
    if parts.scheme == "memory":
        return Memory.shared(url)
    if parts.scheme in SCHEMES:
        return ObjectStore(url)
    known = ", ".join(f"{scheme}://" for scheme in ("file", *SCHEMES, "memory"))
    raise StoreUnavailable(f"cannot open store {url!r}: expected a folder or one of {known}, found {parts.scheme}://")


def require_exclusive_create(backend: Backend) -> None:
    """Test that the second of two creates is refused. StoreUnavailable if it is not.

    Some S3-compatible servers ignore `If-None-Match`, and some file systems have no hard links. There, two promotions
    at the same time would overwrite each other silently. So nothing is written there.
    """
    key = f"{PROBES}/{secrets.token_hex(16)}"
    try:
        backend.create(key, b"first")
        try:
            backend.create(key, b"second")
        except AlreadyExists:
            return
        raise StoreUnavailable(
            f"store {backend.url} cannot be written safely: it does not support create-if-absent (a second write "
            "replaced the first). Use a folder on a local file system, or an object store with conditional writes"
        )
    finally:
        backend.delete(key)
