"""Thousands of mutated bundles: each is refused with a reason or is still valid, none crashes, none eats memory."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.store import bundle
from vllm_edits.edit_store import Bundle, EditStore, Manifest, check
from vllm_edits.edit_store.bundle import MANIFEST_FILE, TENSORS_FILE, BlobRef
from vllm_edits.edit_store.canonical import canonical_json
from vllm_edits.edit_store.errors import BundleRefused, EditsError
from vllm_edits.edit_store.storage.store import manifest_key

MEMORY_BYTES = 32 << 20
Random = np.random.Generator
MANIFEST, TENSORS = bundle().manifest.to_bytes(), bundle().tensor_bytes
HEADER = int.from_bytes(TENSORS[:8], "little")


def flip(data: bytes, random: Random) -> bytes:
    at = int(random.integers(len(data)))
    return data[:at] + bytes([data[at] ^ (1 << int(random.integers(8)))]) + data[at + 1 :]


def cut(data: bytes, random: Random) -> bytes:
    return data[: int(random.integers(len(data)))]


def extend(data: bytes, random: Random) -> bytes:
    return data + random.bytes(int(random.integers(1, 100)))


def shuffle(data: bytes, random: Random) -> bytes:
    at, size = (int(random.integers(len(data))) for _ in range(2))
    return data[:at] + data[at + size :] + data[at : at + size]


def lie_about_length(data: bytes, random: Random) -> bytes:
    return int(random.integers(2**63, dtype=np.uint64)).to_bytes(8, "little") + data[8:]


def hostile_header(data: bytes, random: Random) -> bytes:
    """Another header over the same numbers."""
    header = json.loads(data[8 : 8 + HEADER])
    name = next(key for key in header if key != "__metadata__")
    entry = header[name]
    hostile = [
        {"dtype": "F64"}, {"dtype": ["F32"]}, {"shape": [2**62]}, {"shape": [2**31, 2**31]}, {"shape": []},
        {"shape": [-8]}, {"shape": [8.0]}, {"shape": ["8"]}, {"shape": [True]}, {"shape": None}, {"data_offsets": [0]},
        {"data_offsets": [0, 2**63]}, {"data_offsets": [-4, 28]}, {"data_offsets": [32, 0]}, {"extra": 1},
    ]  # fmt: skip
    choice = hostile[int(random.integers(len(hostile)))]
    if random.random() < 0.2:
        header = {f"tensor-{number}": entry for number in range(2000)}
    elif random.random() < 0.2:
        header = {"../" * 50 + name: entry}
    else:
        header[name] = {**entry, **choice}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + HEADER :]


def deep_header(data: bytes, random: Random) -> bytes:
    text = b'{"a":' + b"[" * int(random.integers(1000, 200_000))
    return len(text).to_bytes(8, "little") + text + data[8 + HEADER :]


def poison(data: bytes, random: Random) -> bytes:
    """NaN or infinity somewhere in the numbers."""
    at = 8 + HEADER + 4 * int(random.integers((len(data) - 8 - HEADER) // 4))
    value = np.array([np.nan, np.inf, -np.inf][int(random.integers(3))], dtype="<f4").tobytes()
    return data[:at] + value + data[at + 4 :]


def change_field(data: bytes, random: Random) -> bytes:
    """A manifest in canonical form whose fields say something else."""
    manifest = json.loads(data)
    hostile: list[tuple[str, object]] = [
        ("schema_version", 2), ("schema_version", "1"), ("name", "../../etc"), ("name", "A" * 5000), ("name", None),
        ("edits", []), ("edits", [{"kind": "exec", "site": "layers.0.resid"}]),
        ("edits", [{"kind": "offset", "site": "layers.0.resid"}] * 500),
        ("edits", [{"kind": "offset", "site": "layers.99999999999.resid"}]),
        ("edits", [{"kind": "offset", "site": "layers.0.mlp.out"}]),
        ("edits", [{"kind": "low_rank", "site": "layers.0.mlp.out", "reads": "layers.0.mlp.h", "rank": 2**40}]),
        ("edits", [{"kind": "subspace_filter", "site": "layers.0.resid", "rank": -1}]),
        ("tensors", {"sha256": "0" * 64, "size": 2**60}), ("tensors", {"sha256": "../x", "size": 1}),
        ("created_at", "yesterday"), ("base", {}), ("surprise", True), ("measurements", "good"),
        ("provenance", {"tool": "t", "method": "m", "parameters": {"a": 1}}), ("description", "\ud800"),
    ]  # fmt: skip
    field, value = hostile[int(random.integers(len(hostile)))]
    manifest[field] = value
    try:
        return canonical_json(manifest)
    except ValueError:  # what RFC 8785 cannot spell
        return json.dumps(manifest).encode()


def deep_json(data: bytes, random: Random) -> bytes:
    return data[:0] + b'{"name":' + b"[" * int(random.integers(1000, 500_000))


ON_BOTH = [flip, cut, extend, shuffle]
ON_TENSORS = [*ON_BOTH, lie_about_length, hostile_header, deep_header, poison]
ON_MANIFEST = [*ON_BOTH, change_field, deep_json]
Mutation = Callable[[bytes, Random], bytes]


def read(manifest: bytes, tensors: bytes) -> None:
    """All that a server does with a bundle before it touches the model."""
    check(Bundle(Manifest.from_bytes(manifest), tensors))


@pytest.mark.long
@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutants_are_refused_with_a_reason(count: int) -> None:
    """Tensors are mutated under a manifest that names them as they are, and under one that names the mutant."""
    read(MANIFEST, TENSORS)
    random = np.random.default_rng(count)
    told: Counter[str] = Counter()
    survivors = 0
    tracemalloc.start()
    try:
        for number in range(count):
            manifest, tensors = MANIFEST, TENSORS
            before = sum(told.values())
            if number % 2:
                mutate: Mutation = ON_MANIFEST[number // 2 % len(ON_MANIFEST)]
                manifest = mutate(MANIFEST, random)
            else:
                mutate = ON_TENSORS[number // 2 % len(ON_TENSORS)]
                tensors = mutate(TENSORS, random)
                if random.random() < 0.7:  # a careful attacker: digest and size fit
                    manifest = bundle().manifest.model_copy(update={"tensors": BlobRef.of(tensors)}).to_bytes()
            try:
                read(manifest, tensors)
            except BundleRefused as refusal:
                told.update(reason.code for reason in refusal.reasons)
                reasons = sum(told.values()) - before
                if not reasons:
                    pytest.fail(f"mutant {number} of {mutate.__name__} was refused without a reason")
            else:
                survivors += 1
                assert mutate in (*ON_BOTH, change_field), f"mutant {number} of {mutate.__name__} was taken"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BYTES, f"{peak} bytes at the worst moment"
    assert survivors < count / 4, "flipped numbers are other valid numbers; more would be a hole"
    assert {"digest", "not_json", "tensor_file", "not_finite", "dtype", "too_large", "unknown_kind"} <= set(told), told


@pytest.mark.parametrize("name", [MANIFEST_FILE, TENSORS_FILE])
def test_a_folder_with_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    bundle().save(tmp_path)
    with (tmp_path / name).open("r+b") as file:
        file.truncate(3 << 30)  # sparse: it takes no room on the disk, but would in memory
    tracemalloc.start()
    try:
        with pytest.raises(BundleRefused, match="too_large"):
            Bundle.load(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()


def test_swapped_objects_of_a_store_are_refused(tmp_path: Path) -> None:
    """Two valid manifests exchanged in place: each is at a digest that is not its own."""
    store = EditStore(str(tmp_path / "store"), create=True)
    first, second = (store.publish(bundle(label)) for label in "12")
    manifests = [store.backend.get(manifest_key(version)) for version in (first, second)]
    store.backend.put(manifest_key(first), manifests[1])
    store.backend.put(manifest_key(second), manifests[0])
    for version in (first, second):
        with pytest.raises(EditsError, match="has the digest"):
            store.manifest(version)
