"""The weights of one worker, and the version whose edits are in them. No vLLM here.

A patch holds, for every projection that a version changes, the weight that takes the place of the loaded one, in the
form that the engine computes with. Installing exchanges the two: the patch then holds the loaded weight bit for bit,
and a second exchange restores it. All that takes time, or can fail, comes before.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_edits.edit_store.architectures import Architecture
from vllm_edits.edit_store.bundle import Manifest
from vllm_edits.edit_store.byte_sizes import sized
from vllm_edits.edit_store.edits import Edit, EditsWithNumbers, Tensors, order_at_site
from vllm_edits.edit_store.errors import InstallRefused, Reason, UnsupportedHost
from vllm_edits.edit_store.sites import Site
from vllm_edits.plugin.graph.tensor_parallel import Shard
from vllm_edits.plugin.weights.weight_form import formless, patched, touched


@dataclass
class Copy:
    """A weight beside the engine's own: `weight` in the engine's form, `bias` [out] or None."""

    weight: Any
    bias: Tensor | None
    nbytes: int
    fingerprint: bytes | None = None
    """digest of the numbers that it must hold; None if only the engine's own thread can compute it"""


class LiveWeight(Protocol):
    """Weight and bias of one module, as the engine computes with them."""

    dtype: torch.dtype
    bias: Tensor | None

    def loaded(self, aside: Copy | None) -> Tensor:
        """The weight [out, in] as it was loaded; `aside` is the copy that holds it while another is in its place."""

    def copy(self, weight: Tensor, bias: Tensor | None) -> Copy:
        """A copy of these numbers, ready to be exchanged. Called while the engine computes."""

    def exchange(self, copy: Copy) -> None:
        """Exchange the engine's numbers and the copy's, at the same addresses; on failure nothing has changed."""

    def fingerprint(self, copy: Copy | None) -> bytes:
        """Digest of a copy, or of the numbers that the engine computes with now: equal for equal numbers."""


@dataclass(frozen=True)
class ProjectionPart:
    """A projection inside a module: rows of its weight from `start` on, and this worker's part of the whole."""

    module: str
    start: int
    rows: Shard
    columns: Shard

    @property
    def slice(self) -> slice:
        """Rows of the projection in the module's weight."""
        return slice(self.start, self.start + self.rows.width)

    @property
    def divided(self) -> bool:
        """True if other workers have the rest of it."""
        return self.rows.divided or self.columns.divided

    def of(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """This worker's part of a whole weight and bias."""
        return self.columns.of(self.rows.of(weight.T).T), self.rows.of(bias)


Whole = Callable[[Site], tuple[Tensor, Tensor | None]]
"""Weight and bias of a projection, whole, as the model's files hold them."""


@dataclass
class Patch:
    """A version's weights by module; while it is installed, the weights that were loaded."""

    version: str
    copies: Mapping[str, Copy]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(copy.nbytes for copy in self.copies.values())


class PatchedWeights:
    """The weights that a version may be installed in: some projections of the model, by the site of their output."""

    def __init__(
        self,
        modules: Mapping[str, LiveWeight],
        parts: Mapping[Site, ProjectionPart],
        architecture: Architecture,
        free_bytes: Callable[[], int],
        whole: Whole | None = None,
    ) -> None:
        """free_bytes: host memory left for a version's weights; whole: files to read divided projections from."""
        self.parts = parts
        self._whole = whole
        self._free_bytes = free_bytes
        self.epoch = 0
        """counts the exchanges; the caller that exchanges sets it"""
        self.digest = hashlib.sha256().hexdigest()
        """digest of all weights that are not the loaded ones; equal on workers that hold the same"""
        self._modules = modules
        self._architecture = architecture
        self._installed: Patch | None = None
        self._before: Patch | None = None
        self._fingerprints: dict[str, bytes] = {}
        """digest of the numbers that the engine computes with, by module; of modules that were ever exchanged"""
        self._exchanging = threading.Lock()

    @property
    def version(self) -> str | None:
        """The version in the weights, None for the model as it was loaded."""
        return self._installed.version if self._installed else None

    @property
    def biased(self) -> list[Site]:
        """Projections that can take a constant."""
        return [site for site, part in self.parts.items() if self._modules[part.module].bias is not None]

    @property
    def bytes_touched(self) -> int:
        """Bytes of every weight that may be changed: the most that a patch takes."""
        return sum(module.loaded(None).nbytes for module in self._modules.values())

    def prepare(self, version: str, manifest: Manifest, tensors: Tensors) -> Patch:
        """A version's weights. InstallRefused when its edits have no weight form, or none in this model."""
        edits = sorted(manifest.edits, key=order_at_site)
        own = {edit: edit.numbers(tensors, manifest.base.widths) for edit in edits}
        numbers = {edit: {name: np.array(array) for name, array in fields.items()} for edit, fields in own.items()}
        reasons = formless(edits, self._architecture) or self._unreserved(edits)
        strength = manifest.strength.default if manifest.strength else 1.0
        copies: dict[str, Copy] = {}
        if not reasons:
            changed = {self.parts[site].module for edit in edits for site in touched(edit, self._architecture)}
            reasons += self._without_memory(changed)
            for name in sorted(changed if not reasons else ()):
                weight, bias = self._patched(name, edits, numbers, strength)
                reasons += self._without_bias(name, bias)
                live = self._modules[name]
                copies[name] = live.copy(weight.to(live.dtype), None if live.bias is None else bias.to(live.bias.dtype))
        if reasons:
            raise InstallRefused(f"version {version[:12]} of {manifest.name!r} in the weights", reasons)
        return Patch(version, copies)

    def _patched(
        self, name: str, edits: Sequence[Edit], numbers: Mapping[Edit, Mapping[str, Any]], strength: float
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias of a module, with all its parts, in a type wide enough to round once."""
        live, aside = self._modules[name], None
        with self._exchanging:
            aside = self._installed.copies.get(name) if self._installed else None
            own = live.loaded(aside)
            wide = torch.float64 if own.dtype == torch.float32 else torch.float32
            weight = own.to(device="cpu", dtype=wide, copy=True)
            own_bias = live.bias if aside is None else aside.bias
            bias = torch.zeros(len(weight), dtype=wide) if own_bias is None else own_bias.to("cpu", wide, copy=True)
        for site, part in self.parts.items():
            if part.module == name:
                reads = site.beside(self._architecture.projections()[site.point])
                given, read = (_at(each, edits, numbers) for each in (site, reads))
                rows = part.slice
                if part.divided and (given or read):
                    whole = self._whole_of(site, weight[rows], bias[rows])
                    weight[rows], bias[rows] = part.of(*patched(*whole, given, read, strength))
                else:
                    weight[rows], bias[rows] = patched(weight[rows], bias[rows], given, read, strength)
        return weight, bias

    def _whole_of(self, site: Site, own: Tensor, own_bias: Tensor) -> tuple[Tensor, Tensor]:
        """A whole projection of which this worker has a part, since the edited part depends on the rest.

        UnsupportedHost when the loaded part differs from the files.
        """
        part, dtype = self.parts[site], self._modules[self.parts[site].module].dtype
        found, found_bias = self._whole(site) if self._whole else (None, None)
        if found is None:
            raise UnsupportedHost(f"the projection to {site} is divided, and nothing tells the whole of it")
        weight = found.to(dtype).to(own.dtype)
        bias = own.new_zeros(len(weight)) if found_bias is None else found_bias.to(dtype).to(own.dtype)
        mine, mine_bias = part.of(weight, bias)
        if not (torch.equal(mine, own) and torch.equal(mine_bias, own_bias)):
            raise UnsupportedHost(f"the model's files hold another projection to {site} than the one that was loaded")
        return weight, bias

    def _unreserved(self, edits: Sequence[Edit]) -> list[Reason]:
        found = {site: edit for edit in edits for site in touched(edit, self._architecture) if site not in self.parts}
        return [
            Reason(
                "reserve",
                f"{edit.kind} at {edit.site} changes the projection to {site}, which was not set apart for that. "
                f'Add {{"site": "{site}"}} to edits.weights_reserve and restart',
            )
            for site, edit in found.items()
        ]

    def _without_memory(self, changed: Iterable[str]) -> list[Reason]:
        needed, free = sum(self._modules[name].loaded(None).nbytes for name in changed), self._free_bytes()
        if needed <= free:
            return []
        return [
            Reason(
                "memory",
                f"its weights take {sized(needed)} of host memory beside the loaded ones, and {sized(free)} are free. "
                "Change fewer projections, or serve it per request",
            )
        ]

    def _without_bias(self, name: str, bias: Tensor) -> list[Reason]:
        if self._modules[name].bias is not None or not bias.any():
            return []
        sites = [site for site, part in self.parts.items()
                 if part.module == name and bias[part.slice].any()]  # fmt: skip
        return [
            Reason(
                "bias",
                f"its edits add a constant to {site}, where this model's projection has no bias. "
                f'Add {{"site": "{site}", "bias": true}} to edits.weights_reserve and restart, or serve it per request',
            )
            for site in sites
        ]

    def install(self, patch: Patch | None, epoch: int) -> None:
        """Put a version into the weights, or with None the model as it was loaded; a failure is undone.

        RuntimeError, with the weights as they were, when a weight differs from the prepared one.
        """
        with self._exchanging:
            leaving, done = self._installed, list[tuple[str, Copy]]()
            try:
                for each in filter(None, (leaving, patch)):
                    for name, copy in each.copies.items():
                        self._exchange(name, copy)
                        done.append((name, copy))
                for name in dict(done):
                    self._require_as_prepared(name)
            except BaseException:
                for name, copy in reversed(done):
                    self._exchange(name, copy)
                raise
            self._installed, self._before, self.epoch = patch, leaving, epoch
            hasher = hashlib.sha256((patch.version if patch else "").encode())
            for name in patch.copies if patch else ():
                hasher.update(name.encode() + self._fingerprints[name])
            self.digest = hasher.hexdigest()

    def _exchange(self, name: str, copy: Copy) -> None:
        live = self._modules[name]
        was = self._fingerprints.get(name) or live.fingerprint(None)
        becomes = copy.fingerprint or live.fingerprint(copy)
        live.exchange(copy)
        self._fingerprints[name], copy.fingerprint = becomes, was

    def _require_as_prepared(self, name: str) -> None:
        if self._modules[name].fingerprint(None) != self._fingerprints[name]:
            raise RuntimeError(f"the weight of {name} is not what was prepared")

    def known(self, version: str) -> Patch | None:
        """A version that is in the weights or was just before."""
        return next((each for each in (self._installed, self._before) if each and each.version == version), None)


def _at(site: Site, edits: Sequence[Edit], numbers: Mapping[Edit, Mapping[str, Any]]) -> EditsWithNumbers:
    return [(edit, numbers[edit]) for edit in edits if edit.site == str(site)]
