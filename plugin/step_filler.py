"""What a step's tokens read: filled in just before each forward pass. No vLLM here.

Between two steps little changes, so what is known of a request is kept for as long as it stays in the batch, and what
is on the device already is not sent again. A batch of base requests costs a comparison of two lists, and no more is
asked of it: beside a model's step every line of Python is cold, and costs several times what it does in a loop.
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

from edit_store.scope import Scope
from plugin.edited_site import Step

Counts = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Extents:
    """Where the tokens of a step's requests are. Counts are [requests], in the step's order."""

    tokens: Counts
    """how many tokens each has in the step"""
    starts: Counts
    """absolute position of the first of them"""
    prompts: Counts
    """length of the prompt"""
    input_ids: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """The requests of the coming step, in their order there."""

    requests: Sequence[Any]
    """an object for each, the same one for as long as the request is in the batch"""
    claim_of: Callable[[Any], Any]
    """[slot, version, strength] of such an object, None for the base; asked once"""
    extents: Callable[[], Extents]
    """asked where one of them is edited"""


class StepFiller:
    """Writes each token's slot, and its weight in each lane, into a `Step`."""

    def __init__(
        self,
        step: Step,
        slot_of: Callable[[Any], int],
        scopes: Mapping[int, Sequence[Scope]],
        *,
        slots: int,
        pinned: bool,
    ) -> None:
        """slot_of: the slot a claim may use, or an error; scopes: of each slot in use, the first has lane 1."""
        self.all_base = True
        self.tokens = np.zeros(slots + 1, dtype=np.int64)
        """how many were computed with what each slot holds; for slot 0, the base, that is no count of anything"""
        self.last_tokens: Counts = np.zeros(0, dtype=np.int64)
        """the row of each request's last token in the step, unless all are of the base"""
        self._step = step
        self._slot_of = slot_of
        self._scopes = scopes
        self._pinned = pinned
        self._keep([], [])
        self._sent_tokens: Counts = np.zeros(0, dtype=np.int64)
        self._sent_weights: NDArray[np.float32] | None = None
        self._filled = 0

    def forget(self) -> None:
        """A slot holds something else now: every claim is to be looked at again."""
        self._keep([], [])

    def fill(self, batch: Batch) -> None:
        """Tell the step of a batch. Rows beyond the batch are padding and read slot 0."""
        changed = self._look_up(batch)
        if not self._edited:
            self._fill_base()
            return
        extents = batch.extents()
        self.last_tokens = np.cumsum(extents.tokens) - 1
        total = int(extents.tokens.sum())
        if changed or self.all_base or not np.array_equal(extents.tokens, self._sent_tokens):
            slots = np.zeros(max(self._filled, total), dtype=np.int32)
            slots[:total] = np.repeat(self._slots, extents.tokens)
            self._send(self._step.slots, slots)
            self.all_base, self._filled = False, total
        self._sent_tokens = np.array(extents.tokens)
        np.add.at(self.tokens, self._slots, extents.tokens)
        if self._weighed:
            self._fill_weights(extents, total)
        else:
            self._weigh_fully()

    def _fill_base(self) -> None:
        if not self.all_base:
            self._step.slots.zero_()
            self.all_base, self._filled = True, 0
            self._weigh_fully()

    def _look_up(self, batch: Batch) -> bool:
        """Find out what each request uses; whether that is anything new."""
        requests = batch.requests
        if len(requests) == len(self._requests) and all(map(operator.is_, requests, self._requests)):
            return False
        known = dict(zip(map(id, self._requests), self._rows, strict=True))
        rows = [known.get(id(request)) or self._row(batch.claim_of(request)) for request in requests]
        self._keep(requests, rows)
        return True

    def _keep(self, requests: Sequence[Any], rows: list[tuple[int, float]]) -> None:
        self._requests, self._rows = list(requests), rows
        self._slots = np.array([slot for slot, _ in rows], dtype=np.int32)
        self._strengths = np.array([strength for _, strength in rows], dtype=np.float32)
        self._edited = any(slot for slot, _ in rows)
        self._weighed = any(slot and (strength != 1 or self._scopes[slot]) for slot, strength in rows)

    def _row(self, claim: Any) -> tuple[int, float]:
        return self._slot_of(claim), 1.0 if claim is None else claim[2]

    def _weigh_fully(self) -> None:
        if self._sent_weights is not None:
            self._step.weights.fill_(1)
            self._sent_weights = None

    def _fill_weights(self, extents: Extents, total: int) -> None:
        # Each token's position, and for each of its slot's scopes whether that is covered.
        first = np.cumsum(extents.tokens) - extents.tokens
        positions = np.arange(total) + np.repeat(extents.starts - first, extents.tokens)
        prompts = np.repeat(extents.prompts, extents.tokens)
        slots = np.repeat(self._slots, extents.tokens)
        weights = np.tile(np.repeat(self._strengths, extents.tokens), (len(self._step.weights), 1))
        named = list[tuple[int, NDArray[np.bool_], tuple[int, ...]]]()
        for (lane, scope), users in self._users_of_scopes().items():
            mine = np.isin(slots, users)
            weights[lane] *= ~mine | scope.covers(positions, prompts)
            if scope.tokens is not None:
                named.append((lane, mine, scope.tokens))
        if named or self._sent_weights is None or not np.array_equal(weights, self._sent_weights):
            for lane, row in enumerate(weights):
                self._send(self._step.weights[lane], row)
            self._sent_weights = weights
        for lane, mine, ids in named:
            self._weigh_by_id(lane, mine, ids, extents.input_ids)

    def _users_of_scopes(self) -> dict[tuple[int, Scope], list[int]]:
        """By lane and scope, the slots of this batch that have it there."""
        users: dict[tuple[int, Scope], list[int]] = {}
        for slot in {slot for slot, _ in self._rows if slot}:
            for lane, scope in enumerate(self._scopes[slot], 1):
                users.setdefault((lane, scope), []).append(slot)
        return users

    def _weigh_by_id(self, lane: int, mine: NDArray[np.bool_], ids: tuple[int, ...], input_ids: Tensor | None) -> None:
        if input_ids is None:
            raise RuntimeError("a scope names token ids, and this step's are unknown: refusing to guess")
        wanted = torch.tensor(ids, device=input_ids.device)
        met = torch.isin(input_ids.reshape(-1)[: len(mine)], wanted)
        self._step.weights[lane, : len(mine)] *= met | torch.from_numpy(~mine).to(met.device)

    def _send(self, target: Tensor, values: NDArray[Any]) -> None:
        # A fresh pinned tensor each time: the copy of the step before may still be under way.
        on_host = torch.tensor(values, pin_memory=self._pinned)
        target[: len(values)].copy_(on_host, non_blocking=True)
