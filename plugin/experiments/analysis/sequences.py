"""What may be said of an experiment that is looked at every hour. Pure.

Every interval and test here is anytime-valid: it holds at all looks together, however many there are and whenever one
stops. The intervals are asymptotic, like those of the central limit theorem; the test of the sample ratio is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

MIN_UNITS = 100
"""Effective units that every arm needs before it is compared: with fewer, sums are not yet near enough to normal."""
PRIOR_UNITS = 100.0
"""How much the sample ratio's alternative keeps to the declared shares: as much as so many units seen before."""


def radius(variance: float, n: int, *, alpha: float = 0.05, tuned_for: int = 5000) -> float:
    """Half the width of the two-sided asymptotic confidence sequence around a mean of n, each of this variance.

        sqrt(variance) sqrt( 2 (n rho² + 1) / (n² rho²) log( sqrt(n rho² + 1) / alpha ) )
        rho² = ( -2 log alpha + log(1 - 2 log alpha) ) / tuned_for

    The boundary of the mixture over N(0, rho²), narrowest (nearly) at n = tuned_for; elsewhere only wider, never wrong.
    Source: Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, arXiv 2103.06476: the sequence, and rho by its appendix.
    """
    evidence = -2 * math.log(alpha)
    steps = n * (evidence + math.log(1 + evidence)) / tuned_for  # n rho²
    return math.sqrt(variance * 2 * (steps + 1) / (n * steps) * math.log(math.sqrt(steps + 1) / alpha))


@dataclass(frozen=True)
class Interval:
    """A difference and the ends of its confidence sequence, in the metric's unit."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmMean:
    """A metric's mean per request in one arm."""

    mean: float
    variance: float
    """per unit: the mean's own variance is this over `units`"""
    units: int
    requests: int
    effective_units: float
    """equally active units that would say as much: (sum of counts)² / sum of counts²"""

    @classmethod
    def of(cls, sums: Floats, counts: Integers) -> ArmMean | None:
        """The ratio of sums, with units as clusters and its variance linearised (delta method); None without a unit.

            mean = sum(sums) / sum(counts)        variance = sum( (sums - mean counts)² ) / mean(counts)² / (units - 1)

        sums, counts: [units], a metric's sum over a unit's requests and how many they are, at least one. That one unit
        asks often, and alike, makes the variance larger; requests taken for independent ones would hide it.
        """
        units, requests = len(counts), int(counts.sum())
        if units == 0:
            return None
        mean = float(sums.sum() / requests)
        squares = float(((sums - mean * counts) ** 2).sum()) * (units / requests) ** 2
        return cls(mean, squares / max(units - 1, 1), units, requests, requests**2 / float((counts**2).sum()))

    @property
    def is_enough(self) -> bool:
        """Whether there are units enough to speak of; a few that make most of the requests are few."""
        return self.effective_units >= MIN_UNITS


def difference(control: ArmMean, treatment: ArmMean, *, alpha: float = 0.05, tuned_for: int = 5000) -> Interval | None:
    """treatment - control, right at all looks together with probability 1 - alpha; None while nothing can be said.

        radius(n v, n),    v = variance_c / units_c + variance_t / units_t,    n = requests_c + requests_t
        variance_a = max(arm a's own, that of both arms' units around their common mean)

    Units come to the arms in fixed shares p, so the difference is the mean of one stream, to which a unit of an arm
    gives its linearised value over p, and minus that in the control. The variance of such a mean is v: shares as they
    came out stand for p, which changes it in higher order only (arXiv 2103.06476 on randomised experiments).

    v is all that depends on the arms' sizes; n is only the clock, by which the boundary knows how long it was watched.
    It counts requests, and so does tuned_for: the total error walks a step with every request. A unit that comes back
    walks on in its old direction, and such a walk crosses no more often than independent steps of the same variance
    (Slepian's inequality), as long as what a unit does is not opposed to what it did. Were the clock to count units, it
    would stand still while the same ones keep asking, and the walk would not.

    No arm is taken to vary less than both together: among few requests rare errors do not happen, and an arm without
    one would be certain of it. Without this a tenth of the units at 1 % errors alarms falsely in 3 of 10 experiments.
    It makes wider, never narrower. What remains asymptotic: after some hundred units, most of whose values are alike,
    a real and large difference may be underrated.
    """
    if not (control.is_enough and treatment.is_enough):
        return None
    arms, units = (control, treatment), control.units + treatment.units
    common = sum(arm.units * arm.mean for arm in arms) / units
    together = sum(arm.units * (arm.variance + (arm.mean - common) ** 2) for arm in arms) / units
    v = sum(max(arm.variance, together) / arm.units for arm in arms)
    if v == 0:  # nobody differs from anybody: how rare it is that somebody does is not known
        return None
    n = control.requests + treatment.requests
    estimate, half = treatment.mean - control.mean, radius(n * v, n, alpha=alpha, tuned_for=tuned_for)
    return Interval(estimate, estimate - half, estimate + half)


@dataclass(frozen=True)
class SampleRatio:
    """Whether units came to the arms in the declared shares."""

    log_bayes_factor: float
    """for other shares, against the declared ones"""
    p_value: float
    """sequential: below alpha at any look with probability at most alpha, if the shares are as declared"""
    mismatch: bool


def sample_ratio(counts: Sequence[int], shares: Sequence[float], *, alpha: float = 0.001) -> SampleRatio:
    """The sequential multinomial test of how many units came to each arm: mismatch when log B > log(1 / alpha).

        log B = log G(A) - log G(A + n) + sum( log G(a + counts) - log G(a) ) - sum( counts log shares )

    G is the gamma function, n the sum of counts, a = PRIOR_UNITS shares the parameters of a Dirichlet prior over the
    true shares, and A = PRIOR_UNITS their sum. B is a martingale that starts at 1 if the shares are as declared.
    Source: Lindon and Malek, arXiv 2011.03567. shares: all above 0; they are divided by their sum.
    """
    if min(shares) <= 0 or len(counts) != len(shares):
        raise ValueError(f"expected a share above 0 for each of {len(counts)} arms, found {list(shares)}")
    log_b = math.lgamma(PRIOR_UNITS) - math.lgamma(PRIOR_UNITS + sum(counts))
    for count, share in zip(counts, (share / sum(shares) for share in shares), strict=True):
        prior = PRIOR_UNITS * share
        log_b += math.lgamma(prior + count) - math.lgamma(prior) - count * math.log(share)
    return SampleRatio(log_b, math.exp(-max(log_b, 0.0)), log_b > math.log(1 / alpha))
