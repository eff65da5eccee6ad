"""All edits of one site, as the compiled graph applies them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_edits.edit_store.edits import Edit
from vllm_edits.plugin.graph.carried import Carried
from vllm_edits.plugin.graph.firing_counters import FiringCounters
from vllm_edits.plugin.graph.slot_tensors import SlotTensors
from vllm_edits.plugin.graph.stage import Stage
from vllm_edits.plugin.graph.step import Step
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, identity


class SiteEdits(nn.Module):
    """All edits of one site, stage after stage, in the order that their kinds declare."""

    def __init__(self, step: Step, width: int, carried: Carried, total: AllReduce = identity) -> None:
        """width: of the worker's share of the vector; total: how sums over the vector become whole."""
        super().__init__()
        self.step = step
        self.width = width
        self.total = total
        self.carries_as: str | None = None
        """the name by which later sites of the layer find this site's vector, if any of them reads it"""
        self._carried = carried
        self.stages = nn.ModuleList()
        self.forgets: list[str] = []
        """names of vectors that no later site reads"""

    def add(self, kind: type[Edit], slots: SlotTensors, source: str | None) -> None:
        """Attach the slot tensors of one group of edits, which read the site of that name, None for this one."""
        stages = {stage.number: stage for stage in self._in_order()}
        number = kind.order.stage
        if number not in stages:
            stages[number] = slots.stage(number, in_turn=kind.in_turn, total=self.total)
            self.stages = nn.ModuleList(stages[each] for each in sorted(stages))
            for stage in stages.values():
                stage.first = stage.number == min(stages)
        stages[number].groups.append(slots)
        stages[number].sources.append(source)

    def count_with(self, firings: FiringCounters) -> None:
        """Count the firings that this site and those before it noted, after the last edit that notes any."""
        noting = [stage for stage in self._in_order() if any(group.neurons for group in stage.groups)]
        noting[-1].adds_up = firings

    def _in_order(self) -> list[Stage]:
        return list(self.stages)  # type: ignore[arg-type]

    @property
    def edits(self) -> bool:
        """True if edits are here, False if the vector is only read."""
        return len(self.stages) > 0

    def forward(self, value: Tensor) -> Tensor:
        """Sum of what the edits add to `value` [T, width], in float32."""
        value = value.float()
        slots = self.step.slots[: value.shape[0]]
        added = torch.zeros_like(value)
        for stage in self.stages:
            added = stage(value, added, slots, self.step, self._carried)
        for source in self.forgets:
            self._carried.drop(source)
        return added

    def keep(self, value: Tensor) -> None:
        """Let later sites of the layer read this site's vector."""
        if self.carries_as is not None:
            self._carried.keep(self.carries_as, value)

    def supply(self, value: Tensor) -> None:
        """Keep a vector of another point that the edits read, if no site before this one could keep it."""
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
        """One half of the residual stream, changed such that the sum of both halves is the edited stream."""
        edited: Tensor = hidden.float() + self(hidden.float() + residual.float())
        return edited.to(hidden.dtype)
