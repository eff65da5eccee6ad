"""The capacity of a server: the kinds of edit, their sites, and their largest ranks. Pure.

A compiled graph reads preallocated tensors. So a version that needs more than is reserved does not fit: the reservation
grows for it (serving/growth.py), or it is refused with the entry to add. Capacity that is not reserved costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import groupby
from math import ceil
from typing import Any, Protocol

from vllm_edits.edit_store.architectures import Architecture
from vllm_edits.edit_store.bundle import Strength
from vllm_edits.edit_store.byte_sizes import sized
from vllm_edits.edit_store.edits import MAX_RANK, Edit
from vllm_edits.edit_store.errors import Reason, SettingsError
from vllm_edits.edit_store.kinds import KINDS, SCALED
from vllm_edits.edit_store.scope import Scope, distinct
from vllm_edits.edit_store.sites import Site, Widths
from vllm_edits.server_config.settings import Reserve

Features = frozenset[str]


@dataclass(frozen=True, order=True)
class EditGroup:
    """Edits of one kind at one site that are computed together. `index` counts those that cannot be, from 0."""

    site: Site
    kind: str
    reads: Site
    index: int = 0


@dataclass(frozen=True)
class Capacity:
    """Largest edits that a group can hold: their rank, and the features of its tensors (`Reserve.features`)."""

    rank: int = 1
    features: Features = frozenset()

    def __or__(self, other: Capacity) -> Capacity:
        """The smallest capacity that holds both."""
        return Capacity(max(self.rank, other.rank), self.features | other.features)

    def holds(self, other: Capacity) -> bool:
        """True if edits that need `other` fit."""
        return self.rank >= other.rank and self.features >= other.features


SlotBytes = Callable[[EditGroup, Capacity], int]
"""Bytes of a group of edits in one slot, for its capacity."""


def edit_groups(edits: Iterable[Edit]) -> dict[EditGroup, tuple[Edit, ...]]:
    """The edits of one version by the group that they are computed in, those of one group in their order."""
    found: dict[EditGroup, tuple[Edit, ...]] = {}

    def target(edit: Edit) -> tuple[Site, str, Site]:
        return Site.parse(edit.site), edit.kind, Site.parse(edit.source)

    for (site, kind, reads), group in groupby(sorted(edits, key=lambda each: (target(each), each.part)), key=target):
        index, together = 0, list[Edit]()
        for edit in group:
            if together and not _computed_together(together[-1], edit):
                found[EditGroup(site, kind, reads, index)] = tuple(together)
                index, together = index + 1, []
            together.append(edit)
        found[EditGroup(site, kind, reads, index)] = tuple(together)
    return found


def _computed_together(one: Edit, other: Edit) -> bool:
    return one.scope == other.scope and not (one.alone or other.alone)


def capacity_for(edits: Sequence[Edit], *, strengthened: bool) -> Capacity:
    """Capacity that the edits of one group need; `strengthened`: requests may choose another strength."""
    features = frozenset([SCALED] if strengthened or not edits[0].scope.everything else [])
    features = features.union(*(edit.needs(len(edits)) for edit in edits))
    return Capacity(sum(edit.capacity for edit in edits) if edits[0].ranked else 1, features)


class Version(Protocol):
    """The edits of a version and its bounds of strength, as a manifest has them."""

    @property
    def edits(self) -> Sequence[Edit]: ...
    @property
    def strength(self) -> Strength | None: ...


def needs(version: Version) -> dict[EditGroup, Capacity]:
    """The capacity that a version needs, by group. Kinds that are not served per request need none."""
    served = (edit for edit in version.edits if not edit.only_in_weights)
    strengthened = version.strength is not None
    return {group: capacity_for(edits, strengthened=strengthened) for group, edits in edit_groups(served).items()}


def scopes_of(version: Version) -> tuple[Scope, ...]:
    """The scopes of a version that are not everything. The first has scope row 1: row 0 is for edits of every token."""
    return distinct(edit.scope for edit in version.edits)


def is_growable(missing: Iterable[Reason]) -> bool:
    """True if a version that does not fit for these reasons would fit into a larger reservation."""
    return all(reason.code == "capacity" for reason in missing)


@dataclass(frozen=True)
class Reservation:
    """Capacity by group, and how many scopes one version may have besides everything."""

    capacities: Mapping[EditGroup, Capacity]
    scopes: int = 0

    @classmethod
    def for_versions(cls, versions: Iterable[Version]) -> Reservation:
        """Exactly what these versions need."""
        capacities: dict[EditGroup, Capacity] = {}
        scopes = 0
        for version in versions:
            scopes = max(scopes, len(scopes_of(version)))
            for group, capacity in needs(version).items():
                capacities[group] = capacities.get(group, Capacity()) | capacity
        return cls(capacities, scopes)

    @property
    def edits_logits(self) -> bool:
        """True if the logits can be edited, which are computed after the model and for some tokens only."""
        return any(site.point == "logits" for site in self.sites())

    @property
    def several_ranks(self) -> bool:
        """True if an edit may have a rank above one."""
        return any(capacity.rank > 1 for capacity in self.capacities.values())

    def __or__(self, other: Reservation) -> Reservation:
        """The smallest reservation that holds both."""
        capacities = dict(self.capacities)
        for group, capacity in other.capacities.items():
            capacities[group] = capacities.get(group, Capacity()) | capacity
        return Reservation(capacities, max(self.scopes, other.scopes))

    def with_headroom(self, factor: float, widths: Widths) -> Reservation:
        """The same with ranks `factor` times as large, rounded up.

        No rank grows above MAX_RANK, nor above the width of what is read or written, where more would add nothing.
        """
        return replace(
            self, capacities={group: _grown(group, have, factor, widths) for group, have in self.capacities.items()}
        )

    @classmethod
    def from_settings(
        cls,
        reserve: Iterable[Reserve],
        architecture: Architecture,
        widths: Widths,
        scopes: int = 0,
        *,
        skip_unmatched: bool = False,
    ) -> Reservation:
        """Expand patterns over a model's sites. SettingsError when a pattern fits no site of its kind.

        skip_unmatched: leave such a pattern out instead
        """
        capacities: dict[EditGroup, Capacity] = {}
        unmatched = []
        for item in reserve:
            points = [point for point in KINDS[item.kind].points if architecture.hidden(point) is None]
            found = [
                (site, reads) for site in architecture.sites(widths.layers)
                if site.point in points and fnmatchcase(str(site), item.site)
                and (reads := _source(item, site, architecture))
            ]  # fmt: skip
            if not found:
                reading = f" reading {item.reads}" if item.reads else ""
                unmatched.append(
                    f"edits.reserve: {item.kind} at {item.site!r}{reading} fits no site; {item.kind} can stand at "
                    f"{', '.join(points)}, in layers 0 to {widths.layers - 1}"
                )
            for site, reads in found:
                group = EditGroup(site, item.kind, reads, item.index)
                capacities[group] = capacities.get(group, Capacity()) | Capacity(item.rank, frozenset(item.features))
        if unmatched and not skip_unmatched:
            raise SettingsError("\n".join(unmatched))
        return cls(capacities, scopes)

    def missing(self, version: Version, slot_bytes: SlotBytes | None = None) -> list[Reason]:
        """Reasons why a version does not fit, each with the setting that would make it fit and its memory."""
        reasons = [
            Reason("weights_mode", f"{edit.kind} at {edit.site} {edit.only_in_weights}")
            for edit in version.edits
            if edit.only_in_weights
        ]
        if (scopes := len(scopes_of(version))) > self.scopes:
            found = f"{scopes} scopes, {self.scopes} are reserved"
            reasons.append(Reason("capacity", f"{found}. Set edits.scopes to {scopes}"))
        for group, need in needs(version).items():
            have = self.capacities.get(group)
            if have is not None and have.holds(need):
                continue
            wish = Reserve(
                kind=group.kind, site=str(group.site), rank=need.rank, index=group.index,
                reads=group.reads.point if "reads" in KINDS[group.kind].model_fields else None,
                features=tuple(sorted(need.features)),
            )  # fmt: skip
            memory = "" if slot_bytes is None else f" ({sized(_more(group, have, need, slot_bytes))} more per slot)"
            reasons.append(
                Reason(
                    "capacity",
                    f"{_called(group, need)}: {_found(have)}. Add {wish.model_dump_json(exclude_defaults=True)} to "
                    f"edits.reserve{memory}",
                )
            )
        return reasons

    def to_settings(self) -> list[dict[str, Any]]:
        """The reservation as explicit settings, sorted: one reservation has one spelling."""
        return [
            {
                "kind": group.kind, "site": str(group.site), "reads": group.reads.point, "index": group.index,
                "rank": capacity.rank, "features": sorted(capacity.features),
            }
            for group, capacity in sorted(self.capacities.items(), key=lambda item: item[0])
        ]  # fmt: skip

    def sites(self) -> list[Site]:
        """Every reserved site once, in model order."""
        return sorted({group.site for group in self.capacities})

    def read_elsewhere(self) -> set[Site]:
        """Sites that an edit at another site reads."""
        return {group.reads for group in self.capacities if group.reads != group.site}

    def __str__(self) -> str:
        by_kind: dict[str, list[EditGroup]] = {}
        for group in self.capacities:
            by_kind.setdefault(group.kind, []).append(group)
        parts = [
            f"{kind} at {len({group.site for group in found})} site(s) up to rank "
            f"{max(self.capacities[group].rank for group in found)}"
            for kind, found in sorted(by_kind.items())
        ]
        return "; ".join(parts) or "nothing"


def _source(item: Reserve, site: Site, architecture: Architecture) -> Site | None:
    """Source of the reserved edits: by default their module's input; None if `item.reads` cannot be read there."""
    able = KINDS[item.kind].sources(site, architecture.reads(site.point))
    return next((reads for reads in able if item.reads in (None, reads.point)), None)


def _grown(group: EditGroup, have: Capacity, factor: float, widths: Widths) -> Capacity:
    """The capacity with headroom. Kinds without ranks have none: such a group holds any number of edits already."""
    if "rank" not in KINDS[group.kind].model_fields:
        return have
    most = min(MAX_RANK, *(widths.of(site.point) for site in (group.site, group.reads)))
    wanted = ceil(round(have.rank * factor, 6))  # 10 * 1.1 is 11, not 11.000000000000002
    return replace(have, rank=max(have.rank, min(wanted, most)))


def _more(group: EditGroup, have: Capacity | None, need: Capacity, slot_bytes: SlotBytes) -> int:
    """Bytes that capacity for both takes beyond the present capacity."""
    return slot_bytes(group, need) if have is None else slot_bytes(group, have | need) - slot_bytes(group, have)


def _called(group: EditGroup, need: Capacity) -> str:
    reads = f" reading {group.reads}" if group.reads != group.site else ""
    extra = f" with {', '.join(sorted(need.features))}" if need.features else ""
    return f"{group.kind} of rank {need.rank} at {group.site}{reads}{extra}"


def _found(have: Capacity | None) -> str:
    if have is None:
        return "nothing is reserved there"
    extra = f" with {', '.join(sorted(have.features))}" if have.features else ""
    return f"rank {have.rank}{extra} is reserved"
