"""Several bundles as one variant: their edits side by side, in a bundle of its own with its own digest. Pure.

    polite+safe     the edits of `polite`, then those of `safe`

At every site the order of kinds is the one of `edit_store/edits.py`; within a kind the parts come in the order in which
the bundles are named. Most edits at one site do not care: what they add is added. Where the order does decide, or one
edit undoes part of another, `conflicts` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.bundle import Bundle, Manifest, Part, Provenance, Strength
from vllm_edits.edit_store.edits import Array, Edit
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.kinds.gate import Gate
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.edit_store.kinds.offset import Offset
from vllm_edits.edit_store.kinds.scale import Scale
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
from vllm_edits.edit_store.refs import JOIN

VISIBLE = 0.01
"""Share of an edit, or overlap of two directions, below which nothing is reported."""

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Overlap:
    """Two edits of different bundles at one site that do not simply add up, and what comes of it."""

    site: str
    first: str
    second: str
    effect: str


def compose(bundles: Sequence[Bundle]) -> Bundle:
    """One bundle with the edits of all, in this order. BundleRefused when they are not for one model.

    The same versions in the same order are the same version. A request may choose a strength that every bundle takes;
    one that takes none is served at 1, so bundles whose bounds leave nothing in common are refused.
    """
    tensors = [verify.check(bundle) for bundle in bundles]
    first, *others = [bundle.manifest for bundle in bundles]
    name = JOIN.join(bundle.manifest.name for bundle in bundles)
    reasons = [reason for other in others for reason in verify.base_mismatch(other.base, first.base)]
    if len(bundles) < 2 or any(manifest.parts for manifest in (first, *others)):
        reasons.append(Reason("composition", "expected two bundles or more, none of them composed itself"))
    strength, unbounded = _strength([bundle.manifest for bundle in bundles])
    if reasons := reasons + unbounded:
        raise BundleRefused(f"composition {name!r}", reasons)
    taken: dict[tuple[str, str], int] = {}
    pairs: list[tuple[Edit, dict[str, Array]]] = []
    for bundle, numbers in zip(bundles, tensors, strict=True):
        for edit in sorted(bundle.manifest.edits, key=lambda edit: edit.part):
            part = taken[edit.site, edit.kind] = taken.get((edit.site, edit.kind), 0) + 1
            pairs.append((edit.model_copy(update={"part": part}), edit.numbers(numbers, first.base.widths)))
    parts = tuple(
        Part(name=bundle.manifest.name, version=bundle.version, edits=len(bundle.manifest.edits)) for bundle in bundles
    )
    return Bundle.create(
        name, first.base, pairs, Provenance(tool="vllm-edits compose", method="composition"),
        description=" + ".join(filter(None, (bundle.manifest.description for bundle in bundles))),
        strength=strength, parts=parts,
        created_at=max(bundle.manifest.created_at for bundle in bundles),
    )  # fmt: skip


def _strength(manifests: Sequence[Manifest]) -> tuple[Strength | None, list[Reason]]:
    """What all of them allow, by default 1 or what is nearest to it; or why there is no such strength."""
    fixed = Strength(minimum=1, maximum=1)
    bounds = [manifest.strength or fixed for manifest in manifests]
    minimum, maximum = max(each.minimum for each in bounds), min(each.maximum for each in bounds)
    if minimum > maximum:
        told = "; ".join(f"{each.name} takes {each.strength or 'none, so it is served at 1'}" for each in manifests)
        return None, [Reason("strength", f"no strength suits all: {told}. Publish one of them with wider bounds")]
    if fixed in bounds:
        return None, []
    return Strength(minimum=minimum, maximum=maximum, default=min(max(1.0, minimum), maximum)), []


def conflicts(bundle: Bundle) -> list[Overlap]:
    """Where the parts of a composition do not simply add up; empty for any other bundle."""
    if not bundle.manifest.parts:
        return []
    tensors, widths = verify.check(bundle), bundle.manifest.base.widths
    owned: list[tuple[str, Edit, Fields]] = []
    edits = iter(bundle.manifest.edits)
    for part in bundle.manifest.parts:
        for _ in range(part.edits):
            edit = next(edits)
            owned.append((part.name, edit, edit.numbers(tensors, widths)))
    found = []
    for (owner, edit, fields), (other_owner, other, other_fields) in combinations(owned, 2):
        if owner == other_owner or edit.site != other.site:
            continue
        pair = ((edit, fields), (other, other_fields))
        for (one, one_fields), (two, two_fields) in (pair, pair[::-1]):
            names = (owner, other_owner) if one is edit else (other_owner, owner)
            if effect := _effect(one, one_fields, two, two_fields):
                told = (f"{names[0]}: {one.kind}", f"{names[1]}: {two.kind}")
                found.append(Overlap(edit.site, *told, effect))
                break
    return found


def _effect(one: Edit, one_fields: Fields, two: Edit, two_fields: Fields) -> str | None:
    """What comes of `two` where `one` is too, if not just what each does alone."""
    if isinstance(one, Scale) and isinstance(two, LowRank | Gate):
        return _scaled(one_fields, two, two_fields)
    if isinstance(one, Scale) and isinstance(two, SubspaceFilter):
        return "the filter sees scaled channels, so it removes other directions of the unscaled vector"
    if isinstance(one, Scale | SubspaceFilter) and isinstance(two, WeightDelta):
        return "the delta comes first, so what it adds is scaled or filtered too"
    if isinstance(one, SubspaceFilter):
        for kind, rule in _BESIDE_A_FILTER.items():
            if isinstance(two, kind):
                return rule(one, one_fields, two_fields)
    if isinstance(one, Offset) and isinstance(two, Offset) and (one.renorm or two.renorm):
        return "the norm is restored after both offsets together"
    return None


def _scaled(scale: Fields, edit: LowRank | Gate, fields: Fields) -> str | None:
    factor = np.repeat(scale["factor"], fields["write"].shape[-1] // len(scale["factor"]))
    missed = _share(fields["write"] * (factor != 1), fields["write"])
    if edit.source == edit.site:
        return "it reads the scaled vector"
    return (
        f"{missed:.0%} of what it adds lies in channels that are scaled, and is not scaled"
        if missed > VISIBLE
        else None
    )


def _filtered_add(edit: SubspaceFilter, filtered: Fields, fields: Fields) -> str | None:
    inside = _share(fields["write"] @ filtered["basis"].T @ filtered.get("dual", filtered["basis"]), fields["write"])
    if edit.onto:
        inside = _share(fields["write"] - fields["write"] @ filtered["basis"].T @ filtered["basis"], fields["write"])
    return f"the filter comes after it and takes away {inside:.0%} of what it adds" if inside > VISIBLE else None


def _filtered_offset(edit: SubspaceFilter, filtered: Fields, fields: Fields) -> str | None:
    vector = fields["vector"]
    inside = vector @ filtered["basis"].T @ filtered["basis"]
    share = _share(vector - inside if edit.onto else inside, vector)
    return (
        f"the offset comes after it and puts {share:.0%} of itself where the filter took" if share > VISIBLE else None
    )


def _filtered_twice(edit: SubspaceFilter, one: Fields, two: Fields) -> str | None:
    del edit
    overlap = float(np.abs(one["basis"] @ two["basis"].T).max())
    if overlap <= VISIBLE:
        return None
    return f"their subspaces overlap (cosine up to {overlap:.2f}): the later one moves what the earlier one set"


_BESIDE_A_FILTER: dict[type[Edit], Callable[[SubspaceFilter, Fields, Fields], str | None]] = {
    LowRank: _filtered_add,
    Gate: _filtered_add,
    Offset: _filtered_offset,
    SubspaceFilter: _filtered_twice,
}


def _share(part: Any, whole: Any) -> float:
    size = float(np.linalg.norm(whole))
    return float(np.linalg.norm(part)) / size if size else 0.0


def named(found: Sequence[Overlap]) -> Iterator[str]:
    """A line for each, for people."""
    for conflict in found:
        yield f"{conflict.site}: {conflict.first} and {conflict.second}: {conflict.effect}"
