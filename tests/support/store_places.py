"""Where stores of tests live: a folder, or a bucket of a server that runs as long as the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from loadtests.harness.object_servers import BUCKET

Place = Callable[[Path, pytest.MonkeyPatch], AbstractContextManager[str]]
"""Yields a URL below which stores may be made; the environment holds what reaches it."""


@contextmanager
def folder(path: Path, _: pytest.MonkeyPatch) -> Iterator[str]:
    yield str(path / "stores")


def bucket(server: Callable[[Path], AbstractContextManager[dict[str, str]]]) -> Place:
    @contextmanager
    def place(path: Path, patch: pytest.MonkeyPatch) -> Iterator[str]:
        with server(path) as environment:
            for name, value in environment.items():
                patch.setenv(name, value)
            yield f"s3://{BUCKET}/stores"

    return place
