"""What a server makes room for and how much device memory that takes, known before a model is loaded. No vLLM here."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edit_store.architectures import supported
from edit_store.base_model import CONFIG_FILE
from edit_store.bundle import BaseModelRef, Manifest
from edit_store.errors import SettingsError
from plugin.reading import open_reader
from plugin.reservation import Place, Price, Reservation
from plugin.sizes import sized
from server_config.settings import EditSettings

logger = logging.getLogger("vllm.edits")


def promoted(settings: EditSettings, base: BaseModelRef) -> list[Manifest]:
    """What the store promotes for this model now, as a server that starts would believe it."""
    reader = open_reader(settings)
    entries = [reader.believed(entry) for tags in reader.look().heads.values() for entry in tags.values()]
    manifests = [reader.manifest(entry.version) for entry in entries if entry is not None and not entry.withdrawn]
    return [manifest for manifest in manifests if manifest.base.files == base.files]


def reserve(settings: EditSettings, base: BaseModelRef, versions: Sequence[Manifest] | None = None) -> Reservation:
    """What the settings say, or what the store promotes for this model now, or what is usual for an empty store.

    versions: what is `promoted`, for who has read that already
    """
    architecture = supported(base.architecture)
    if settings.reserve is not None:
        return Reservation.from_settings(settings.reserve, architecture, base.widths, settings.scopes or 0)
    if versions := promoted(settings, base) if versions is None else versions:
        made = Reservation.for_versions(versions)
        return made if settings.scopes is None else replace(made, scopes=settings.scopes)
    usual = Reservation.usual(architecture, base.widths)
    logger.warning(
        "store %s promotes nothing for this model: room is reserved for %s, at every layer, which costs a little on "
        "every step. Promote first, or set edits.reserve",
        settings.store,
        usual,
    )
    return usual


@dataclass(frozen=True)
class Plan:
    """The bytes of one slot, by place. Slot 0, the base model's, takes as much as any other."""

    by_place: Mapping[Place, int]

    @classmethod
    def of(cls, reservation: Reservation, price: Price) -> Plan:
        """What a reservation takes in a model of these prices."""
        return cls({place: price(place, room) for place, room in reservation.rooms.items()})

    @property
    def slot(self) -> int:
        """Bytes of one slot."""
        return sum(self.by_place.values())

    def total(self, slots: int) -> int:
        """Bytes of that many slots and the base model's."""
        return (slots + 1) * self.slot

    def most(self, free: int) -> int:
        """How many slots fit into so many bytes, the base model's beside them."""
        return max(0, free // self.slot - 1) if self.slot else free

    def require(self, slots: int, free: int) -> None:
        """SettingsError, with the largest number that fits, when `slots` of them take more than `free` bytes."""
        if self.total(slots) > free:
            raise SettingsError(
                f"edits.slots = {slots} takes {sized(self.total(slots))}, and {sized(free)} are free: "
                f"{self.most(free)} slots of {sized(self.slot)} fit. Set edits.slots to that or less (versions "
                "beyond are paged in on demand), or reserve less; `vllm-edits plan` shows what takes how much"
            )


def rows(plan: Plan, reservation: Reservation) -> list[dict[str, Any]]:
    """For people: places that differ in nothing but the layer are one row."""
    found: dict[tuple[Any, ...], list[Place]] = {}
    for place, room in sorted(reservation.rooms.items(), key=lambda item: item[0]):
        found.setdefault((place.kind, place.site.point, place.reads.point, room, place.turn), []).append(place)
    return [
        {
            "kind": kind, "point": point, "reads": "" if reads == point else reads, "rank": room.rank,
            "features": " ".join(sorted(room.features)), "sites": len(places),
            "bytes": sum(plan.by_place[place] for place in places),
        }
        for (kind, point, reads, room, _), places in found.items()
    ]  # fmt: skip


def dtype_of(model: Path, asked: str) -> torch.dtype:
    """The dtype that vLLM gives a checkpoint: what is asked for, or with `auto` its own, float32 made half as wide."""
    config = json.loads((model / CONFIG_FILE).read_bytes())
    own = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    name = asked if asked != "auto" else "bfloat16" if own == "float32" else own
    found = getattr(torch, {"half": "float16", "float": "float32"}.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise SettingsError(f"--dtype {asked}: expected auto, half, float16, bfloat16, float or float32")
    return found
