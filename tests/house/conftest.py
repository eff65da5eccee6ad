"""What tests of the documents share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.documents.sandbox import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("documents"))
    yield made
    made.close()
