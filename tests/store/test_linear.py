"""Several filters at one site are one affine map, and a filter twice is a filter once."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.proofs.parity import random_numbers
from tests.support.fakes import BASE, cheaply
from vllm_edits.edit_store import SubspaceFilter

filters = st.builds(
    SubspaceFilter, site=st.just("layers.1.resid"), rank=st.integers(1, 6), onto=st.booleans(), oblique=st.booleans()
)


def numbered(edits: list[SubspaceFilter], seed: int) -> list[tuple[SubspaceFilter, dict[str, Any]]]:
    return [(edit, random_numbers(edit, BASE, seed + number)) for number, edit in enumerate(edits)]


def size_of(numbers: list[tuple[SubspaceFilter, dict[str, Any]]]) -> float:
    """How much rounding can grow: oblique maps stretch."""
    return float(np.prod([1 + np.linalg.norm(fields.get("dual", fields["basis"])) for _, fields in numbers]))


@cheaply
@given(st.lists(filters, min_size=1, max_size=4), st.integers(0, 10**6))
def test_folded_filters_do_what_they_do_one_after_the_other(edits: list[SubspaceFilter], seed: int) -> None:
    numbers = numbered(edits, seed)
    x = np.random.default_rng(seed).normal(size=(5, BASE.widths.hidden))
    one_by_one = x
    for edit, fields in numbers:
        one_by_one = edit.apply(one_by_one, **fields)
    folded = SubspaceFilter.linear(numbers, BASE.widths.hidden)
    assert len(folded.read) == sum(edit.rank for edit in edits)
    np.testing.assert_allclose(folded(x), one_by_one, atol=1e-5 * size_of(numbers))


@cheaply
@given(filters, st.integers(0, 10**6))
def test_a_filter_twice_is_a_filter_once(edit: SubspaceFilter, seed: int) -> None:
    """On and off a subspace, oblique too, by the formula and as it is served."""
    [(_, fields)] = numbers = numbered([edit], seed)
    x = np.random.default_rng(seed).normal(size=(5, BASE.widths.hidden))
    once = edit.apply(x, **fields)
    np.testing.assert_allclose(edit.apply(once, **fields), once, atol=1e-5 * size_of(numbers))
    folded = SubspaceFilter.linear(numbers, BASE.widths.hidden)
    np.testing.assert_allclose(folded(folded(x)), folded(x), atol=1e-5 * size_of(numbers))
    assert np.abs(once - x).max() > 1e-3, "positive control"


@cheaply
@given(st.lists(filters, min_size=2, max_size=2), st.integers(0, 10**6))
def test_maps_side_by_side_add_what_each_adds(edits: list[SubspaceFilter], seed: int) -> None:
    numbers = numbered(edits, seed)
    x = np.random.default_rng(seed).normal(size=(5, BASE.widths.hidden))
    one, other = (SubspaceFilter.linear([pair], BASE.widths.hidden) for pair in numbers)
    np.testing.assert_allclose(one.beside(other)(x), one(x) + other(x) - x, atol=1e-9 * size_of(numbers))
