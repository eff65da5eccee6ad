"""Filling of a step's inputs, just before each forward pass. No vLLM here.

Between two steps little changes. So the slot of a request is kept for as long as it stays in the batch, and values that
are on the device already are not sent again. A batch of base requests costs a comparison of two lists: beside a model's
step every line of Python is cold, and costs several times its time in a loop. The cost of an edited batch does not grow
with the number of its versions: two copies to the device at most, and a few operations there if scopes name token ids.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_edits.edit_store.scope import Scope
from vllm_edits.plugin.claim import FalseClaim
from vllm_edits.plugin.graph.device_rows import DeviceRows
from vllm_edits.plugin.graph.scope_tables import NamedIds, ScopeTables
from vllm_edits.plugin.graph.step import Step

TokenCounts = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Extents:
    """Positions of the tokens of a step's requests. Counts are [requests], in the step's order."""

    tokens: TokenCounts
    """number of tokens of each in the step"""
    starts: TokenCounts
    """absolute position of the first of these"""
    prompts: Callable[[], TokenCounts]
    """the length of each prompt, asked if a position decides"""
    input_ids: Tensor
    """[T] or more: the id of each token, and any number for a token that has none by `StepBatch.embedded`"""


@dataclass(frozen=True)
class StepBatch:
    """The requests of the coming step, in their order there."""

    requests: Sequence[Any]
    """an object for each request, the same one for as long as it is in the batch"""
    claim_of: Callable[[Any], Any]
    """[slot, version, strength] of such an object, None for the base; asked once"""
    embedded: Callable[[Any], NDArray[np.bool_] | None]
    """[prompt]: True for positions with a client's vector in place of a token; None if there are none"""
    extents: Callable[[], Extents]
    """asked if one of them is edited"""


class StepFiller:
    """Writes each token's slot, and its scale for each scope row, into a `Step`."""

    def __init__(
        self,
        step: Step,
        slot_of: Callable[[Any], int],
        scopes: Mapping[int, Sequence[Scope]],
        *,
        slots: int,
        end_request: Callable[[Any, FalseClaim], bool] = lambda _request, _error: False,
        device_rows: Callable[[Tensor, float], DeviceRows] = DeviceRows,
    ) -> None:
        """slot_of: the slot that a claim may use, or FalseClaim; scopes: by slot in use, the first has scope row 1.

        end_request: called with a request whose claim is false; returns True if it will end without an answer.
        Else the step is stopped.
        """
        self.all_base = True
        self.tokens_by_slot = np.zeros(slots + 1, dtype=np.int64)
        """number of tokens computed with each slot's version; the number of slot 0, the base, has no meaning"""
        self.last_rows: TokenCounts = np.zeros(0, dtype=np.int64)
        """the row of each request's last token in the step; not up to date while `all_base`"""
        self._step = step
        self._slot_of = slot_of
        self._end_request = end_request
        self._scopes = scopes
        self._slots_on_device = device_rows(step.slots, 0)
        self._scales_on_device = device_rows(step.token_scales, 1)
        self._by_position = device_rows(torch.ones_like(step.token_scales), 1)
        """the token scales as far as positions decide, if token ids decide too"""
        self._sent_tokens: TokenCounts = np.zeros(0, dtype=np.int64)
        self._step_tokens_by_slot: TokenCounts = np.zeros(0, dtype=np.int64)
        """number of tokens in this step, by slot"""
        self.forget()

    def forget(self) -> None:
        """Look at every claim again, since a slot's content has changed."""
        self._tables = ScopeTables(self._scopes, len(self.tokens_by_slot) - 1, self._step.token_scales.shape[1])
        self._named_ids: NamedIds | None = None
        self._keep([], [])

    def fill(self, batch: StepBatch) -> None:
        """Write the inputs of a batch. Rows beyond the batch are padding and read slot 0."""
        changed = self._look_up(batch)
        if not self._edited:
            self._fill_base()
            return
        extents = batch.extents()
        if changed or self.all_base or not np.array_equal(extents.tokens, self._sent_tokens):
            self._fill_slots(extents.tokens)
        self.tokens_by_slot += self._step_tokens_by_slot
        if self._scaled:
            self._fill_token_scales(batch, extents)
        else:
            self._scales_on_device.clear()

    def _fill_slots(self, tokens: TokenCounts) -> None:
        self.all_base = False
        self._slots_on_device.write(np.repeat(self._slots, tokens))
        self._sent_tokens = np.array(tokens)
        self.last_rows = np.cumsum(tokens) - 1
        self._step_tokens_by_slot = np.bincount(self._slots, tokens, len(self.tokens_by_slot)).astype(np.int64)

    def _fill_base(self) -> None:
        if not self.all_base:
            self._slots_on_device.clear()
            self._scales_on_device.clear()
            self.all_base = True

    def _look_up(self, batch: StepBatch) -> bool:
        """Find the slot of each request; returns True if any has changed."""
        requests = batch.requests
        if len(requests) == len(self._requests) and all(map(operator.is_, requests, self._requests)):
            return False
        known = dict(zip(map(id, self._requests), self._slots_and_strengths, strict=True))
        found = [
            known.get(id(request)) or self._slot_and_strength(request, batch.claim_of(request)) for request in requests
        ]
        self._keep(requests, found)
        return True

    def _keep(self, requests: Sequence[Any], found: list[tuple[int, float]]) -> None:
        self._requests, self._slots_and_strengths = list(requests), found
        self._slots = np.array([slot for slot, _ in found], dtype=np.int32)
        self._strengths = np.array([strength for _, strength in found], dtype=np.float32)
        self._edited = any(slot for slot, _ in found)
        self._scaled = any(slot and (strength != 1 or self._scopes[slot]) for slot, strength in found)

    def _slot_and_strength(self, request: Any, claim: Any) -> tuple[int, float]:
        try:
            return self._slot_of(claim), 1.0 if claim is None else claim[2]
        except FalseClaim as error:
            if not self._end_request(request, error):
                raise
            return 0, 1.0  # computed with the base model, and its output is discarded

    def _fill_token_scales(self, batch: StepBatch, extents: Extents) -> None:
        first = np.cumsum(extents.tokens) - extents.tokens
        per_token = [np.repeat(each, extents.tokens) for each in
                     (self._slots, extents.starts - first, extents.prompts(), self._strengths)]  # fmt: skip
        slots, shift, prompts, strengths = per_token
        covered = self._tables.covered(slots, np.arange(len(slots)) + shift, prompts)
        scales = strengths[:, None] * covered
        if self._tables.names_ids[self._slots].any():
            without_ids = self._without_ids(batch, extents)
            scales[without_ids[:, None] & self._tables.named[slots]] = 0
            self._scale_by_id(scales, extents.input_ids)
        else:
            self._scales_on_device.write(scales)

    def _without_ids(self, batch: StepBatch, extents: Extents) -> NDArray[np.bool_]:
        """[T]: True for a client's vector, which has no token id that a scope could name."""
        found = np.zeros(extents.tokens.sum(), dtype=bool)
        in_prompt = np.flatnonzero(extents.starts < extents.prompts())
        ends = np.cumsum(extents.tokens)
        for row in in_prompt:
            embedded = batch.embedded(batch.requests[row])
            if embedded is not None:
                start, count = extents.starts[row], extents.tokens[row]
                part = embedded[start : start + count]
                found[ends[row] - count :][: len(part)] = part
        return found

    def _scale_by_id(self, scales: NDArray[np.float32], input_ids: Tensor) -> None:
        if self._named_ids is None:
            self._named_ids = self._tables.named_ids(self._step.slots.device)
        tokens = slice(len(scales))
        met = self._named_ids.met(self._step.slots[tokens], input_ids.reshape(-1)[tokens])
        self._by_position.write(scales)
        torch.mul(self._by_position.tensor[tokens], met, out=self._step.token_scales[tokens])
        self._scales_on_device.changed(len(scales))
