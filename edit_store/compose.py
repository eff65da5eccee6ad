"""Several bundles as one variant: their edits side by side, in a bundle of its own with its own digest. Pure.

    polite+safe     the edits of `polite`, then those of `safe`

At every site the kinds apply in the order that they declare. Within a kind the parts apply in the order in which the
bundles are named. For most edits at one site the order does not matter, since their results are added. Where it does,
or where one edit undoes part of another, `conflicts` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.bundle import Bundle, Manifest, Part, Provenance, Strength
from vllm_edits.edit_store.edits import Array, Edit, Fields, Order
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.refs import JOIN


@dataclass(frozen=True)
class Overlap:
    """Two edits of different bundles at one site that do not simply add up, and their effect on each other."""

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
        privileged=any(bundle.manifest.privileged for bundle in bundles),
        cumulative_edits=sum(bundle.manifest.cumulative_edits for bundle in bundles),
        created_at=max(bundle.manifest.created_at for bundle in bundles),
    )  # fmt: skip


def _strength(manifests: Sequence[Manifest]) -> tuple[Strength | None, list[Reason]]:
    """Strengths that all of them allow, the default 1 or the nearest to it; or the reason why there is none."""
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
    """Pairs of edits of a composition that do not simply add up; empty for any other bundle."""
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
        if effect := edit.beside(fields, other, other_fields) or other.beside(other_fields, edit, fields):
            first, second = sorted(((owner, edit), (other_owner, other)), key=_changing_first)
            found.append(Overlap(edit.site, f"{first[0]}: {first[1].kind}", f"{second[0]}: {second[1].kind}", effect))
    return found


def _changing_first(owned: tuple[str, Edit]) -> tuple[bool, Order]:
    """Sorting key of two edits: one that changes the other's result is named first."""
    return not owned[1].transforms, owned[1].order


def named(found: Sequence[Overlap]) -> Iterator[str]:
    """A line for each, for people."""
    for conflict in found:
        yield f"{conflict.site}: {conflict.first} and {conflict.second}: {conflict.effect}"
