"""A base model's projections as its files hold them. No vLLM here.

A worker that has a part of a weight reads the whole of it here if the new part depends on the rest.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from vllm_edits.edit_store.architectures import Architecture
from vllm_edits.edit_store.base_model import weight_files
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.edit_store.sites import Site, Widths


class Checkpoint:
    """The safetensors files of one folder. Nothing is kept in memory."""

    def __init__(self, folder: Path, architecture: Architecture, widths: Widths) -> None:
        self.architecture = architecture
        self._folder = folder
        self._widths = widths
        self._files: dict[str, Path] = {}

    def projection(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias [out] (or None) of the projection whose output is `site`.

        UnsupportedHost when the files hold none under the name that transformers gives it.
        """
        layer = self._layer(site)
        at = self.architecture.side_of(site.point, self._widths, lambda path: f"{layer}.{path}.weight" in self._files)
        weight, bias = (self._tensor(f"{layer}.{at.path}.{name}") for name in ("weight", "bias"))
        if weight is None:
            raise UnsupportedHost(f"{self._folder} holds no {layer}.{at.path}.weight, which gives {site}")
        if self.architecture.transposed:
            weight = weight.T
        if at.start is not None:
            rows = slice(at.start, at.start + self._widths.of(site.point))
            weight, bias = weight[rows], None if bias is None else bias[rows]
        return weight, bias

    def _layer(self, site: Site) -> str:
        """Name of the site's layer in the files, which may leave out the module around the decoder."""
        if not self._files:
            for path in weight_files(self._folder):
                with safe_open(path, "pt") as file:
                    self._files.update(dict.fromkeys(file.keys(), path))
        whole = self.architecture.layer_path(site.layer or 0)
        short = whole.partition(".")[2]
        return whole if any(name.startswith(f"{whole}.") for name in self._files) else short

    def _tensor(self, name: str) -> Tensor | None:
        if name not in self._files:
            return None
        with safe_open(self._files[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found
