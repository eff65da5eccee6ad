"""The edits that apply at one time at one site, inside the compiled graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vllm_edits.plugin.graph.carried import Carried
from vllm_edits.plugin.graph.firing_counters import FiringCounters
from vllm_edits.plugin.graph.step import Step
from vllm_edits.plugin.graph.tensor_parallel import AllReduce


class Stage(nn.Module):
    """Edits of kinds that share a stage of `Edit.order`: each reads the stage before, and all results are added.

    Where they apply in turn (`Edit.in_turn`), each reads the edit before. A kind whose edits do more together than that
    has a subclass of its own.
    """

    def __init__(self, number: int, *, in_turn: bool, total: AllReduce) -> None:
        """total: how sums over the site's vector become whole"""
        super().__init__()
        self.number = number
        self.in_turn = in_turn
        self.first = True
        """True if it is the first stage at its site"""
        self.total = total
        self.groups = nn.ModuleList()
        """slot tensors of the groups of edits, in their order"""
        self.sources: list[str | None] = []
        """the site that each of them reads: another site's name, or None for this one"""
        self.adds_up: FiringCounters | None = None
        """the counters of firings, if no edit that fires comes after this stage"""

    def forward(self, value: Tensor, added: Tensor, slots: Tensor, step: Step, carried: Carried) -> Tensor:
        """Sum of the vectors that the stages up to this one add to `value` [T, width]; `added`: by those before it."""
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
