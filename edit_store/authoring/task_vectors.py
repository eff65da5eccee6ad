"""Bundles as task vectors: the change that each makes to the weights of projections, as one vector.

    t_i  [numbers]   the changes of all matrices that any of the bundles changes, one behind the other; zeros where
                     bundle i changes nothing

A bundle has a task vector if each of its edits is an update W + delta of one projection's weight, whatever W is. Edits
of one matrix add up. The strength of a bundle is 1: its edits as they are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.architectures import Architecture, supported
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.bundle import Bundle, Manifest
from vllm_edits.edit_store.edits import Edit, Fields, Tensors
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.sites import Site

Shape = tuple[int, int]
"""out, in"""


def no_update(edit: Edit, architecture: Architecture) -> str | None:
    """Reason why an edit is no update of one projection's weight; None if it is one."""
    if why := edit.formless():
        return why
    projections = architecture.projections()
    read = projections.get(Site.parse(edit.site).point)
    if read is None:
        return f"no projection gives that vector. Those of {architecture.name} give {', '.join(projections)}"
    if edit.source == edit.site:
        return "it changes the vector that the projection gives, so its change of the weight depends on the weight"
    if read != Site.parse(edit.source).point:
        return f"more than one weight lies between {edit.source} and {edit.site}"
    return None


def refusals(bundle: Bundle, base: BaseModelRef) -> Iterator[Reason]:
    """Every reason why a bundle has no task vector for that model."""
    try:
        verify.check(bundle, base)
    except BundleRefused as refused:
        yield from refused.reasons
        return
    for edit in bundle.manifest.edits:
        if why := no_update(edit, supported(base.architecture)):
            yield Reason("no_update", f"{edit.kind} at {edit.label} is no update of one weight: {why}")


def matrices(manifests: Iterable[Manifest]) -> dict[Site, Shape]:
    """The matrices that bundles without `refusals` change, by the output of their projection, in the model's order."""
    found = {}
    for manifest in manifests:
        for edit in manifest.edits:
            site, widths = Site.parse(edit.site), manifest.base.widths
            found[site] = widths.of(site.point), widths.of(Site.parse(edit.source).point)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class TaskVectors:
    """The task vectors of bundles without `refusals`. None is kept: each is made when it is asked for."""

    bundles: Sequence[Bundle]
    tensors: Sequence[Tensors]
    """of each bundle"""
    shapes: Mapping[Site, Shape]

    @classmethod
    def of(cls, bundles: Sequence[Bundle]) -> TaskVectors:
        shapes = matrices(bundle.manifest for bundle in bundles)
        return cls(bundles, [verify.check(bundle) for bundle in bundles], shapes)

    @property
    def numbers(self) -> int:
        """The length of each vector."""
        return sum(out * into for out, into in self.shapes.values())

    def vectors(self) -> Iterator[Tensor]:
        """Each task vector [numbers], in float32."""
        for bundle, tensors in zip(self.bundles, self.tensors, strict=True):
            vector = torch.zeros(self.numbers)
            places = dict(self.split(vector))
            for edit in bundle.manifest.edits:
                site = Site.parse(edit.site)
                places[site] += _change(edit, edit.numbers(tensors, bundle.manifest.base.widths), self.shapes[site])
            yield vector

    def split(self, vector: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """The matrices [out, in] of a vector, as views."""
        whole: Any = vector
        parts = whole.split([out * into for out, into in self.shapes.values()])
        for (site, shape), part in zip(self.shapes.items(), parts, strict=True):
            yield site, part.view(shape)


def _change(edit: Edit, fields: Fields, shape: Shape) -> Tensor:
    """The change of the weight: a matrix, or the product of two."""
    left, *right = (
        torch.tensor(np.asarray(factor), dtype=torch.float32) for factor in edit.weight_change(fields, shape)
    )
    return left @ right[0] if right else left
