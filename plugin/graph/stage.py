"""The edits that apply at one time at one site, inside the compiled graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vllm_edits.plugin.graph.carried import Carried
from vllm_edits.plugin.graph.firing_counters import FiringCounters
from vllm_edits.plugin.graph.step import Step
from vllm_edits.plugin.graph.tensor_parallel import AllReduce


class Stage(nn.Module):
    """Edits of kinds that share a stage of `Edit.order`: each reads what the stage before left, and all are added.

    Where they apply in turn (`Edit.in_turn`) each reads what the edit before left. A kind whose edits do more together
    than that has a subclass of its own.
    """

    def __init__(self, number: int, *, in_turn: bool, total: AllReduce) -> None:
        """total: how sums over the site's vector become whole"""
        super().__init__()
        self.number = number
        self.in_turn = in_turn
        self.first = True
        """whether no stage stands before it at its site"""
        self.total = total
        self.groups = nn.ModuleList()
        """slot tensors of the groups of edits, in their order"""
        self.sources: list[str | None] = []
        """what each of them reads: another site's name, or None for this one"""
        self.adds_up: FiringCounters | None = None
        """what counts firings, where no edit that fires comes after this stage"""

    def forward(self, value: Tensor, added: Tensor, slots: Tensor, step: Step, carried: Carried) -> Tensor:
        """Sum of what this stage and those before it add to `value` [T, width]; `added`: by those before it."""
        added = self._with_groups(value, added, slots, step, carried)
        if self.adds_up is not None:
            self.adds_up.add(slots)
        return added

    def _with_groups(self, value: Tensor, added: Tensor, slots: Tensor, step: Step, carried: Carried) -> Tensor:
        before = None if self.in_turn else value + added
        group: Any
        for group, source in zip(self.groups, self.sources, strict=True):
            here = value + added if before is None else before
            added = added + group(here if source is None else carried.get(source), slots, step)
        return added
