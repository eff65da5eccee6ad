"""Identity and sizes of a base model on disk: the digests of its weight files and of its config.

Hashing gigabytes takes time. So the digest of each file is cached, by path, size and modification time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_edits.edit_store.architectures import ARCHITECTURES, Architecture
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.canonical import canonical_json, sha256
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.edit_store.private_folder import cache_folder
from vllm_edits.edit_store.progress import BytesDone
from vllm_edits.edit_store.sites import Widths

_CHUNK = 1 << 22
CONFIG_FILE = "config.json"


def identify(
    folder: Path,
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    progress: BytesDone | None = None,
) -> BaseModelRef:
    """Identify the model in `folder`: its weights by the digests of their files, its config by its content.

    config: the config with which the model runs, if it differs from config.json in the folder.
    progress: called with the number of bytes that were just hashed.
    """
    config = read_config(folder) if config is None else config
    weights = weight_files(folder)
    memo = _Memo((cache or cache_folder()) / "file-digests.json")
    files = {path.name: memo.digest(path, progress) for path in weights}
    memo.save()
    files[CONFIG_FILE] = sha256(canonical_json(_computation(config)))
    architecture = (config.get("architectures") or ["unknown"])[0]
    return BaseModelRef(
        name=name or str(config.get("_name_or_path") or folder.name),
        architecture=architecture,
        widths=widths_of(config),
        biased=biased_points(weights, ARCHITECTURES.get(architecture, Architecture(architecture))),
        files=files,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json. UnsupportedHost if it is missing or invalid."""
    path = folder / CONFIG_FILE
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        found = None
    except ValueError as error:
        raise UnsupportedHost(f"{path} is not JSON: {error}. Fetch the checkpoint again") from error
    if not isinstance(found, dict):
        raise UnsupportedHost(
            f"expected {CONFIG_FILE} with a JSON object in {folder}. Name a folder with a safetensors checkpoint"
        )
    return found


INDEX_FILE, SINGLE_FILE, _SHARD = "model.safetensors.index.json", "model.safetensors", "model-*-of-*.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: those in its index, else the single one.

    The folder may also contain an adapter, or the same weights in another layout (consolidated.safetensors).
    UnsupportedHost if the weight files are not clear, or if one is missing.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if absent := [each for each in names if not (folder / each).is_file()]:
            raise UnsupportedHost(
                f"{index} names {', '.join(absent)}, but {folder} does not contain it. Fetch the checkpoint again"
            )
        return [folder / each for each in names]
    found = sorted(folder.glob("*.safetensors"))
    if folder / SINGLE_FILE in found:
        return [folder / SINGLE_FILE]
    if shards := sorted(folder.glob(_SHARD)):
        return shards
    if len(found) == 1:
        return found
    raise UnsupportedHost(
        f"expected {INDEX_FILE}, {SINGLE_FILE} or one other *.safetensors in {folder}, found "
        f"{', '.join(path.name for path in found) or 'none'}. Name a folder with a safetensors checkpoint"
    )


_FORM = {"_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "use_cache"}
"""Keys of a config that do not change the computation. The dtype is decided by the server's --dtype, not the file."""


def _computation(config: Any) -> Any:
    """The part of a config that determines the computation, at every depth."""
    if isinstance(config, Mapping):
        return {key: _computation(value) for key, value in config.items() if key not in _FORM}
    if isinstance(config, list):
        return [_computation(each) for each in config]
    # Canonical JSON has no other numbers than those of JavaScript.
    if isinstance(config, float | int) and not (math.isfinite(config) and abs(config) <= 2**53):
        return repr(config)
    return config


def widths_of(config: Mapping[str, Any]) -> Widths:
    """Sizes from a Hugging Face config. If the config nests the text model, its sizes."""
    config = config.get("text_config", config)

    def size(name: str, old_name: str) -> int:
        return int(config[name] if name in config else config[old_name])

    heads, hidden = size("num_attention_heads", "n_head"), size("hidden_size", "n_embd")
    return Widths(
        layers=size("num_hidden_layers", "n_layer"),
        hidden=hidden,
        mlp=config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab=config["vocab_size"],
    )


def biased_points(weights: Iterable[Path], architecture: Architecture) -> tuple[str, ...]:
    """Points where a projection of the checkpoint adds a bias, by the names of its tensors."""
    names = [name for path in weights for name in tensor_entries(path)[0]]
    found = {
        point for path, points in architecture.modules().items() for point in points
        if any(name.endswith(f".{path}.bias") for name in names)
    }  # fmt: skip
    return tuple(sorted(found))


def tensor_entries(path: Path) -> tuple[dict[str, Any], int]:
    """The header entry of each tensor in a safetensors file, and the offset where the data begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


class _Memo:
    """Cached digests: {path: [size, mtime_ns, sha256]}. If the cache is lost or broken, files are hashed again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list[Any]] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            self._known = {}

    def digest(self, path: Path, progress: BytesDone | None) -> str:
        status = path.stat()
        key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        known = self._known.get(key)
        if known is not None and known[:2] == stamp:
            if progress is not None:
                progress(status.st_size)
            return str(known[2])
        hasher = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
                if progress is not None:
                    progress(len(chunk))
        self._known[key] = [*stamp, hasher.hexdigest()]
        return hasher.hexdigest()

    def save(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self._known))
            temporary.replace(self._path)
        except OSError:
            return  # a read-only home only means hashing again next time
