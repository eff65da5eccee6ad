"""A larger edited model takes the place of a smaller one on the same modules, with the same numbers and counts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.proofs.parity import random_numbers
from tests.support.edited_models import (
    SLOTS,
    TOKENS,
    bundle_of,
    by_formula,
    claim_on,
    crowded,
    install,
    reservation_of,
    run,
)
from tests.support.fakes import BASE, WIDTHS, RequestStep, TinyModel, edited_model, set_step
from vllm_edits.edit_store import Bundle, Gate, LowRank, Offset, Scope, SubspaceFilter, check
from vllm_edits.plugin.graph.edited_model import EditedModel
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.vllm_host.architectures import site_modules


def bundle(name: str, *edits: Any) -> Bundle:
    return bundle_of(
        [(edit, random_numbers(edit, BASE, number + len(name))) for number, edit in enumerate(edits)], name
    )


SMALL = bundle("small", Offset(site="layers.1.resid"), Gate(site="layers.1.mlp.out", reads="layers.1.mlp.in", rank=1))
LARGER_RANK = bundle(
    "larger", Gate(site="layers.1.mlp.out", reads="layers.1.mlp.in", rank=3),
    SubspaceFilter(site="layers.0.resid", rank=2), Offset(site="layers.1.resid", renorm=True),
    Offset(site="layers.2.resid", scope=Scope(first=2)), LowRank(site="logits", reads="final", rank=1),
)  # fmt: skip


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(TOKENS, WIDTHS.hidden, generator=torch.Generator().manual_seed(5))


class Growing:
    """A tiny model whose reservation grows."""

    def __init__(self, *held: Bundle) -> None:
        self.model = TinyModel()
        self.sites = site_modules(self.model, BASE.architecture, WIDTHS)
        self.edited = edited_model(self.model, reservation_of(*held), slots=SLOTS)
        for slot, each in enumerate(held, 1):
            install(self.edited, slot, each)

    def larger(self, *bundles: Bundle) -> EditedModel:
        """An edited model for these bundles too, with all held versions carried."""
        reservation = self.edited.reservation | reservation_of(*bundles)
        return edited_model(self.model, reservation, slots=SLOTS, sites=self.sites)

    def carry(self, new: EditedModel, *held: Bundle) -> None:
        for slot, each in enumerate(held, 1):
            new.carry(slot, new.prepare(each.version, each.manifest, check(each)), self.edited)

    def switch(self, new: EditedModel) -> None:
        new.go_on_from(self.edited)
        self.edited.detach()
        new.attach()
        self.edited = new

    def answer(self, inputs: Tensor, slots: list[int]) -> Tensor:
        requests = [RequestStep(claim_on(self.edited, slot), 1, prompt=1) for slot in slots]
        set_step(self.edited, requests)
        return run(self.model, self.edited, inputs)


@pytest.mark.parametrize("other", [LARGER_RANK, crowded(3)], ids=["larger rank", "every kind"])
def test_growth_keeps_every_answer_and_serves_what_did_not_fit(other: Bundle, inputs: Tensor) -> None:
    growing, slots = Growing(SMALL), [number % 2 for number in range(TOKENS)]
    before = growing.answer(inputs, slots)
    assert growing.edited.reservation.missing(other.manifest), "it does not fit before"
    new = growing.larger(other)
    growing.carry(new, SMALL)
    assert torch.equal(growing.answer(inputs, slots), before), "the old edits serve until the switch"
    growing.switch(new)
    after = growing.answer(inputs, slots)
    assert torch.equal(after[::2], before[::2]), "base tokens, bit for bit"
    torch.testing.assert_close(after, before)
    assert not torch.allclose(before[1::2], before[::2]), "positive control"
    install(growing.edited, 2, other)
    found = growing.answer(inputs, [2] * TOKENS)
    np.testing.assert_allclose(found, by_formula(growing.model, inputs, other), rtol=1e-4, atol=1e-5)


def test_growing_back_gives_the_old_modules(inputs: Tensor) -> None:
    """Undo: the classes, the children and the answers are those of before."""
    growing = Growing(SMALL)
    classes = {name: type(module) for name, module in growing.model.named_modules()}
    old, before = growing.edited, growing.answer(inputs, [1] * TOKENS)
    new = growing.larger(LARGER_RANK)
    growing.carry(new, SMALL)
    growing.switch(new)
    assert {name: type(module) for name, module in growing.model.named_modules()} != classes
    growing.switch(old)
    assert {name: type(module) for name, module in growing.model.named_modules()} == classes
    assert torch.equal(growing.answer(inputs, [1] * TOKENS), before)


def test_counts_go_on(inputs: Tensor) -> None:
    growing = Growing(SMALL)
    growing.answer(inputs, [1] * TOKENS)
    before = growing.edited.firings(1)
    new = growing.larger(LARGER_RANK)
    growing.carry(new, SMALL)
    growing.switch(new)
    assert growing.edited.firings(1) == before
    ((_, tokens, fired),) = before
    assert tokens == TOKENS
    assert any(fired.values()), "positive control"
    growing.answer(inputs, [1] * TOKENS)
    ((_, tokens, twice),) = growing.edited.firings(1)
    assert (tokens, twice) == (2 * TOKENS, {edit: 2 * times for edit, times in fired.items()})


def test_a_slot_that_was_cleared_meanwhile_is_cleared() -> None:
    growing = Growing(SMALL, LARGER_RANK)
    new = growing.larger(crowded(1))
    growing.carry(new, SMALL, LARGER_RANK)
    growing.edited.clear(1)
    growing.switch(new)
    assert growing.edited.held == {2: LARGER_RANK.version}
    assert growing.edited.firings(1) == []


@pytest.mark.parametrize("place", ["a number", "a rank that is not used"])
def test_other_numbers_are_not_carried(place: str) -> None:
    growing = Growing(SMALL)
    new = growing.larger(LARGER_RANK)
    prepared = new.prepare(SMALL.version, SMALL.manifest, check(SMALL))
    ((gate, tensors),) = [each for each in new._slot_tensors.items() if each[0].kind == "gate"]
    assert gate.site.layer == 1
    columns = tensors.columns["write"]
    wrong = prepared.row.clone()
    columns.of(wrong.view(1, -1).view(columns.dtype))[0, 0 if place == "a number" else 2] += 1.0
    from vllm_edits.plugin.graph.edited_model import _digest

    lying = replace(prepared, row=wrong, digest=_digest(SMALL.version, wrong))
    with pytest.raises(RuntimeError, match="slot 1 does not keep its numbers: write of gate"):
        new.carry(1, lying, growing.edited)


def test_copies_of_the_modules_can_have_other_edits(inputs: Tensor) -> None:
    """A thread compiles such copies, while the modules serve."""
    growing = Growing(SMALL)
    before = growing.answer(inputs, [1] * TOKENS)
    copies = growing.edited.plain_copies(growing.model)
    plain: Any = copies[growing.model]
    torch.testing.assert_close(plain.logits(plain(inputs)), copy.deepcopy(plain).logits(plain(inputs)))
    np.testing.assert_allclose(
        plain.logits(plain(inputs)), by_formula(growing.model, inputs, None), rtol=1e-4, atol=1e-5
    )
    assert not any(hasattr(module, "edits") for module in plain.modules())
    assert {id(each) for each in plain.parameters()} == {id(each) for each in growing.model.parameters()}
    new = growing.larger(LARGER_RANK)
    new.attach(copies)
    assert any(hasattr(module, "edits") for module in plain.modules())
    assert torch.equal(growing.answer(inputs, [1] * TOKENS), before)
    new.detach()
    assert not any(hasattr(module, "edits") for module in plain.modules())


def test_the_union_of_reservations_holds_both_and_no_more() -> None:
    small, large = reservation_of(SMALL), reservation_of(LARGER_RANK)
    both = small | large
    assert both.missing(SMALL.manifest) == both.missing(LARGER_RANK.manifest) == []
    assert both == large | small == both | small
    assert both.capacities.keys() == small.capacities.keys() | large.capacities.keys()
    assert both.scopes == 1
    assert small | Reservation({}) == small
