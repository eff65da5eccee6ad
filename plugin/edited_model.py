"""The edited model in one worker: every site's slot tensors, what each slot holds, and the slot of each token.

This is the worker's only state. No vLLM here: the loader hands over the modules, the runner hands over the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edit_store.bundle import Manifest
from edit_store.edits import KINDS, Tensors
from edit_store.errors import InstallRefused
from edit_store.sites import Site
from plugin.edited_site import SLOT_TENSORS, ModuleEdits, Sizes, SlotTensors, edited_layer, edited_linear
from plugin.reservation import Reservation

BASE_SLOT = 0


@dataclass(frozen=True)
class Anchor:
    """The module that owns a site: a projection (its input and output) or a whole decoder layer."""

    module: nn.Module
    is_layer: bool
    sizes: Sizes


@dataclass(frozen=True)
class Prepared:
    """A version ready to be written into a slot: its numbers as tensors of the slots' own types."""

    version: str
    fields: tuple[tuple[tuple[str, Site], Mapping[str, Tensor]], ...]


class EditedModel:
    """Slot tensors for `slots` versions and the base model in slot 0."""

    def __init__(
        self,
        anchors: Mapping[Site, Anchor],
        reservation: Reservation,
        *,
        slots: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.reservation = reservation
        self.slots = slots
        self.token_slots = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.held: dict[int, str] = {}
        self._pinned = device.type == "cuda"
        self._all_base = True
        self._places: dict[tuple[str, Site], SlotTensors] = {}
        for site in reservation.sites():
            anchor = anchors[site]
            edits = self._edits_of(anchor)
            for kind in KINDS:
                rank = reservation.ranks.get((kind, site))
                if rank is None:
                    continue
                place = SLOT_TENSORS[kind](slots + 1, rank, anchor.sizes, dtype=dtype, device=device)
                setattr(edits, kind, place)
                self._places[kind, site] = place

    def _edits_of(self, anchor: Anchor) -> ModuleEdits:
        """The edits of a module, made (and the module's class exchanged) the first time it is named."""
        edits = getattr(anchor.module, "edits", None)
        if not isinstance(edits, ModuleEdits):
            edits = ModuleEdits(self.token_slots)
            anchor.module.edits = edits
            make: Any = edited_layer if anchor.is_layer else edited_linear
            anchor.module.__class__ = make(type(anchor.module))
        return edits

    @property
    def bytes_reserved(self) -> int:
        """Device memory of all slot tensors."""
        return sum(buffer.nbytes for place in self._places.values() for buffer in place.buffers())

    # -- slots -----------------------------------------------------------------------------------------------------

    def prepare(self, version: str, manifest: Manifest, tensors: Tensors) -> Prepared:
        """Everything that can fail or take time, before a slot is touched. InstallRefused when there is no room."""
        if missing := self.reservation.missing(manifest.edits):
            raise InstallRefused(f"version {version[:12]} of {manifest.name!r}", missing)
        fields = []
        for edit in manifest.edits:
            key = edit.kind, Site.parse(edit.site)
            numbers = {
                name: torch.from_numpy(np.array(tensors[edit.tensor_name(name)]))
                for name in edit.shapes(manifest.base.widths)
            }
            fields.append((key, numbers))
        return Prepared(version, tuple(fields))

    def install(self, slot: int, prepared: Prepared) -> str:
        """Write a prepared version into a free slot; returns the digest of what the slot now holds."""
        if not BASE_SLOT < slot <= self.slots or slot in self.held:
            raise ValueError(f"slot {slot} is not a free slot of 1 to {self.slots}")
        for key, numbers in prepared.fields:
            self._places[key].fill(slot, numbers)
        self.held[slot] = prepared.version
        return self.digest(slot)

    def clear(self, slot: int) -> None:
        """Make a slot's edits the identity again."""
        for place in self._places.values():
            place.reset(slot)
        self.held.pop(slot, None)

    def digest(self, slot: int) -> str:
        """sha256 over the contents of a slot at every place: equal on workers that hold the same."""
        hasher = hashlib.sha256(self.held.get(slot, "").encode())
        for (kind, site), place in self._places.items():
            for name, buffer in place.named_buffers():
                hasher.update(f"{site}/{kind}/{name}".encode())
                hasher.update(buffer[slot].contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return hasher.hexdigest()

    # -- the step --------------------------------------------------------------------------------------------------

    def slot_of(self, claim: Any) -> int:
        """The slot a request may use; `claim` is None (the base) or [slot, version]. A false one stops the step."""
        if claim is None:
            return BASE_SLOT
        slot, version = claim
        if slot not in self.held or self.held[slot] != version:
            raise RuntimeError(
                f"a request claims version {str(version)[:12]} in slot {slot}, which holds "
                f"{self.held.get(slot, 'nothing')[:12]}: refusing to answer it with other edits"
            )
        return int(slot)

    def set_token_slots(self, claims: Sequence[Any], tokens: np.ndarray[Any, Any]) -> None:
        """Say which slot each token of the coming step belongs to.

        claims: one per request in batch order; tokens: [requests] how many tokens of each request are in the step.
        Rows beyond the batch keep slots of earlier steps: they are padding, and every slot is safe to compute with.
        """
        slots = [self.slot_of(claim) for claim in claims]
        all_base = not any(slots)
        if all_base and self._all_base:
            return
        if all_base:
            self.token_slots.zero_()
        else:
            expanded = np.repeat(np.asarray(slots, dtype=np.int32), tokens)
            # A fresh pinned tensor each time: the copy of the step before may still be under way.
            on_host = torch.tensor(expanded, pin_memory=self._pinned)
            self.token_slots[: len(expanded)].copy_(on_host, non_blocking=True)
        self._all_base = all_base
