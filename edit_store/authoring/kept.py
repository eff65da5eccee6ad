"""Results of the steps of a build, kept until the build has ended well: an interrupted build goes on with them.

They are files in the user's cache folder, in one folder for each build. Its name is a digest of all that decides them:
method, options, seed, model, data, threads, packages, and the source of this package.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256 as hasher
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_edits.edit_store.canonical import canonical_json, sha256
from vllm_edits.edit_store.private_folder import cache_folder

SAVE_SECONDS = 60.0
"""Time after which results are written down again."""
OLD_SECONDS = 30 * 24 * 3600.0
"""Age at which the results of a build that was given up are removed."""


class Kept:
    """Results of one build by the name of their step, as tensors."""

    def __init__(self, folder: Path | None = None) -> None:
        """folder: None to keep nothing."""
        self._folder = folder
        self._names = set[str]()
        self._saved = time.monotonic()

    @classmethod
    def of(cls, decided_by: Mapping[str, Any], cache_at: Path | None = None) -> Kept:
        """The results of the build that these facts decide. What others left long ago is removed."""
        parent = (cache_at or cache_folder()) / "builds"
        folder = parent / sha256(canonical_json({**decided_by, "source": _source()}))[:32]
        for other in parent.glob("*"):
            if other != folder and time.time() - other.stat().st_mtime > OLD_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
        return cls(folder)

    def begin(self, name: str) -> dict[str, Tensor]:
        """The results so far of a step that begins; none if its file is damaged. Each step has a name of its own."""
        if self._folder is None:
            return {}
        if name in self._names:
            raise ValueError(f"two steps of one build are called {name!r}")
        self._names.add(name)
        try:
            return dict(load_file(self._path(name)))
        except (OSError, SafetensorError):
            return {}

    def save(self, name: str, results: Callable[[], Mapping[str, Tensor]], *, ended: bool = False) -> None:
        """Write down the results of a step, if it has ended or a minute has passed."""
        if self._folder is None or (not ended and time.monotonic() - self._saved < SAVE_SECONDS):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        part = path.with_suffix(".part")
        save_file({key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in results().items()}, part)
        part.replace(path)
        self._saved = time.monotonic()

    def forget(self) -> None:
        """Remove all of it."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return Path(self._folder or "") / f"{sha256(name.encode())[:16]}.safetensors"


@cache
def _source() -> str:
    """Digest of the modules of this package: other code may compute something else."""
    digest, root = hasher(), Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
