"""Assignment is GrowthBook's published hash: held against its SDK, and against what stickiness promises."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from growthbook.core import chooseVariation, gbhash, getBucketRanges
from hypothesis import given
from hypothesis import strategies as st

from vllm_edits.edit_store.experiments.assignment import bucket, chosen, ranges

UNITS = [f"user-{number}" for number in range(50_000)]
WEIGHTS = [(0.5, 0.5), (0.98, 0.01, 0.01), (1 / 3, 1 / 3, 1 / 3), (0.7, 0.1, 0.15, 0.05)]


@pytest.mark.long
def test_fifty_thousand_assignments_equal_the_sdk_s() -> None:
    """For several seeds, weights and coverages: the same arm for every unit, and nobody where it says nobody."""
    draw = random.Random(5)
    for number, unit in enumerate(UNITS):
        weights, coverage = WEIGHTS[number % len(WEIGHTS)], draw.choice([0.01, 0.1, 0.5, 0.99, 1.0])
        seed = f"milder/{number % 7}"
        place = gbhash(seed, unit, 2)
        assert bucket(seed, unit) == place
        theirs = chooseVariation(place, getBucketRanges(len(weights), coverage, list(weights)))
        assert chosen(weights, coverage, place) == (None if theirs < 0 else theirs)


@given(seed=st.text(max_size=8), unit=st.text(max_size=40))
def test_any_text_is_hashed_as_the_sdk_hashes_it(seed: str, unit: str) -> None:
    assert bucket(seed, unit) == gbhash(seed, unit, 2)


@given(
    weights=st.sampled_from(WEIGHTS), narrow=st.floats(0, 1), wide=st.floats(0, 1), place=st.integers(0, 9_999),
)  # fmt: skip
def test_a_growing_coverage_moves_nobody(weights: tuple[float, ...], narrow: float, wide: float, place: int) -> None:
    """Who was in an arm stays in it; who was in none may come into any."""
    before, after = (chosen(weights, coverage, place / 10_000) for coverage in sorted((narrow, wide)))
    assert before in (None, after)


@pytest.mark.long
@pytest.mark.parametrize("weights", WEIGHTS)
def test_arms_get_their_shares(weights: tuple[float, ...]) -> None:
    """Chi-square below the value that one shuffle of ten thousand exceeds; and another seed shuffles independently."""
    places = [bucket("shares/1", unit) for unit in UNITS]
    counts = Counter(chosen(weights, 1.0, place) for place in places)
    squares = ((counts[arm] - len(UNITS) * weight) ** 2 / (len(UNITS) * weight) for arm, weight in enumerate(weights))
    assert sum(squares) < 21.1
    again = [bucket("shares/2", unit) for unit in UNITS]
    both = sum(one < 0.5 and two < 0.5 for one, two in zip(places, again, strict=True))
    assert abs(both / len(UNITS) - 0.25) < 0.01


def test_the_whole_line_is_shared_out_at_full_coverage() -> None:
    """The arms' ranges touch: there is no unit between them."""
    for weights in WEIGHTS:
        found = ranges(weights, 1.0)
        assert all(end == start for (_, end), (start, _) in pairwise(found))
        assert found[-1][1] == pytest.approx(1.0, abs=1e-12)
