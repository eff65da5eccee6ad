"""Stores and bundles, as tests of the store make them."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from tests.support.fakes import BASE
from vllm_edits.edit_store import Bundle, EditStore, Offset, Provenance
from vllm_edits.edit_store.backends import AlreadyExists, Backend

PROVENANCE = Provenance(tool="tests", method="by hand")


WHEN = datetime(2026, 1, 1, tzinfo=UTC)


def create() -> Bundle:
    edits = [(Offset(site="layers.0.resid"), {"vector": np.full(8, 0.5)})]
    return Bundle.create("polite", BASE, edits, PROVENANCE, created_at=WHEN)


MADE = create()


def bundle(label: str = "1") -> Bundle:
    """Bundles of different labels are different versions with the same numbers."""
    return Bundle(MADE.manifest.model_copy(update={"label": label}), MADE.tensor_bytes)


def promoted(store: EditStore, *labels: str) -> list[str]:
    """Publish and promote a version for each label; returns the versions."""
    versions = [store.publish(bundle(label)) for label in labels]
    for version in versions:
        store.promote(f"polite@{version}")
    return versions


def keeps_the_protocol(backend: Backend) -> None:
    """What every backend promises, on whatever it stands."""
    backend.create("a/one", b"12345")
    backend.put("a/b/two", b"2")
    backend.put("ab/three", b"3")
    assert backend.get("a/one") == b"12345"
    assert backend.get_range("a/one", 1, 3) == b"234"
    assert backend.get_range("a/one", 3, 9) == b"45"
    assert sorted((item.key, item.size) for item in backend.list("a/")) == [("a/b/two", 1), ("a/one", 5)]
    assert list(backend.list("nothing/")) == []
    with pytest.raises(AlreadyExists):
        backend.create("a/one", b"other")
    assert backend.get("a/one") == b"12345"
    backend.put("a/b/two", b"again")
    assert backend.get("a/b/two") == b"again"
    backend.delete("a/one")
    backend.delete("a/one")
    for read in (backend.get, lambda key: backend.get_range(key, 0, 1)):
        with pytest.raises(KeyError, match="a/one"):
            read("a/one")


def keys(store: EditStore) -> set[str]:
    prefixes = ("blobs/", "manifests/", "versions/", "tags/")
    return {item.key for prefix in prefixes for item in store.backend.list(prefix)}
