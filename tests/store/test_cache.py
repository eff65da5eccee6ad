"""A node's copies: whole or not there, downloaded once, and no larger than allowed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.support.fakes import BASE, FlakyBackend
from tests.support.store import PROVENANCE, WHEN, bundle
from vllm_edits.edit_store import Bundle, EditStore, Offset, check
from vllm_edits.edit_store.errors import BundleRefused, NotFound
from vllm_edits.edit_store.reading.cache import NodeCache
from vllm_edits.edit_store.storage.store import blob_key


class Remote(FlakyBackend):
    """Counts the bytes that are asked for, and may answer with other ones."""

    asked = 0
    answer: bytes | None = None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.asked += length
        return super().get_range(key, start, length) if self.answer is None else self.answer[start : start + length]


@pytest.fixture
def store(tmp_path: Path) -> EditStore:
    store = EditStore(f"memory://{tmp_path}", create=True)
    store.backend = Remote(store.backend)
    return store


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "cache")


def files(cache: NodeCache) -> list[Path]:
    folder = cache.folder / "blobs"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_a_version_is_downloaded_once_and_mapped(store: EditStore, cache: NodeCache) -> None:
    version = store.publish(bundle())
    size = bundle().manifest.tensors.size
    for _ in range(3):
        found = cache.bundle(store, version)
        assert found.tensor_bytes[:] == bundle().tensor_bytes
        assert check(found).keys() == check(bundle()).keys()
    assert store.backend.asked == size + 1  # type: ignore[attr-defined]
    assert [path.name for path in files(cache)] == [bundle().manifest.tensors.sha256]


def test_processes_of_a_node_share_one_download(store: EditStore, cache: NodeCache) -> None:
    version, size = store.publish(bundle()), bundle().manifest.tensors.size
    threads = [threading.Thread(target=cache.bundle, args=(store, version)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.backend.asked == size + 1  # type: ignore[attr-defined]


def test_a_large_file_comes_in_pieces_that_are_told(
    store: EditStore, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_edits.edit_store.backends.protocol.PIECE_BYTES", 50)
    version, told = store.publish(bundle()), []
    cache.bundle(store, version, told.append)
    assert sum(told) == bundle().manifest.tensors.size
    assert max(told) == 50


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flipped, "found .* bytes"),
        (lambda data: data[:-1], "truncated, extended or replaced"),
        (lambda _: b"", "found 0 bytes"),
        (lambda data: data + b"more", "found more"),
        (lambda data: data * 1000, "found more"),
    ],
)
def test_other_bytes_are_refused_and_never_kept(store: EditStore, cache: NodeCache, change: object, said: str) -> None:
    """Nor is more read than the manifest names, and one byte."""
    version, data = store.publish(bundle()), bundle().tensor_bytes
    store.backend.answer = change(data)  # type: ignore[attr-defined, operator]
    with pytest.raises(BundleRefused, match=said):
        cache.bundle(store, version)
    assert files(cache) == []
    assert store.backend.asked <= 2 * len(data) + 2  # type: ignore[attr-defined]
    store.backend.answer = None  # type: ignore[attr-defined]
    assert check(cache.bundle(store, version))


def test_a_copy_that_was_cut_off_by_a_crash_is_fetched_anew(store: EditStore, cache: NodeCache) -> None:
    version = store.publish(bundle())
    cache.bundle(store, version)
    (path,) = files(cache)
    path.write_bytes(path.read_bytes()[:-1])
    assert check(cache.bundle(store, version))


def test_a_missing_file_is_named(store: EditStore, cache: NodeCache) -> None:
    version = store.publish(bundle())
    store.backend.delete(blob_key(bundle().manifest.tensors.sha256))
    with pytest.raises(NotFound, match=f"tensors of version {version[:12]} are not in store"):
        cache.bundle(store, version)


def numbered(number: int) -> Bundle:
    edits = [(Offset(site="layers.0.resid"), {"vector": np.full(8, float(number))})]
    return Bundle.create("polite", BASE, edits, PROVENANCE, created_at=WHEN)


def test_the_least_recently_used_go_first(store: EditStore, tmp_path: Path) -> None:
    size = bundle().manifest.tensors.size
    cache = NodeCache(tmp_path / "small", limit_bytes=3 * size)
    versions = [store.publish(numbered(number)) for number in range(5)]
    for version in versions[:3]:
        cache.bundle(store, version)
    mapped = cache.bundle(store, versions[0])
    for version in versions[3:]:
        cache.bundle(store, version)
    kept = {path.name for path in files(cache)}
    assert kept == {numbered(number).manifest.tensors.sha256 for number in (0, 3, 4)}
    cache.bundle(store, versions[1])
    cache.bundle(store, versions[2])
    assert check(mapped), "what is mapped stays readable when its file is gone"


def test_a_local_store_is_read_where_it_lies(tmp_path: Path, cache: NodeCache) -> None:
    store = EditStore(str(tmp_path / "store"), create=True)
    assert check(cache.bundle(store, store.publish(bundle())))
    assert files(cache) == []


def test_the_lock_of_a_killed_process_is_free(store: EditStore, cache: NodeCache) -> None:
    """Locks end with their process: a kill -9 in a download blocks nobody."""
    version, digest = store.publish(bundle()), bundle().manifest.tensors.sha256
    (cache.folder / "locks").mkdir(parents=True)
    lock = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
    hold = f"{lock}; print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", hold, str(cache.folder / "locks" / digest)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
    assert check(cache.bundle(store, version))
