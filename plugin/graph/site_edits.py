"""All edits of one site, as the compiled graph applies them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vllm_edits.plugin.graph.carried import Carried
from vllm_edits.plugin.graph.firing_counters import FiringCounters
from vllm_edits.plugin.graph.kinds.offset import renormed
from vllm_edits.plugin.graph.slot_tensors import SlotTensors
from vllm_edits.plugin.graph.step import Step
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, identity


class SiteEdits(nn.Module):
    """All edits of one site, in the order that `vllm_edits.edit_store.edits` lays down."""

    def __init__(self, step: Step, width: int, carried: Carried, total: AllReduce = identity) -> None:
        """width: of the worker's share of the vector; total: how sums over the vector become whole."""
        super().__init__()
        self.step = step
        self.width = width
        self.total = total
        self.carries_as: str | None = None
        """the name under which later taps of the layer find this site's vector, if any of them reads it"""
        self._carried = carried
        self.scales, self.adds, self.filters, self.offsets = (nn.ModuleList() for _ in range(4))
        self.sources: list[str | None] = []
        """what each of `adds` reads: another site's name, or None for this one"""
        self.forgets: list[str] = []
        """names that nobody reads after this tap"""
        self.adds_up: FiringCounters | None = None
        """what counts the gates, where none of them comes after this tap"""

    def add(self, kind: str, slots: SlotTensors, source: str | None) -> None:
        """Attach the slot tensors of one place."""
        if kind in ("low_rank", "gate"):
            self.adds.append(slots)
            self.sources.append(source)
        else:
            {"scale": self.scales, "subspace_filter": self.filters, "offset": self.offsets}[kind].append(slots)

    @property
    def edits(self) -> bool:
        """Whether anything is edited here, or the vector only read."""
        return any(len(each) for each in (self.scales, self.adds, self.filters, self.offsets))

    def forward(self, value: Tensor) -> Tensor:
        """What the edits add to `value` [T, width], in float32."""
        value = value.float()
        step, slots = self.step, self.step.slots[: value.shape[0]]
        added = torch.zeros_like(value)
        for scale in self.scales:
            added = added + scale(value, slots, step)
        now = value + added
        for adding, source in zip(self.adds, self.sources, strict=True):
            added = added + adding(now if source is None else self._carried.get(source), slots, step)
        if self.adds_up is not None:
            self.adds_up.add(slots)
        for source in self.forgets:
            self._carried.drop(source)
        for filtering in self.filters:
            added = added + filtering(value + added, slots, step)
        return added + self._moved(value + added, slots) if len(self.offsets) else added

    def _moved(self, value: Tensor, slots: Tensor) -> Tensor:
        """What all offsets together add; the norm is restored once, after them."""
        moved, keeps = torch.zeros_like(value), None
        moving: Any
        for moving in self.offsets:
            moved = moved + moving(value, slots, self.step)
            asked = moving.keeps_norm(slots, self.step)
            if asked is not None:
                keeps = asked if keeps is None else keeps | asked
        return moved if keeps is None else renormed(value, moved, keeps, self.total)

    def keep(self, value: Tensor) -> None:
        """Let later taps of the layer read this site's vector."""
        if self.carries_as is not None:
            self._carried.keep(self.carries_as, value)

    def supply(self, value: Tensor) -> None:
        """Give this tap the vector that its edits read elsewhere, where no tap before it could keep it."""
        for source in self.forgets:
            self._carried.keep(source, value)

    def edited(self, tensor: Tensor, start: int | None) -> Tensor:
        """A module's input or output, or the part of it from `start` on that is this site, after the edits."""
        whole = tensor if start is None else tensor[..., start : start + self.width]
        value = whole.reshape(-1, self.width)
        if self.edits:
            value = (value.float() + self(value)).to(tensor.dtype)
        self.keep(value)
        if not self.edits:
            return tensor
        part: Tensor = value.reshape(whole.shape)
        if start is None:
            return part
        return torch.cat([tensor[..., :start], part, tensor[..., start + self.width :]], dim=-1)

    def edited_stream(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """One half of the residual stream, so changed that the sum of both halves is the edited stream."""
        edited: Tensor = hidden.float() + self(hidden.float() + residual.float())
        return edited.to(hidden.dtype)
