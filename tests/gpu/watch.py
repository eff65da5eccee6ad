"""Watches what a step tells the device: as a kernel behind it would read it, and what it asks the device for.

Behind every step the rows of slots and token scales are copied on the device, in the order of its stream. Where the
driver does its work as late as it may (NULL_GPU_LATE), the copies hold what was written to a pinned buffer too early,
if it was. The same can be watched on a real GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tests.gpu import null_gpu
from tests.gpu.facts import require
from vllm_edits.plugin.graph.device_rows import PinnedTurns
from vllm_edits.plugin.graph.edited_model import EditedModel
from vllm_edits.plugin.graph.step_filler import StepBatch


@dataclass
class Seen:
    """Of one step: what the device reads, and what it should."""

    slots: Tensor
    scales: Tensor
    expected_slots: np.ndarray
    expected_scales: np.ndarray

    def wrong(self) -> bool:
        slots, scales = self.slots.cpu().numpy(), self.scales.cpu().numpy()
        total = len(self.expected_slots)
        edited = self.expected_slots > 0  # what a base token weighs is multiplied with nothing
        return (
            not np.array_equal(slots[:total], self.expected_slots)
            or bool(slots[total:].any())
            or not np.array_equal(scales[:total][edited], self.expected_scales[edited])
        )


@dataclass
class Watch:
    """On the steps of an edited model, from now on."""

    edited: EditedModel
    steps: int = 0
    edited_steps: int = 0
    longest: int = 0
    seen: list[Seen] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    """of the driver, in all edited steps together, where it counts"""

    @classmethod
    def of(cls, llm: Any) -> Self:
        """On an engine in this process."""
        return cls(llm.apply_model(lambda model: model.loaded_edits.edited)[0])

    def __post_init__(self) -> None:
        set_step = self.edited.set_step
        for rows in (self.edited.step.token_scales, self.edited._filler._by_position.tensor):
            rows.copy_(torch.ones(rows.shape))  # where kernels do nothing, what fills a tensor does not either

        def watched(batch: StepBatch) -> None:
            before = null_gpu.counts()
            set_step(batch)
            self.asked.update(null_gpu.less(null_gpu.counts(), before))
            self.steps += 1
            self._look(batch)

        self.edited.set_step = watched  # type: ignore[method-assign]

    def _look(self, batch: StepBatch) -> None:
        claims = [batch.claim_of(request) for request in batch.requests]
        filler, step = self.edited._filler, self.edited.step
        if not any(claims):
            expected = np.zeros(0, dtype=np.int32), np.zeros((0, step.token_scales.shape[1]), dtype=np.float32)
            scales = step.token_scales
        else:
            self.edited_steps += 1
            extents = batch.extents()
            expected = _expected(claims, extents, self.edited._scopes, step.token_scales.shape[1])
            named = filler._tables.names_ids[[claim[0] for claim in claims if claim]].any()
            scales = filler._by_position.tensor if named else step.token_scales
            self.longest = max(self.longest, len(expected[0]))
        rows = max(self.longest, 1)
        self.seen.append(Seen(step.slots[:rows].clone(), scales[:rows].clone(), *expected))

    def verdict(self) -> dict[str, Any]:
        """What was seen. Wrong where a step was misread, or waited for the device."""
        misread = self.misread()
        require(not misread, f"the device misread {misread} of {self.steps} steps")
        waits = {name: count for name, count in self.asked.items() if "waits for" in name and count}
        require(not waits, f"steps waited for the device: {waits}")
        asked = {name: round(count / self.edited_steps, 2) for name, count in self.asked.items() if count}
        return {"steps": self.steps, "edited steps": self.edited_steps, "misread": misread, "asked by a step": asked}

    def with_one_buffer(self, act: Callable[[], Any]) -> int:
        """In how many steps of `act` the device is misled by one pinned buffer that nobody waits for: a control."""
        begin = PinnedTurns.begin

        def at_once(turns: PinnedTurns, rows: int) -> Any:
            turns._turn = 0
            return turns._buffers[0].pinned.numpy()[:rows]

        PinnedTurns.begin = at_once  # type: ignore[method-assign]
        try:
            act()
        finally:
            PinnedTurns.begin = begin  # type: ignore[method-assign]
        misread = self.misread()
        require(misread, "a buffer that is written to too early was not seen")
        return misread

    def misread(self) -> int:
        """In how many steps the device read something else than it should."""
        torch.cuda.synchronize()
        found = sum(each.wrong() for each in self.seen)
        self.seen.clear()
        return found


def _expected(
    claims: list[Any], extents: Any, scopes: Mapping[int, Any], scope_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Straight from the words, request by request; as far as positions decide."""
    slots, scales = [], []
    for claim, tokens, start, prompt in zip(claims, extents.tokens, extents.starts, extents.prompts(), strict=True):
        slot, strength = (0, 1.0) if claim is None else (claim[0], claim[2])
        positions = np.arange(start, start + tokens)
        rows = np.full((tokens, scope_rows), strength, dtype=np.float32)
        for scope_row, scope in enumerate(scopes.get(slot, ()), 1):
            rows[:, scope_row] *= scope.covers(positions, int(prompt))
        slots += [slot] * int(tokens)
        scales.append(rows)
    return np.array(slots, dtype=np.int32), np.concatenate(scales)
