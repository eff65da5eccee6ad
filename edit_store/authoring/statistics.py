"""Second moments of what passes a site while the model reads texts: streamed, kept on disk, and resumed.

They depend on the base model, the site and the texts alone, so every edit of a model shares them. They are kept in the
user's cache folder: a build that was interrupted continues behind the last texts that were written down.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_edits.edit_store.authoring.host import Host
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.canonical import canonical_json, sha256
from vllm_edits.edit_store.private_folder import cache_folder
from vllm_edits.edit_store.progress import StepDone

TEXTS_AT_ONCE = 64
SAVE_SECONDS = 60.0
"""Time after which the sums so far are written down; a large model's take a gigabyte a layer."""
_FORMAT = "1"


@dataclass(frozen=True)
class Moments:
    """Sums over `count` tokens of the vectors x at a site."""

    count: int
    total: Tensor
    """sum of x, [width]"""
    products: Tensor
    """sum of x x^T, [width, width], in float32"""

    @property
    def mean(self) -> Tensor:
        """Mean of x, [width]."""
        return self.total / self.count

    @property
    def second(self) -> Tensor:
        """Uncentred second moment, mean of x x^T, [width, width]."""
        return self.products / self.count

    @property
    def covariance(self) -> Tensor:
        """Mean of (x - mean)(x - mean)^T, [width, width]."""
        return self.second - torch.outer(self.mean, self.mean)


def unused_directions(moments: Moments, threshold: float) -> Tensor:
    """Orthonormal columns U `[width, n]` in which the second moment is below the threshold; P = U U^T."""
    energy, directions = torch.linalg.eigh(moments.second.double())
    unused: Tensor = directions[:, energy < threshold].to(moments.second.dtype)
    return unused.contiguous()


class Statistics:
    """Statistics of one model with one set of edits already in place, kept in a folder."""

    def __init__(
        self, host: Host, base: BaseModelRef, step: StepDone, *, edited_by: str = "", folder: Path | None = None
    ) -> None:
        """edited_by: the version that the model is edited by; '' for the base model."""
        self._host = host
        self._base = base
        self._step = step
        self._edited_by = edited_by
        self._folder = folder or cache_folder() / "statistics"

    def moments(self, sites: Sequence[str], texts: Sequence[str]) -> dict[str, Moments]:
        """Moments over every token of the texts, by site. What is on disk is not computed again."""
        paths = {site: self._path(site, texts) for site in sites}
        kept = {site: _load(path, self._host.device) for site, path in paths.items()}
        done = {site: number for site, (number, _) in kept.items()}
        moments = {site: found for site, (_, found) in kept.items()}
        saved = time.monotonic()
        while (first := min(done.values(), default=len(texts))) < len(texts):
            some = texts[first : first + TEXTS_AT_ONCE]
            now = [site for site, number in done.items() if number == first]
            for site, rows in self._host.activations(some, now).items():
                x = torch.cat(rows)
                before = moments[site]
                moments[site] = Moments(
                    len(x) + (before.count if before else 0),
                    x.sum(0) + (before.total if before else 0),
                    x.T @ x + (before.products if before else 0),
                )
                done[site] = first + len(some)
            if first + len(some) == len(texts) or time.monotonic() - saved > SAVE_SECONDS:
                for site in now:
                    if found := moments[site]:
                        _save(paths[site], done[site], found)
                saved = time.monotonic()
            self._step("statistics", first + len(some), len(texts))
        return {site: found for site, found in moments.items() if found is not None}

    def known(self, sites: Sequence[str], texts: Sequence[str]) -> bool:
        """True if all of it is on disk."""
        return all(_load(self._path(site, texts), self._host.device)[0] == len(texts) for site in sites)

    def _path(self, site: str, texts: Sequence[str]) -> Path:
        files = dict(sorted(self._base.files.items()))
        of = {
            "format": _FORMAT, "base": files, "edited_by": self._edited_by, "site": site,
            "texts": sha256(canonical_json(list(texts))), "dtype": str(self._host.model.dtype),
        }  # fmt: skip
        return self._folder / f"{sha256(canonical_json(of))[:32]}.safetensors"


def _load(path: Path, device: torch.device) -> tuple[int, Moments | None]:
    """The number of texts that are in it, and the sums. A file that is damaged counts as none."""
    try:
        with safe_open(path, framework="pt") as file:
            done, count = (int(file.metadata()[name]) for name in ("texts", "tokens"))
            return done, Moments(count, *(file.get_tensor(name).to(device) for name in ("total", "products")))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return 0, None


def _save(path: Path, done: int, moments: Moments) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    metadata = {"texts": str(done), "tokens": str(moments.count)}
    save_file({"total": moments.total, "products": moments.products}, part, metadata=metadata)
    part.replace(path)
