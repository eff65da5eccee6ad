"""A version's linear edits as changes of the projections' weights and biases. Pure.

A projection gives y = W x + b. Edits of y are maps after it, edits of x maps before it, and every map is affine:

    m(v) = factor v + write^T (read v - shift) + constant

    after the projection    W' = factor W + write^T (read W)      b' = factor b + write^T (read b - shift) + constant
    before it               W' = W factor + (W write^T) read      b' = b - (W write^T) shift + W constant

So any number of edits becomes one weight and one bias. Gates, scopes, kept norms, and edits of vectors that are no
projection's input or output have no such form; nor has a constant where the projection adds no bias.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vllm_edits.edit_store.architectures import Architecture
from vllm_edits.edit_store.edits import Edit, EditsWithNumbers
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.linear import AffineMap
from vllm_edits.edit_store.sites import Site


@dataclass(frozen=True)
class Affine:
    """An `AffineMap` as tensors, at some strength: v + strength (m(v) - v)."""

    factor: Tensor
    constant: Tensor
    read: Tensor
    write: Tensor
    shift: Tensor

    @classmethod
    def of(cls, made: AffineMap, dtype: torch.dtype, strength: float) -> Affine:
        factor, constant, read, write, shift = (
            torch.as_tensor(part).to(dtype) for part in (made.factor, made.constant, made.read, made.write, made.shift)
        )
        return cls(1 + (factor - 1) * strength, constant * strength, read, write * strength, shift)

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
    weight: Tensor, bias: Tensor, given: EditsWithNumbers, read: EditsWithNumbers, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] of a projection with edits of its output and of its input.
    Computed in the weight's own type. `bias` is zeros where the projection has none.
    """
    for stage in _stages(given):
        if (made := _in_place(stage, weight.shape[0])) is not None:
            weight, bias = Affine.of(made, weight.dtype, strength).after(weight, bias)
        for edit, fields in stage:
            if edit.source != edit.site:
                weight = _changed(weight, edit.weight_change(fields, weight.shape), strength)
    for stage in reversed(_stages(read)):
        if (made := _in_place(stage, weight.shape[1])) is not None:
            weight, bias = Affine.of(made, weight.dtype, strength).before(weight, bias)
    return weight, bias


def _stages(numbers: EditsWithNumbers) -> list[EditsWithNumbers]:
    return [list(stage) for _, stage in groupby(numbers, key=lambda pair: pair[0].order.stage)]


def _in_place(stage: EditsWithNumbers, width: int) -> AffineMap | None:
    """The map of the edits that read the vector they change; None if there are none."""
    in_place = [pair for pair in stage if pair[0].source == pair[0].site]
    kinds = [list(pairs) for _, pairs in groupby(in_place, key=lambda pair: type(pair[0]))]
    maps = [type(pairs[0][0]).linear(pairs, width) for pairs in kinds]
    return functools.reduce(AffineMap.beside, maps) if maps else None


def _changed(weight: Tensor, factors: Sequence[Any], strength: float) -> Tensor:
    """The weight plus an edit's change: a matrix, or the product of two."""
    left, *right = (torch.as_tensor(factor).to(weight.dtype) for factor in factors)
    return torch.addmm(weight, left, right[0], alpha=strength) if right else weight + strength * left


# -- what has such a form ----------------------------------------------------------------------------------------------


def touched(edit: Edit, architecture: Architecture) -> tuple[Site, ...]:
    """Projections whose weights an edit changes, by their output."""
    site = Site.parse(edit.site)
    projections = architecture.projections()
    if site.point in projections:
        return (site,)
    return tuple(site.beside(point) for point, read in projections.items() if read == site.point)


def formless(edits: Iterable[Edit], architecture: Architecture) -> list[Reason]:
    """Reasons why these edits cannot be put into weights, whatever their numbers, each with a way out."""
    found = ((edit, _formless(edit, architecture)) for edit in edits)
    return [Reason("weights_mode", f"{edit.kind} at {edit.site}: {why}") for edit, why in found if why]


def _formless(edit: Edit, architecture: Architecture) -> str | None:
    projections = architecture.projections()
    if why := edit.formless():
        return why
    if not touched(edit, architecture):
        given, read = ", ".join(projections), ", ".join(dict.fromkeys(projections.values()))
        return (
            "no projection gives or reads that vector, so no weight can stand for the edit. Those of "
            f"{architecture.name} give {given} and read {read}: edit there, or serve it per request"
        )
    if edit.source != edit.site and projections.get(Site.parse(edit.site).point) != Site.parse(edit.source).point:
        return f"more than one weight lies between {edit.source} and {edit.site}. Serve it per request"
    return None
