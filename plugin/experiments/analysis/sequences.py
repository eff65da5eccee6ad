"""Statistics that stay valid if an experiment is evaluated repeatedly. Pure.

Every interval and test here is anytime-valid: it is valid for all looks together, for any number of looks and any time
of stopping. The intervals are asymptotic, as in the central limit theorem. The test of the sample ratio is exact.
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
"""Effective units that every arm needs for a comparison. With fewer, sums are not close enough to normal."""
PRIOR_UNITS = 100.0
"""Weight of the declared shares in the prior of the sample ratio test, as a number of units."""


def radius(variance: float, n: int, *, alpha: float = 0.05, tuned_for: int = 5000) -> float:
    """Half the width of the two-sided asymptotic confidence sequence around a mean of n, each of this variance.

        sqrt(variance) sqrt( 2 (n rho² + 1) / (n² rho²) log( sqrt(n rho² + 1) / alpha ) )
        rho² = ( -2 log alpha + log(1 - 2 log alpha) ) / tuned_for

    The boundary of the mixture over N(0, rho²). It is narrowest near n = tuned_for; elsewhere it is wider, but valid.
    Source: Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas, arXiv 2103.06476: the sequence, and rho by its appendix.
    """
    evidence = -2 * math.log(alpha)
    steps = n * (evidence + math.log(1 + evidence)) / tuned_for  # n rho²
    return math.sqrt(variance * 2 * (steps + 1) / (n * steps) * math.log(math.sqrt(steps + 1) / alpha))


@dataclass(frozen=True)
class Interval:
    """A difference with the ends of its confidence sequence, in the metric's unit."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmMean:
    """A metric's mean per request in one arm."""

    mean: float
    variance: float
    """variance per unit; the variance of the mean is this divided by `units`"""
    units: int
    requests: int
    effective_units: float
    """number of equally active units with the same information: (sum of counts)² / sum of counts²"""

    @classmethod
    def of(cls, sums: Floats, counts: Integers) -> ArmMean | None:
        """The ratio of sums, with units as clusters and its variance linearised (delta method); None without a unit.

            mean = sum(sums) / sum(counts)        variance = sum( (sums - mean counts)² ) / mean(counts)² / (units - 1)

        sums, counts: [units], the metric's sum over a unit's requests, and the number of these requests, at least one.
        A unit with many similar requests makes the variance larger. Treating requests as independent would hide this.
        """
        units, requests = len(counts), int(counts.sum())
        if units == 0:
            return None
        mean = float(sums.sum() / requests)
        squares = float(((sums - mean * counts) ** 2).sum()) * (units / requests) ** 2
        return cls(mean, squares / max(units - 1, 1), units, requests, requests**2 / float((counts**2).sum()))

    @property
    def is_enough(self) -> bool:
        """True if there are enough effective units. A few units with most of the requests count as few."""
        return self.effective_units >= MIN_UNITS


def difference(control: ArmMean, treatment: ArmMean, *, alpha: float = 0.05, tuned_for: int = 5000) -> Interval | None:
    """treatment - control, valid at all looks together with probability 1 - alpha. None with too little data.

        radius(n v, n),    v = variance_c / units_c + variance_t / units_t,    n = requests_c + requests_t
        variance_a = max(arm a's own, that of both arms' units around their common mean)

    Units are assigned to the arms in fixed shares p. So the difference is the mean of one stream: a unit contributes
    its linearised value divided by p, with a minus sign in the control. The variance of this mean is v. The observed
    shares replace p, which is an error of higher order only (arXiv 2103.06476 on randomised experiments).

    Only v depends on the sizes of the arms. n is the clock of the boundary: how long the experiment was watched. It
    counts requests, as tuned_for does, because the total error takes a step with every request. A returning unit tends
    to step in its old direction. Such a walk crosses the boundary no more often than independent steps of the same
    variance (Slepian's inequality), as long as a unit does not systematically reverse its behaviour. A clock that
    counts units would stand still while the same units send more requests, but the walk would continue.

    The variance of an arm is at least that of both arms together. With few requests, rare errors may not occur, and an
    arm without errors would have zero variance. Without this rule, an arm with a tenth of the units and 1 % errors
    gives false alarms in 3 of 10 experiments. The rule only makes intervals wider. One limitation remains: after a few
    hundred units with mostly equal values, a real and large difference may be underestimated.
    """
    if not (control.is_enough and treatment.is_enough):
        return None
    arms, units = (control, treatment), control.units + treatment.units
    common = sum(arm.units * arm.mean for arm in arms) / units
    together = sum(arm.units * (arm.variance + (arm.mean - common) ** 2) for arm in arms) / units
    v = sum(max(arm.variance, together) / arm.units for arm in arms)
    if v == 0:  # all units are equal: the probability of a different unit is unknown
        return None
    n = control.requests + treatment.requests
    estimate, half = treatment.mean - control.mean, radius(n * v, n, alpha=alpha, tuned_for=tuned_for)
    return Interval(estimate, estimate - half, estimate + half)


@dataclass(frozen=True)
class SampleRatio:
    """The test whether the shares of units in the arms are as declared."""

    log_bayes_factor: float
    """evidence for other shares, against the declared shares"""
    p_value: float
    """sequential: if the shares are as declared, it is ever below alpha with probability at most alpha"""
    mismatch: bool


def sample_ratio(counts: Sequence[int], shares: Sequence[float], *, alpha: float = 0.001) -> SampleRatio:
    """The sequential multinomial test of the number of units in each arm. Mismatch if log B > log(1 / alpha).

        log B = log G(A) - log G(A + n) + sum( log G(a + counts) - log G(a) ) - sum( counts log shares )

    G is the gamma function, n the sum of counts, a = PRIOR_UNITS · shares the parameters of a Dirichlet prior over the
    true shares, and A = PRIOR_UNITS their sum. If the shares are as declared, B is a martingale that starts at 1.
    Source: Lindon and Malek, arXiv 2011.03567. shares: all above 0; they are divided by their sum.
    """
    if min(shares) <= 0 or len(counts) != len(shares):
        raise ValueError(f"expected a share above 0 for each of {len(counts)} arms, found {list(shares)}")
    log_b = math.lgamma(PRIOR_UNITS) - math.lgamma(PRIOR_UNITS + sum(counts))
    for count, share in zip(counts, (share / sum(shares) for share in shares), strict=True):
        prior = PRIOR_UNITS * share
        log_b += math.lgamma(prior + count) - math.lgamma(prior) - count * math.log(share)
    return SampleRatio(log_b, math.exp(-max(log_b, 0.0)), log_b > math.log(1 / alpha))
