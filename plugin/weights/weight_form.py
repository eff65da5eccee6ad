"""A version's linear edits as changes of the projections' weights and biases. Pure.

A projection gives y = W x + b. Edits of y are maps after it, edits of x maps before it, and every map is affine:

    m(v) = factor v + write^T (read v - shift) + constant

    after the projection    W' = factor W + write^T (read W)      b' = factor b + write^T (read b - shift) + constant
    before it               W' = W factor + (W write^T) read      b' = b - (W write^T) shift + W constant

So any number of edits ends in one weight and one bias. Gates, scopes, kept norms, and edits of vectors that no
projection gives or reads have no such form; nor has a constant where the projection adds no bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_edits.edit_store.architectures import Architecture
from vllm_edits.edit_store.edits import Edit
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds.gate import Gate
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.edit_store.kinds.offset import Offset
from vllm_edits.edit_store.kinds.scale import Scale
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
from vllm_edits.edit_store.sites import Site
from vllm_edits.plugin.graph.fold import fold_filters

Numbers = Sequence[tuple[Edit, Mapping[str, Any]]]
"""Edits of one site in the order in which they apply, each with its arrays."""


@dataclass(frozen=True)
class Affine:
    """factor, constant: [width]; read, write: [rank, width]; shift: [rank]."""

    factor: Tensor
    constant: Tensor
    read: Tensor
    write: Tensor
    shift: Tensor

    @classmethod
    def of(cls, width: int, kind: torch.dtype, **parts: Any) -> Affine:
        """The map with these parts; those that are left out change nothing."""
        rank = len(parts.get("read", ()))
        nothing = {
            "factor": torch.ones(width), "constant": torch.zeros(width), "read": torch.zeros(0, width),
            "write": torch.zeros(0, width), "shift": torch.zeros(rank),
        }  # fmt: skip
        return cls(**{name: torch.as_tensor(part).to(kind) for name, part in {**nothing, **parts}.items()})

    def weighed(self, strength: float) -> Affine:
        """v + strength (m(v) - v)."""
        factor = 1 + (self.factor - 1) * strength
        return Affine(factor, self.constant * strength, self.read, self.write * strength, self.shift)

    def after(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a projection with this map behind it."""
        seen = self.read @ bias - self.shift
        return (
            torch.addmm(weight * self.factor.unsqueeze(1), self.write.T, self.read @ weight),
            bias * self.factor + seen @ self.write + self.constant,
        )

    def before(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a projection with this map in front of it."""
        written = weight @ self.write.T
        return (
            torch.addmm(weight * self.factor, written, self.read),
            bias - written @ self.shift + weight @ self.constant,
        )


def patched(
    weight: Tensor, bias: Tensor, given: Numbers, read: Numbers, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] of a projection with edits of what it gives, and of what it reads.

    Computed in the weight's own type. `bias` is zeros where the projection has none.
    """
    scale, add, *others = _maps(given, weight.shape[0], weight.dtype)
    for edit, fields in _of(given, WeightDelta):
        weight = weight + strength * _delta(weight, edit, fields)
    weight, bias = scale.weighed(strength).after(weight, bias)
    weight, bias = add.weighed(strength).after(weight, bias)
    for edit, fields in _of(given, LowRank):
        if edit.source != edit.site:
            read_, write = (torch.as_tensor(fields[name]).to(weight.dtype) for name in ("read", "write"))
            weight = torch.addmm(weight, write.T, read_, alpha=strength)
    for each in others:
        weight, bias = each.weighed(strength).after(weight, bias)
    for each in reversed(_maps(read, weight.shape[1], weight.dtype)):
        weight, bias = each.weighed(strength).before(weight, bias)
    return weight, bias


def _delta(weight: Tensor, edit: WeightDelta, fields: Mapping[str, Any]) -> Tensor:
    if edit.count is None:
        return torch.as_tensor(fields["delta"]).to(weight.dtype)
    delta = torch.zeros_like(weight)
    rows, columns = (torch.as_tensor(fields[name]).long() for name in ("rows", "columns"))
    delta[rows, columns] = torch.as_tensor(fields["values"]).to(weight.dtype)
    return delta


def _maps(numbers: Numbers, width: int, kind: torch.dtype) -> list[Affine]:
    """What scales, in-place low ranks, filters and offsets do to a site's vector, one after the other."""
    factor = np.ones(width)
    for _, fields in _of(numbers, Scale):
        factor = factor * np.repeat(np.asarray(fields["factor"], dtype=np.float64), width // len(fields["factor"]))
    own = [fields for edit, fields in _of(numbers, LowRank) if edit.source == edit.site]
    added = {name: np.concatenate([fields[name] for fields in own]) for name in ("read", "write") if own}
    maps = [Affine.of(width, kind, factor=factor), Affine.of(width, kind, **added)]
    if filters := _of(numbers, SubspaceFilter):
        folded = fold_filters(filters)
        parts = {name: getattr(folded, name) for name in ("read", "write", "shift", "constant")}
        maps.append(Affine.of(width, kind, factor=np.full(width, 1 - folded.drop), **parts))
    moved = np.zeros(width)
    for _, fields in _of(numbers, Offset):
        moved = moved + fields["vector"]
    return [*maps, Affine.of(width, kind, constant=moved)]


def _of(numbers: Numbers, kind: type[Any]) -> list[tuple[Any, Mapping[str, Any]]]:
    return [(edit, fields) for edit, fields in numbers if isinstance(edit, kind)]


# -- what has such a form ----------------------------------------------------------------------------------------------


def touched(edit: Edit, architecture: Architecture) -> tuple[Site, ...]:
    """The projections whose weights an edit changes, by what they give."""
    site = Site.parse(edit.site)
    projections = architecture.projections()
    if site.point in projections:
        return (site,)
    return tuple(site.beside(point) for point, read in projections.items() if read == site.point)


def constant(edit: Edit) -> bool:
    """Whether an edit may add a constant, for which a projection needs a bias."""
    return isinstance(edit, Offset | SubspaceFilter)


def formless(edits: Iterable[Edit], architecture: Architecture) -> list[Reason]:
    """Why these edits cannot be put into weights, whatever their numbers, each with what to do instead."""
    found = ((edit, _formless(edit, architecture)) for edit in edits)
    return [Reason("weights_mode", f"{edit.kind} at {edit.site}: {why}") for edit, why in found if why]


def _formless(edit: Edit, architecture: Architecture) -> str | None:
    projections = architecture.projections()
    if isinstance(edit, Gate):
        return "whether a gate opens depends on the token, and a weight is the same for all. Serve it per request"
    if not edit.scope.everything:
        return "it has a scope, and a weight is the same for every token. Serve it per request"
    if isinstance(edit, Offset) and edit.renorm:
        return "keeping a norm is not linear. Serve it per request, or leave renorm out"
    if isinstance(edit, WeightDelta) and Site.parse(edit.site).point == "logits":
        return (
            "the output head is often the embeddings too, which would change with it. Make a low_rank edit from final "
            "to logits of it, and serve that per request"
        )
    if not touched(edit, architecture):
        given, read = ", ".join(projections), ", ".join(dict.fromkeys(projections.values()))
        return (
            "no projection gives or reads that vector, so no weight can stand for the edit. Those of "
            f"{architecture.name} give {given} and read {read}: edit there, or serve it per request"
        )
    if edit.source != edit.site and projections.get(Site.parse(edit.site).point) != Site.parse(edit.source).point:
        return f"more than one weight lies between {edit.source} and {edit.site}. Serve it per request"
    return None
