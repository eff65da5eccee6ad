"""What is said of an experiment holds at every look, and the simpler ways of saying it do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import cheaply
from vllm_edits.plugin.experiments.analysis.sequences import (
    MIN_UNITS,
    PRIOR_UNITS,
    ArmMean,
    Interval,
    difference,
    radius,
    sample_ratio,
)

Look = tuple[ArmMean, ArmMean]
Draw = Callable[[np.random.Generator, np.ndarray], np.ndarray]
Judge = Callable[[ArmMean, ArmMean], Interval | None]
RUNS = 200


def arm(sums: np.ndarray, counts: np.ndarray) -> ArmMean:
    found = ArmMean.of(sums[counts > 0], counts[counts > 0])
    assert found is not None
    return found


def coming(seed: int, *, share: float, draw: Draw) -> Iterator[Look]:
    """Every unit comes once; looks after every 200. draw: values for units, given which are treated."""
    rng = np.random.default_rng(seed)
    treated = rng.random(6000) < share
    values, once = draw(rng, treated), np.ones(6000, dtype=int)
    for seen in range(400, 6001, 200):
        t = treated[:seen]
        yield arm(values[:seen][~t], once[:seen][~t]), arm(values[:seen][t], once[:seen][t])


def staying(seed: int, *, effect: float = 0.0, own_way: float = 1.0, units: int = 800) -> Iterator[Look]:
    """The same units ask again and again, some hundred times as often as others, each in its own way."""
    rng = np.random.default_rng(seed)
    treated = rng.random(units) < 0.5
    activity, habit = np.exp(rng.normal(size=units)), own_way * rng.normal(size=units)
    sums, counts = np.zeros(units), np.zeros(units, dtype=int)
    for look in range(25):
        asked = rng.poisson(activity * 1.2**look)
        counts += asked
        sums += asked * (habit + effect * treated) + np.sqrt(asked) * rng.normal(size=units) * 2
        yield arm(sums[~treated], counts[~treated]), arm(sums[treated], counts[treated])


def misses(runs: list[list[Look]], judge: Judge, truth: float = 0.0) -> float:
    """The part of runs in which some look's interval does not hold the truth."""

    def misses_once(run: list[Look]) -> bool:
        found = [judge(control, treatment) for control, treatment in run]
        return any(each is not None and not each.low <= truth <= each.high for each in found)

    return float(np.mean([misses_once(run) for run in runs]))


def peeked(control: ArmMean, treatment: ArmMean) -> Interval:
    """The 95 % interval for those who look once."""
    estimate = treatment.mean - control.mean
    half = 1.96 * math.sqrt(control.variance / control.units + treatment.variance / treatment.units)
    return Interval(estimate, estimate - half, estimate + half)


# -- the boundary ------------------------------------------------------------------------------------------------------


def mixture(total: float, n: int, rho_squared: float) -> float:
    """The integral of exp(theta total - theta² n / 2) over theta ~ N(0, rho²), as a sum over a fine grid."""
    spread = math.sqrt(1 / (n + 1 / rho_squared))
    theta = np.linspace(-1, 1, 200_001) * (abs(total) / n + 12 * spread)
    exponent = theta * total - theta**2 * n / 2 - theta**2 / (2 * rho_squared)
    return float(np.exp(exponent).sum() * (theta[1] - theta[0]) / math.sqrt(2 * math.pi * rho_squared))


@pytest.mark.parametrize(("n", "alpha", "tuned_for"), [(200, 0.05, 5000), (5000, 0.05, 5000), (10**5, 0.01, 2000)])
def test_the_boundary_is_where_the_mixture_has_grown_to_one_over_alpha(n: int, alpha: float, tuned_for: int) -> None:
    rho_squared = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / tuned_for
    at_boundary = n * radius(1.0, n, alpha=alpha, tuned_for=tuned_for)
    assert mixture(at_boundary, n, rho_squared) == pytest.approx(1 / alpha, rel=1e-6)
    assert mixture(at_boundary * 0.99, n, rho_squared) < 0.97 / alpha, "a check that can fail"


@cheaply
@given(st.integers(100, 10**6), st.sampled_from([0.001, 0.05, 0.2]), st.floats(0.01, 100))
def test_no_other_tuning_is_much_narrower_at_the_size_tuned_for(n: int, alpha: float, variance: float) -> None:
    """Scale goes with the standard deviation, and nothing is narrower than the interval of a single look."""
    tuned = radius(variance, n, alpha=alpha, tuned_for=n)
    others = [radius(variance, n, alpha=alpha, tuned_for=max(1, int(n * factor))) for factor in np.geomspace(0.05, 20)]
    assert tuned <= 1.002 * min(others)
    assert tuned < 0.9 * max(others)
    assert tuned == pytest.approx(math.sqrt(variance) * radius(1.0, n, alpha=alpha, tuned_for=n))
    assert tuned > math.sqrt(2 * math.log(1 / alpha) * variance / n)


# -- one arm -----------------------------------------------------------------------------------------------------------


def test_the_variance_of_the_ratio_is_that_of_leaving_units_out() -> None:
    """Delete-one jackknife, which knows nothing of derivatives."""
    rng = np.random.default_rng(3)
    counts = rng.poisson(4, 3000) + 1
    sums = counts * rng.normal(1, 1, 3000) + rng.normal(size=3000)
    found = arm(sums, counts)
    without = (sums.sum() - sums) / (counts.sum() - counts)
    jackknife = (len(sums) - 1) * np.var(without)
    assert found.mean == pytest.approx(sums.sum() / counts.sum())
    assert found.variance / found.units == pytest.approx(jackknife, rel=0.01)
    assert (found.units, found.requests) == (3000, counts.sum())


def test_units_that_ask_once_give_the_ordinary_variance() -> None:
    values = np.random.default_rng(4).normal(size=50)
    found = arm(values, np.ones(50, dtype=int))
    assert found.variance == pytest.approx(values.var(ddof=1))
    assert found.effective_units == pytest.approx(50)


def test_asking_the_same_again_adds_no_certainty() -> None:
    """As requests they were ten times as many; as units they are what they were."""
    values = np.random.default_rng(5).normal(size=200)
    once, often = arm(values, np.ones(200, dtype=int)), arm(10 * values, np.full(200, 10))
    assert often.variance == pytest.approx(once.variance)
    assert often.requests == 10 * once.requests


def test_a_unit_that_makes_most_requests_makes_the_units_few() -> None:
    counts = np.ones(1000, dtype=int)
    assert arm(counts * 1.0, counts).is_enough
    counts[0] = 5000
    assert arm(counts * 1.0, counts).effective_units < 2
    assert not arm(counts * 1.0, counts).is_enough


def test_an_arm_without_units_has_no_mean() -> None:
    assert ArmMean.of(np.zeros(0), np.zeros(0, dtype=int)) is None
    assert arm(np.ones(1), np.ones(1, dtype=int)).variance == 0


# -- two arms ----------------------------------------------------------------------------------------------------------


def bernoulli(ones: int, units: int) -> ArmMean:
    return arm(np.r_[np.ones(ones), np.zeros(units - ones)], np.ones(units, dtype=int))


def test_with_too_few_units_in_either_arm_there_is_no_interval() -> None:
    few, enough = bernoulli(50, MIN_UNITS - 1), bernoulli(50, MIN_UNITS)
    assert difference(few, enough) is None
    assert difference(enough, few) is None
    assert difference(enough, enough) is not None


def test_the_difference_turns_with_its_arms_and_narrows_with_units() -> None:
    control, treatment = bernoulli(30, 300), bernoulli(60, 400)
    there, back = difference(control, treatment), difference(treatment, control)
    assert there is not None
    assert back is not None
    assert (there.estimate, there.low, there.high) == pytest.approx((-back.estimate, -back.high, -back.low))
    assert there.estimate == pytest.approx(0.15 - 0.1)
    larger = difference(bernoulli(3000, 30000), bernoulli(6000, 40000))
    assert larger is not None
    assert larger.high - larger.low < (there.high - there.low) / 5


def test_where_nobody_varies_nothing_is_said_unless_the_arms_are_opposite() -> None:
    assert difference(bernoulli(0, 200), bernoulli(0, 200)) is None
    found = difference(bernoulli(0, 200), bernoulli(200, 200))
    assert found is not None
    assert found.low > 0


@pytest.mark.long
def test_equal_arms_seldom_differ_however_often_one_looks() -> None:
    """Positive control: the interval for one look, at the same looks, finds a difference in many experiments."""

    def skewed(rng: np.random.Generator, treated: np.ndarray) -> np.ndarray:
        return rng.exponential(size=len(treated))

    for share in (0.5, 0.2):
        runs = [list(coming(seed, share=share, draw=skewed)) for seed in range(RUNS)]
        assert misses(runs, difference) <= 0.05
        assert misses(runs, peeked) > 0.15


@pytest.mark.long
def test_units_that_keep_asking_do_not_raise_false_alarms() -> None:
    """Positive controls: the peeked interval, and requests taken for units, which are far too certain."""
    runs = [list(staying(seed)) for seed in range(RUNS)]

    def as_if_independent(control: ArmMean, treatment: ArmMean) -> Interval | None:
        def alone(mean: ArmMean) -> ArmMean:
            return ArmMean(mean.mean, 5.0, mean.requests, mean.requests, mean.requests)  # habit 1 and noise 4

        return difference(alone(control), alone(treatment))

    assert misses(runs, difference) <= 0.05
    assert misses(runs, peeked) > 0.1
    assert misses(runs, as_if_independent) > 0.5
    alike = [list(staying(seed, own_way=0.0)) for seed in range(RUNS)]  # the walk goes on, though no unit is new
    assert misses(alike, difference) <= 0.05
    assert misses(alike, peeked) > 0.15


def test_a_small_arm_without_rare_errors_is_not_certain_of_having_none() -> None:
    """Positive control: with each arm's own variance alone, a canary alarms falsely in many experiments."""

    def by_own_variance(control: ArmMean, treatment: ArmMean) -> Interval | None:
        if not (control.is_enough and treatment.is_enough):
            return None
        n, estimate = control.units + treatment.units, treatment.mean - control.mean
        v = control.variance / control.units + treatment.variance / treatment.units
        return Interval(estimate, estimate - radius(n * v, n), estimate + radius(n * v, n))

    def rare(rng: np.random.Generator, treated: np.ndarray) -> np.ndarray:
        return (rng.random(len(treated)) < 0.01).astype(float)

    runs = [list(coming(seed, share=0.1, draw=rare)) for seed in range(RUNS)]
    assert misses(runs, difference) <= 0.05
    assert misses(runs, by_own_variance) > 0.15


@pytest.mark.long
def test_a_planted_effect_is_inside_at_every_look_and_is_found() -> None:
    def shifted(rng: np.random.Generator, treated: np.ndarray) -> np.ndarray:
        return rng.normal(size=len(treated)) + 0.2 * treated

    runs = [list(coming(seed, share=0.3, draw=shifted)) for seed in range(RUNS)]
    assert misses(runs, difference, truth=0.2) <= 0.05
    assert misses(runs, difference, truth=0.0) > 0.95, "it is told from none"
    runs = [list(staying(seed, effect=0.8)) for seed in range(RUNS)]
    assert misses(runs, difference, truth=0.8) <= 0.05
    assert misses(runs, difference, truth=0.0) > 0.9


# -- the sample ratio --------------------------------------------------------------------------------------------------


@cheaply
@given(st.lists(st.integers(0, 12), min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_the_bayes_factor_is_what_predicting_unit_after_unit_gives(counts: list[int], order: object) -> None:
    """The next arm with the prior's share and those seen, over the declared share; in whichever order they came."""
    shares = [(2 + i) / sum(2 + j for j in range(len(counts))) for i in range(len(counts))]
    units = [i for i, count in enumerate(counts) for _ in range(count)]
    order.shuffle(units)  # type: ignore[attr-defined]
    seen, log_b = [PRIOR_UNITS * share for share in shares], 0.0
    for i in units:
        log_b += math.log(seen[i] / sum(seen) / shares[i])
        seen[i] += 1
    found = sample_ratio(counts, [3 * share for share in shares])
    assert found.log_bayes_factor == pytest.approx(log_b, abs=1e-9)
    assert found.p_value == pytest.approx(min(1, math.exp(-log_b)))


def test_declared_shares_seldom_mismatch_at_any_look_and_others_do() -> None:
    """Positive control: a two-sided z test at the same looks."""
    rng = np.random.default_rng(7)
    looks = rng.binomial(200, 0.1, size=(300, 60)).cumsum(axis=1)
    totals = 200 * np.arange(1, 61)

    def alarms(share: float, alpha: float) -> float:
        def alarms_once(run: list[int]) -> bool:
            seen = [[n - t, t] for n, t in zip(totals.tolist(), run, strict=True)]
            return any(sample_ratio(each, [1 - share, share], alpha=alpha).mismatch for each in seen)

        return float(np.mean([alarms_once(run) for run in looks.tolist()]))

    assert alarms(0.1, 0.05) <= 0.05
    assert (np.abs(looks - 0.1 * totals) > 1.96 * np.sqrt(0.09 * totals)).any(axis=1).mean() > 0.15
    assert alarms(0.12, 0.001) > 0.95, "a mismatch is found"


def test_without_units_there_is_no_mismatch_and_a_share_of_nothing_is_refused() -> None:
    assert sample_ratio([0, 0], [1, 1]).p_value == 1
    assert not sample_ratio([0, 0], [1, 1]).mismatch
    with pytest.raises(ValueError, match="share above 0"):
        sample_ratio([1, 0], [1, 0])
