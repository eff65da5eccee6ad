"""An S3, Google Cloud Storage or Azure bucket as a store backend, through `obstore` (the extra `cloud`).

Credentials, regions and endpoints come from each cloud's usual environment variables. The client is made at the first
use, never at import. Its threads do not survive a fork: so a process that was forked later gets an error instead of
hanging.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from vllm_edits.edit_store.backends.protocol import AlreadyExists, Item
from vllm_edits.edit_store.errors import StoreUnavailable

SCHEMES = ("s3", "gs", "az")
PARALLEL = 16
LIST_PAGE = 1000
REQUEST_SECONDS = 30
RETRIES = 3
RETRY_SECONDS = 60


class ObjectStore:
    """Objects below a `scheme://bucket/prefix` URL."""

    parallel = PARALLEL

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._client: Any = None
        self._opened_by = 0

    def get(self, key: str) -> bytes:
        import obstore

        with self._trouble(key) as client:
            return bytes(obstore.get(client, key).bytes())

    def get_range(self, key: str, start: int, length: int) -> bytes:
        import obstore

        with self._trouble(key) as client:
            return bytes(obstore.get_range(client, key, start=start, length=length))

    def put(self, key: str, data: bytes) -> None:
        import obstore

        with self._trouble(key, missing=False) as client:
            obstore.put(client, key, data)

    def create(self, key: str, data: bytes) -> None:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._trouble(key, missing=False) as client:
            try:
                obstore.put(client, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                raise AlreadyExists(key) from None

    def list(self, prefix: str) -> Iterator[Item]:
        import obstore

        with self._trouble(prefix) as client:
            for page in obstore.list(client, prefix, chunk_size=LIST_PAGE):
                for found in page:
                    yield Item(found["path"], found["size"], found["last_modified"].timestamp())

    def delete(self, key: str) -> None:
        import obstore

        with self._trouble(key) as client:
            try:
                obstore.delete(client, key)
            except FileNotFoundError:
                return

    @contextmanager
    def _trouble(self, key: str, *, missing: bool = True) -> Iterator[Any]:
        """Yield the client and translate its errors. With `missing`, a missing object is a KeyError."""
        client = self._open()
        from obstore.exceptions import BaseError, NotFoundError

        try:
            yield client
        except (FileNotFoundError, NotFoundError) as error:
            if missing:
                raise KeyError(key) from None
            raise StoreUnavailable(
                f"the bucket of store {self.url} was not found: {_first_line(error)}. Create it, or correct the URL"
            ) from error
        except (BaseError, OSError, ValueError) as error:
            raise StoreUnavailable(f"store {self.url}: {key}: {_first_line(error)}") from error

    def _open(self) -> Any:
        if self._client is not None and self._opened_by != os.getpid():
            raise StoreUnavailable(
                f"store {self.url} was opened before this process was forked, and its client does not work after a "
                "fork. Open the store after the fork, or start processes with the method `spawn`"
            )
        if self._client is None:
            try:
                from obstore.store import from_url
            except ImportError:
                raise StoreUnavailable(
                    f"store {self.url} needs the package obstore, which is not installed. Install vllm-edits[cloud]"
                ) from None
            # Plain HTTP only if the operator's own endpoint begins with http://.
            plain = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", "")).startswith("http://")
            timeout = timedelta(seconds=REQUEST_SECONDS)
            try:
                self._client = from_url(
                    self.url,
                    client_options={"timeout": timeout, **({"allow_http": True} if plain else {})},
                    retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
                )
            except Exception as error:
                raise StoreUnavailable(f"store {self.url} cannot be opened: {_first_line(error)}") from error
            self._opened_by = os.getpid()
        return self._client


def _first_line(error: Exception) -> str:
    """The first line of an error. The following lines describe the client's internal state."""
    return str(error).strip().split("\n", 1)[0]
