"""What is written for a step's tokens, against the plain definition, over runs of batches that change a little."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.fakes import cheaply
from tests.support.late_device import LateDevice
from vllm_edits.edit_store import Scope
from vllm_edits.plugin.claim import FalseClaim
from vllm_edits.plugin.graph.device_rows import DeviceRows
from vllm_edits.plugin.graph.step import Step
from vllm_edits.plugin.graph.step_filler import Extents, StepBatch, StepFiller

TOKENS, SCOPE_ROWS = 64, 3
SCOPES: dict[int, tuple[Scope, ...]] = {
    1: (),
    2: (Scope(segment="generated"),),
    3: (Scope(first=2), Scope(segment="prompt", tokens=(3, 5))),
    4: (Scope(tokens=(3,)), Scope(segment="generated")),
}


@dataclass(eq=False)
class Running:
    """A request in the engine."""

    claim: Any
    prompt: int
    computed: int = 0
    embedded: Any = None
    """[prompt]: positions that are no tokens, None for none"""


def filler_of(step: Step, asked: list[Any] | None = None, device: LateDevice | None = None) -> StepFiller:
    def slot_of(claim: Any) -> int:
        if asked is not None:
            asked.append(claim)
        return 0 if claim is None else int(claim[0])

    rows = DeviceRows if device is None else device.rows
    return StepFiller(step, slot_of, SCOPES, slots=max(SCOPES), device_rows=rows)


def fill(filler: StepFiller, running: list[Running], tokens: list[int], ids: torch.Tensor) -> None:
    starts, prompts = (np.array([getattr(one, field) for one in running], dtype=np.int64) for field in
                       ("computed", "prompt"))  # fmt: skip
    extents = Extents(np.array(tokens, dtype=np.int64), starts, lambda: prompts, ids)
    filler.fill(StepBatch(running, attrgetter("claim"), attrgetter("embedded"), lambda: extents))


def covered(scope: Scope, position: int, prompt: int, token: int | None) -> bool:
    """Straight from the words. token: None for a vector in a token's place."""
    if scope.tokens is not None and token not in scope.tokens:
        return False
    if scope.segment == "generated":
        return position >= prompt
    if scope.segment == "prompt" and position >= prompt:
        return False
    if scope.first is not None:
        return position < min(scope.first, prompt)
    return True


requests = st.builds(
    Running,
    st.one_of(st.none(), st.tuples(st.sampled_from(list(SCOPES)), st.just("v"), st.sampled_from([1.0, 0.0, 0.5]))),
    st.integers(1, 6),
    embedded=st.none() | st.lists(st.booleans(), max_size=6).map(np.array),
)


@cheaply
@given(st.lists(requests, min_size=1, max_size=6), st.data())
def test_every_token_has_the_slot_and_the_scales_of_its_request(everyone: list[Running], data: st.DataObject) -> None:
    """Requests come, are cut into chunks, decode, are preempted and leave; now and then a slot is written anew.

    A step of nobody is the dummy one of an engine that has nothing to do while its twin works.
    """
    step, device = Step(TOKENS, SCOPE_ROWS, torch.device("cpu")), LateDevice()
    # Where ids decide, operations on the device read what was sent, and here these are not late.
    by_position = all(one.claim is None or one.claim[0] in (1, 2) for one in everyone)
    filler = filler_of(step, device=device if by_position else None)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 8, TOKENS))
    computed = Counter[int]()
    for _ in range(8):
        running = data.draw(st.lists(st.sampled_from(everyone), unique_by=id))
        tokens = [data.draw(st.sampled_from([1, 1, 1, 2, 5])) for _ in running]
        if data.draw(st.booleans()):
            filler.forget()
        fill(filler, running, tokens, ids)
        device.work()
        row = 0
        for one, count in zip(running, tokens, strict=True):
            for position in range(one.computed, one.computed + count):
                slot, strength = (0, 1.0) if one.claim is None else (one.claim[0], one.claim[2])
                assert step.slots[row] == slot
                computed[slot] += 1
                scopes = SCOPES.get(slot, ())
                for scope_row in range(1 + len(scopes)) if slot else ():
                    vector = one.embedded is not None and position < min(one.prompt, len(one.embedded))
                    token = None if vector and one.embedded[position] else int(ids[row])
                    met = scope_row == 0 or covered(scopes[scope_row - 1], position, one.prompt, token)
                    assert step.token_scales[row, scope_row] == strength * met, (scope_row, position, one)
                row += 1
            one.computed = data.draw(st.sampled_from([one.computed + count, one.computed + count, 0]))
        assert not step.slots[row:].any()
    assert [filler.tokens_by_slot[slot] for slot in SCOPES] == [computed[slot] for slot in SCOPES]


def test_a_step_like_the_one_before_asks_and_sends_nothing() -> None:
    """Decoding, base and edited and scoped: from the second step on nothing is left to do, until somebody joins."""
    asked: list[Any] = []
    device = LateDevice()
    filler = filler_of(Step(TOKENS, SCOPE_ROWS, torch.device("cpu")), asked, device)
    running = [Running(None, 2, 5), Running((1, "v", 1.0), 2, 5), Running((2, "v", 0.5), 2, 5)]
    ids = torch.zeros(TOKENS, dtype=torch.int64)
    fill(filler, running, [1, 1, 1], ids)
    assert (len(asked), device.copies) == (3, 2)
    for one in running:
        one.computed += 1
    fill(filler, running, [1, 1, 1], ids)
    assert (len(asked), device.copies) == (3, 2)
    fill(filler, [*running, Running((1, "v", 1.0), 2)], [1, 1, 1, 2], ids)
    assert len(asked) == 4
    filler.forget()
    fill(filler, running, [1, 1, 1], ids)
    assert len(asked) == 7


def test_what_a_step_sends_does_not_grow_with_slots_or_scopes() -> None:
    """Two copies, and as many operations where token ids are named, for one version or for four with other scopes."""
    calls: dict[int, tuple[int, list[str]]] = {}
    ids = torch.zeros(TOKENS, dtype=torch.int64)
    for many in (1, 4):
        device = LateDevice()
        filler = filler_of(Step(TOKENS, SCOPE_ROWS, torch.device("cpu")), device=device)
        running = [Running(((3, 4, 2, 1)[number], "v", 0.5), 2) for number in range(many)]
        fill(filler, running, [1] * many, ids)  # what is named goes to the device
        for one in running:
            one.computed = 1
        before = device.copies
        with Operators() as operators:
            fill(filler, running, [1] * many, ids)
        calls[many] = device.copies - before, operators.called
    assert calls[1] == calls[4]
    assert "aten.searchsorted.Tensor" in calls[1][1], "positive control"


class Operators(TorchDispatchMode):
    """Notes which of torch's operators are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_after_a_step_that_was_scaled_by_ids_scales_are_sent_anew(strength: float) -> None:
    """Also where they are what was sent before it: the device has written others meanwhile."""
    step = Step(TOKENS, SCOPE_ROWS, torch.device("cpu"))
    filler = filler_of(step)
    ids = torch.zeros(TOKENS, dtype=torch.int64)
    fill(filler, [Running((1, "v", strength), 2)], [1], ids)
    fill(filler, [Running((4, "v", 0.5), 2)], [1], ids)
    assert step.token_scales[0, 1] == 0, "positive control: its first scope names another id"
    fill(filler, [Running((1, "v", strength), 2)], [1], ids)
    assert step.token_scales[0].tolist() == [strength] * SCOPE_ROWS


def test_of_a_batch_of_the_base_nothing_else_is_asked() -> None:
    """Also where an edited one ran before; its slot and its scale are gone from the step."""
    step = Step(TOKENS, SCOPE_ROWS, torch.device("cpu"))
    filler = filler_of(step)
    fill(filler, [Running((2, "v", 0.5), 2, 5)], [1], torch.zeros(TOKENS, dtype=torch.int64))
    assert (step.slots[0], step.token_scales[0, 0], filler.all_base) == (2, 0.5, False), "positive control"
    for running in ([Running(None, 2, 5)], [Running(None, 2, 5)] * 2, []):
        nothing = StepBatch(
            running, attrgetter("claim"), attrgetter("embedded"), lambda: pytest.fail("asked where tokens are")
        )
        filler.fill(nothing)
        assert filler.all_base
        assert not step.slots.any()
        assert (step.token_scales == 1).all()


def test_a_request_with_a_false_claim_is_told_of_and_has_no_slot() -> None:
    """Where it will end alone the others are computed as ever; else the step stops, and nothing is written."""

    def slot_of(claim: Any) -> int:
        if claim == "false":
            raise FalseClaim("no")
        return 0 if claim is None else int(claim[0])

    ending: list[tuple[Any, str]] = []

    def end(request: Any, error: FalseClaim) -> bool:
        ending.append((request, str(error)))
        return True

    running = [Running((1, "v", 1.0), 2), Running("false", 2), Running(None, 2)]
    ids, step = torch.zeros(TOKENS, dtype=torch.int64), Step(TOKENS, SCOPE_ROWS, torch.device("cpu"))
    filler = StepFiller(step, slot_of, SCOPES, slots=max(SCOPES), end_request=end)
    for _ in range(2):
        fill(filler, running, [2, 2, 1], ids)
        assert step.slots[:6].tolist() == [1, 1, 0, 0, 0, 0]
        assert ending == [(running[1], "no")], "told once"
    before = step.slots.clone()
    with pytest.raises(FalseClaim):
        fill(StepFiller(step, slot_of, SCOPES, slots=max(SCOPES)), running, [2, 2, 1], ids)
    assert torch.equal(step.slots, before)


def test_another_request_with_the_same_claim_is_looked_at_anew() -> None:
    """What is known hangs on the request itself: a new one in its place may use another slot."""
    step = Step(TOKENS, SCOPE_ROWS, torch.device("cpu"))
    filler = filler_of(step)
    ids = torch.zeros(TOKENS, dtype=torch.int64)
    fill(filler, [Running((1, "v", 1.0), 2)], [1], ids)
    fill(filler, [Running((4, "v", 1.0), 2)], [1], ids)
    assert step.slots[0] == 4
