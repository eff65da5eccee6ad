"""Reservation of a server and its device memory, known before a model is loaded. No vLLM here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_edits.edit_store.architectures import Architecture, supported
from vllm_edits.edit_store.base_model import CONFIG_FILE
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.bundle import Manifest
from vllm_edits.edit_store.byte_sizes import sized
from vllm_edits.edit_store.errors import SettingsError
from vllm_edits.edit_store.refs import Ref
from vllm_edits.edit_store.sites import Widths
from vllm_edits.plugin.graph.reservation import EditGroup, Reservation, SlotBytes
from vllm_edits.plugin.open_store import open_reader
from vllm_edits.plugin.weights import weights_reservation
from vllm_edits.plugin.weights.weights_reservation import WeightsReservation
from vllm_edits.server_config import profiles
from vllm_edits.server_config.profile_costs import profile_costs
from vllm_edits.server_config.settings import PROFILES, EditSettings, Profile, Reserve


@dataclass(frozen=True)
class Promoted:
    """Versions that a store promotes for a model, by the way a server with these settings serves them."""

    per_request: Sequence[Manifest]
    in_weights: Manifest | None = None


def promoted(settings: EditSettings, base: BaseModelRef) -> Promoted:
    """Versions that the store promotes for this model now and that a starting server would accept."""
    reader, in_weights = open_reader(settings), weights_key(settings)
    heads = {(name, tag): reader.last_trusted(entry)
             for name, tags in reader.look().heads.items() for tag, entry in tags.items()}  # fmt: skip
    found = {key: reader.manifest(head.version) for key, head in heads.items() if head and not head.withdrawn}
    ours = {key: manifest for key, manifest in found.items() if manifest.base.files == base.files}
    own = None if in_weights is None else ours.pop(in_weights, None)
    return Promoted(list(ours.values()), own)


def weights_key(settings: EditSettings) -> tuple[str, str] | None:
    """Name and tag of the variant that is served from the weights, if one is."""
    if settings.weights is None:
        return None
    ref = Ref.parse(settings.weights, settings.default_tag)
    return ref.name, ref.selector


def reserve(settings: EditSettings, base: BaseModelRef, found: Promoted | None = None) -> Reservation:
    """Reservation by the settings: their entries and profiles, and with a profile also all that the store promotes now.

    found: the result of `promoted`, if the caller has read it already
    """
    architecture = supported(base.architecture)
    made = of_items(settings.reserve, architecture, base.widths)
    if settings.profiles:
        versions = (promoted(settings, base) if found is None else found).per_request
        made |= Reservation.for_versions(versions).with_headroom(settings.reserve_headroom, base.widths)
    return made if settings.scopes is None else replace(made, scopes=settings.scopes)


def of_items(items: Iterable[Profile | Reserve], architecture: Architecture, widths: Widths) -> Reservation:
    """Reservation by profiles and entries, without what is promoted. SettingsError if an entry fits no site."""
    items = list(items)
    made = Reservation.from_settings([each for each in items if isinstance(each, Reserve)], architecture, widths)
    for profile in (each for each in items if not isinstance(each, Reserve)):
        entries, scopes = profiles.entries(profile), profiles.SCOPES[profile]
        made |= Reservation.from_settings(entries, architecture, widths, scopes, skip_unmatched=True)
    return made


def reserve_weights(settings: EditSettings, base: BaseModelRef, found: Promoted | None = None) -> WeightsReservation:
    """Projections that a version in the weights may change; none without `edits.weights`."""
    architecture = supported(base.architecture)
    if settings.weights is None:
        return {}
    if settings.weights_reserve is not None:
        return weights_reservation.asked_for(settings.weights_reserve, architecture, base.widths)
    version = (promoted(settings, base) if found is None else found).in_weights
    capacity = weights_reservation.for_version(version, architecture) if version else {}
    return capacity or weights_reservation.usual(architecture, base.widths)


def reservations(settings: EditSettings, base: BaseModelRef) -> tuple[Reservation, WeightsReservation]:
    """Both reservations, with one reading of the store, or none if the settings decide both."""
    told = not settings.profiles and (settings.weights is None or settings.weights_reserve is not None)
    found = None if told else promoted(settings, base)
    return reserve(settings, base, found), reserve_weights(settings, base, found)


@dataclass(frozen=True)
class Plan:
    """The bytes of one slot, by group. Slot 0, the base model's, takes as much as any other."""

    by_group: Mapping[EditGroup, int]

    @classmethod
    def of(cls, reservation: Reservation, slot_bytes: SlotBytes) -> Plan:
        """Device memory of a reservation, by its groups' bytes."""
        return cls({group: slot_bytes(group, capacity) for group, capacity in reservation.capacities.items()})

    @property
    def slot(self) -> int:
        """Bytes of one slot."""
        return sum(self.by_group.values())

    def total(self, slots: int) -> int:
        """Bytes of that many slots and the base model's."""
        return (slots + 1) * self.slot

    def most(self, free: int) -> int:
        """Number of slots that fit into `free` bytes, beside the base model's."""
        return max(0, free // self.slot - 1) if self.slot else free

    def require(self, slots: int, free: int, beside: str = "") -> None:
        """Raise SettingsError, with the largest number that fits, when `slots` of them take more than `free` bytes.

        beside: other needs of memory, for the message
        """
        if self.total(slots) > free:
            most = self.most(free)
            fewer = "Set edits.slots to that or less (versions beyond are paged in on demand), or reserve less"
            more = "Leave them more memory by the flags named here, or reserve less" if beside else "Reserve less"
            raise SettingsError(
                f"edits.slots = {slots} takes {sized(self.total(slots))}, and {sized(free)} are free{beside}: "
                f"{most or 'no'} slots of {sized(self.slot)} fit. {fewer if most else more}; "
                "`vllm-edits plan` shows what takes how much"
            )


def rows(plan: Plan, reservation: Reservation) -> list[dict[str, Any]]:
    """Rows of a table: groups that differ in nothing but the layer are one row."""
    found: dict[tuple[Any, ...], list[EditGroup]] = {}
    for group, capacity in sorted(reservation.capacities.items(), key=lambda item: item[0]):
        found.setdefault((group.kind, group.site.point, group.reads.point, capacity, group.index), []).append(group)
    return [
        {
            "kind": kind, "point": point, "reads": "" if reads == point else reads, "rank": capacity.rank,
            "features": " ".join(sorted(capacity.features)), "sites": len(edit_groups),
            "bytes": sum(plan.by_group[group] for group in edit_groups),
        }
        for (kind, point, reads, capacity, _), edit_groups in found.items()
    ]  # fmt: skip


def profile_rows(
    settings: EditSettings, base: BaseModelRef, found: Promoted, slot_bytes: SlotBytes
) -> list[dict[str, Any]]:
    """Rows of a table: each profile with its memory beside these promoted versions, and its measured costs at rest."""
    in_use = max(settings.profiles, key=PROFILES.index, default=None)
    rows = []
    for profile in PROFILES:
        plan = Plan.of(reserve(settings.model_copy(update={"reserve": (profile,)}), base, found), slot_bytes)
        measured = [cost.model_dump(mode="json", exclude={"profile"}) for cost in profile_costs(profile)]
        rows.append({
            "profile": profile, "in_use": profile == in_use, "bytes_per_slot": plan.slot,
            "bytes": plan.total(settings.slots), "measured": measured,
        })  # fmt: skip
    return rows


def dtype_of(model: Path, asked: str) -> torch.dtype:
    """The dtype that vLLM gives a checkpoint: the requested one, or with `auto` its own, bfloat16 for float32."""
    config = json.loads((model / CONFIG_FILE).read_bytes())
    own = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    name = asked if asked != "auto" else "bfloat16" if own == "float32" else own
    found = getattr(torch, {"half": "float16", "float": "float32"}.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise SettingsError(f"--dtype {asked}: expected auto, half, float16, bfloat16, float or float32")
    return found
