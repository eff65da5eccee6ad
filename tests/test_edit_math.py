"""Each served kind computes its formula, token by token, for the slots of its own token and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edit_store import LowRank, Offset, Scale, SubspaceFilter
from edit_store.edits import Array
from plugin import edit_math
from tests.fakes import cheaply

HEADS = 2
HALF_STEP = {torch.float32: 0.0, torch.bfloat16: 2**-8}
"""How far rounding the result to its dtype may move it, relative to its size (one bfloat16 has 8 significant bits)."""


@dataclass(frozen=True)
class Case:
    """Random inputs of some tokens and random tensors of some slots, all exact in `dtype`. Slot 0 is the base."""

    seed: int
    tokens: int
    slots: int
    rank: int
    width: int
    dtype: torch.dtype

    def normal(self, name: str, *shape: int) -> Tensor:
        generator = np.random.default_rng([self.seed, *name.encode()])
        return torch.from_numpy(generator.normal(size=shape).astype(np.float32)).to(self.dtype)

    def edit(self, name: str, *shape: int, base: float = 0.0) -> Tensor:
        """A slot tensor with the identity in slot 0."""
        tensor = self.normal(name, self.slots + 1, *shape)
        tensor[0] = base
        return tensor

    @property
    def token_slots(self) -> Tensor:
        slots = np.random.default_rng(self.seed).integers(0, self.slots + 1, self.tokens)
        return torch.from_numpy(slots.astype(np.int32))


Apply = Callable[[int, int], Array]
"""The reference for one token in one slot."""
Kind = Callable[[Case], tuple[Tensor, Callable[[Tensor], Tensor], Apply]]
"""The unedited tensor, the served form as a function of token slots, and the reference."""


def row(tensor: Tensor, token: int) -> Array:
    return tensor[token : token + 1].float().numpy()


def scale(case: Case) -> Any:
    z, factor = case.normal("z", case.tokens, HEADS * case.width), case.edit("factor", HEADS, base=1.0)
    return (
        z,
        lambda slots: edit_math.scale(z, factor, slots),
        lambda token, slot: Scale.apply(row(z, token), factor=factor[slot].float().numpy()),
    )


def low_rank(case: Case) -> Any:
    x, y = case.normal("x", case.tokens, case.width + 3), case.normal("y", case.tokens, case.width)
    read, write = case.edit("read", case.rank, case.width + 3), case.edit("write", case.rank, case.width)

    def apply(token: int, slot: int) -> Array:
        fields = {"read": read[slot].float().numpy(), "write": write[slot].float().numpy()}
        return LowRank.apply(row(x, token), row(y, token), **fields)

    return y, lambda slots: edit_math.low_rank(x, y, read, write, slots), apply


def subspace_filter(case: Case) -> Any:
    """One half of the stream is a random other half away from the whole; the reference knows the whole only."""
    hidden, residual = (case.normal(name, case.tokens, case.width) for name in ("hidden", "residual"))
    basis, mean = case.edit("basis", case.rank, case.width), case.edit("mean", case.width).float()
    basis[1:] = torch.linalg.qr(basis[1:].float().mT)[0].mT.to(case.dtype)
    shift = torch.einsum("skw,sw->sk", basis.float(), mean)
    stream = hidden.float() + residual.float()

    def apply(token: int, slot: int) -> Array:
        fields = {"basis": basis[slot].float().numpy(), "mean": mean[slot].numpy()}
        return SubspaceFilter.apply(row(stream, token), **fields) - row(residual, token)

    return hidden, lambda slots: edit_math.subspace_filter(hidden, stream, basis, shift, slots), apply


def offset(case: Case) -> Any:
    hidden, vector = case.normal("hidden", case.tokens, case.width), case.edit("vector", case.width)
    return (
        hidden,
        lambda slots: edit_math.offset(hidden, vector, slots),
        lambda token, slot: Offset.apply(row(hidden, token), vector=vector[slot].float().numpy()),
    )


KINDS: list[Kind] = [scale, low_rank, subspace_filter, offset]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
cases = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 12),
    slots=st.integers(1, 5),
    rank=st.integers(1, 4),
    width=st.integers(4, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


@every_kind
@cheaply
@given(case=cases)
def test_the_served_form_equals_the_formula_token_by_token(kind: Kind, case: Case) -> None:
    _, served_by, apply = kind(case)
    served = served_by(case.token_slots).float().numpy()
    formula = np.concatenate([apply(token, int(slot)) for token, slot in enumerate(case.token_slots)])
    np.testing.assert_allclose(served, formula, rtol=HALF_STEP[case.dtype] + 1e-6, atol=1e-5)


@every_kind
@cheaply
@given(case=cases)
def test_base_tokens_come_out_exactly_as_they_went_in(kind: Kind, case: Case) -> None:
    """Slot 0 changes no number, whatever the other tokens do; and the others do change (positive control)."""
    before, served_by, _ = kind(case)
    slots = case.token_slots
    served = served_by(slots)
    assert served.dtype == before.dtype
    assert torch.equal(served[slots == 0], before[slots == 0])
    assert not any(torch.equal(served[token], before[token]) for token in slots.nonzero().flatten())


@every_kind
def test_the_identity_is_exact_for_extreme_numbers(kind: Kind) -> None:
    """The largest, the smallest and zero pass slot 0 unchanged; only a negative zero may lose its sign."""
    extremes = torch.tensor([3e38, -3e38, 1e-45, -1e-45, 0.0, -0.0, 1.0, -(2.0**-126)])
    slots = torch.zeros(1, dtype=torch.int32)
    x, zeros, ones = extremes[None], torch.zeros(1, 1, 8), torch.ones(1, HEADS)
    served = {
        "scale": lambda: edit_math.scale(x, ones, slots),
        "low_rank": lambda: edit_math.low_rank(x, x, zeros, zeros, slots),
        "subspace_filter": lambda: edit_math.subspace_filter(x, x, zeros, torch.zeros(1, 1), slots),
        "offset": lambda: edit_math.offset(x, zeros[0], slots),
    }[kind.__name__]()
    assert torch.equal(served, x)


@every_kind
@cheaply
@given(case=cases, data=st.data())
def test_a_token_depends_on_nobody_else(kind: Kind, case: Case, data: st.DataObject) -> None:
    """Moving every other token to other slots leaves a token's bits as they are."""
    _, served_by, _ = kind(case)
    token = data.draw(st.integers(0, case.tokens - 1))
    moved = (case.token_slots + 1) % (case.slots + 1)
    moved[token] = case.token_slots[token]
    assert torch.equal(served_by(case.token_slots)[token], served_by(moved)[token])


def test_a_poisoned_slot_poisons_its_own_tokens_only() -> None:
    """Not a number in one slot's tensors stays in the tokens of that slot."""
    x = torch.randn(3, 8)
    slots = torch.tensor([0, 1, 2], dtype=torch.int32)
    read, write = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    healthy = edit_math.low_rank(x, x, read, write, slots)
    read[1] = torch.nan
    poisoned = edit_math.low_rank(x, x, read, write, slots)
    assert poisoned[1].isnan().all()
    assert torch.equal(poisoned[[0, 2]], healthy[[0, 2]])


@cheaply
@given(case=cases)
def test_a_filter_is_idempotent_and_removes_its_directions(case: Case) -> None:
    """After it the stream's coordinates in the subspace are the mean's; a second time changes nothing."""
    width, slots = case.width, torch.ones(case.tokens, dtype=torch.int32)
    stream, mean = (case.normal(name, case.tokens, width).float() for name in ("stream", "mean"))
    basis = torch.zeros(2, case.rank, width)
    basis[1] = torch.linalg.qr(case.normal("basis", width, case.rank).float())[0].T
    shift = basis @ mean[0]
    once = edit_math.subspace_filter(stream, stream, basis, shift, slots)
    twice = edit_math.subspace_filter(once, once, basis, shift, slots)
    torch.testing.assert_close(once @ basis[1].T, shift[1].expand(case.tokens, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-5)


def test_a_redirection_changes_what_it_reads_and_nothing_orthogonal_to_it() -> None:
    """y += write (read . x): an aligned input moves by exactly write, an orthogonal one stays."""
    read, write = torch.zeros(2, 1, 4), torch.zeros(2, 1, 3)
    read[1, 0, 0], write[1, 0] = 1.0, torch.tensor([1.0, 2.0, 3.0])
    x, y, slots = torch.eye(4)[:2], torch.zeros(2, 3), torch.ones(2, dtype=torch.int32)
    assert edit_math.low_rank(x, y, read, write, slots).tolist() == [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]
