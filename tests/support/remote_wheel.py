"""Single files out of a wheel on a package index, without fetching the wheel."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

_BLOCK = 1 << 18


class _Remote(io.RawIOBase):
    """A file behind an address, read in blocks where somebody looks."""

    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client = client
        self._url = url
        self._blocks: dict[int, bytes] = {}
        self._at = 0
        answer = self._client.get(url, headers={"Range": "bytes=0-0"})
        answer.raise_for_status()
        if answer.status_code != httpx.codes.PARTIAL_CONTENT:
            raise OSError(f"{url}: the index gives no parts of files")
        self._size = int(answer.headers["content-range"].rpartition("/")[2])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        number, start = divmod(self._at, _BLOCK)
        if number not in self._blocks:
            end = min((number + 1) * _BLOCK, self._size) - 1
            wanted = {"Range": f"bytes={number * _BLOCK}-{end}"} if end >= number * _BLOCK else None
            self._blocks[number] = self._client.get(self._url, headers=wanted).content if wanted else b""
        found = self._blocks[number][start : start + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


@contextmanager
def wheel_of(requirement: str) -> Iterator[tuple[str, Callable[[str], str | None]]]:
    """Version and files of what pip would install for a requirement, by their path in the wheel."""
    ask = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed",
           "--only-binary", ":all:", "--report", "-", requirement]  # fmt: skip
    report = json.loads(subprocess.run(ask, check=True, capture_output=True).stdout)
    (found,) = report["install"]
    with (
        httpx.Client(follow_redirects=True, timeout=60) as client,
        io.BufferedReader(_Remote(client, found["download_info"]["url"]), _BLOCK) as file,
        zipfile.ZipFile(file) as wheel,
    ):
        yield found["metadata"]["version"], lambda path: wheel.read(path).decode() if path in wheel.namelist() else None
