"""Spiked covariance: directions whose variance stands out of noise, by random matrix theory.

Model: n independent vectors [d] with covariance sigma^2 I, but for a few directions, the spikes, in which it is l. With
gamma = d / n, lambda = a sample eigenvalue, and d and n large:

    bulk       eigenvalues of noise fill sigma^2 (1 - sqrt(gamma))^2 ... sigma^2 (1 + sqrt(gamma))^2, by the
               Marchenko-Pastur law (MP); the largest one fluctuates by sigma^2 n^(-2/3) (1 + sqrt(gamma))^(4/3)
               gamma^(-1/6) times a Tracy-Widom variable (Johnstone 2001, Ann. Stat. 29)
    threshold  a spike is seen if l > sigma^2 (1 + sqrt(gamma))           (BBP: arXiv math/0403022, math/0408165)
    value      lambda = l (1 + gamma sigma^2 / (l - sigma^2)), which is inverted here
    direction  the sample eigenvector has with the spike the squared cosine (1 - gamma / m^2) / (1 + gamma / m), where
               m = l / sigma^2 - 1                                        (Paul 2007; arXiv 0910.2120)
    noise      sigma^2 = median eigenvalue / median of MP                 (arXiv 1311.0851, 1305.5870)

With gamma > 1 the d - n eigenvalues that are zero are left out, and MP is that of the others.

Vectors of a language model are not noise with a few spikes: their variance falls off over all directions, some tokens
have huge vectors, and the tokens of one text are not independent. Their bulk then is not MP, its edge is a convention,
and a spike is no more than a direction with a variance well above the median. `fit` says how far the bulk is from MP,
as a Kolmogorov-Smirnov distance. The corrections of values and cosines hold only where it is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TRACY_WIDOM = 3.272
"""Value that the Tracy-Widom law of real data exceeds once in a thousand times.

As the noise is estimated too, pure noise of less than a hundred directions has a spike up to once in a hundred times.
"""
GOOD_FIT = 0.1
"""Kolmogorov-Smirnov distance up to which a bulk passes for Marchenko-Pastur."""


@dataclass(frozen=True)
class Spike:
    """A direction whose variance stands out."""

    value: float
    """eigenvalue of the sample covariance"""
    population: float
    """corrected for the bias that noise adds"""
    squared_cosine: float
    """between the sample direction and the true one, as the model predicts"""
    direction: Tensor
    """unit vector [width]"""


@dataclass(frozen=True)
class SpikedCovariance:
    """A sample covariance as noise and spikes."""

    width: int
    samples: int
    noise: float
    """sigma^2"""
    spikes: tuple[Spike, ...]
    """the largest first"""
    fit: float
    """Kolmogorov-Smirnov distance between the bulk's eigenvalues and the Marchenko-Pastur law, from 0 to 1"""
    margin: float = TRACY_WIDOM
    """Tracy-Widom scales between the bulk's edge and the lowest spike"""

    @property
    def gamma(self) -> float:
        """Numbers per sample."""
        return self.width / self.samples

    @property
    def edge(self) -> float:
        """Upper edge of the bulk, lambda+."""
        return self.noise * (1 + math.sqrt(self.gamma)) ** 2

    @property
    def cut(self) -> float:
        """Eigenvalue above which there are spikes: the edge with the margin."""
        return self.edge + self.margin * self.noise * edge_scale(self.width, self.samples)

    @property
    def detectable(self) -> float:
        """Variance of a direction below which no method of this kind sees it."""
        return self.noise * (1 + math.sqrt(self.gamma))

    @property
    def bulk(self) -> int:
        """The number of eigenvalues below the spikes, those left out that are zero for want of samples."""
        return min(self.width, self.samples) - len(self.spikes)

    @property
    def follows_law(self) -> bool:
        """True if the bulk passes for noise, so that the corrections mean something."""
        return self.fit <= GOOD_FIT


def analyse(covariance: Tensor, samples: int, *, margin: float = TRACY_WIDOM) -> SpikedCovariance:
    """Noise and spikes of a sample covariance [width, width].

    samples: independent vectors that it was taken from; one less where their mean was subtracted.
    margin: distance of spikes from the bulk's edge, in scales of the largest eigenvalue of noise.
    ValueError if half of the directions have no variance at all, so that there is no noise to compare with.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    width, seen = len(values), min(len(values), samples)
    descending = values.flip(0)[:seen].clamp_min(0).cpu()
    gamma, middle = width / samples, float(descending.quantile(0.5))
    if middle <= float(descending[0]) * width * torch.finfo(torch.float32).eps:
        raise ValueError("expected variance in most directions, found half of the eigenvalues next to zero")
    noise = middle / law_median(gamma)
    found = SpikedCovariance(width, samples, noise, (), 0.0, margin)
    count = int((descending > found.cut).sum())
    spikes = tuple(
        _spike(float(descending[place]), vectors[:, width - 1 - place].contiguous(), noise, gamma)
        for place in range(count)
    )  # fmt: skip
    return SpikedCovariance(width, samples, noise, spikes, distance(descending[count:] / noise, gamma), margin)


def _spike(value: float, direction: Tensor, noise: float, gamma: float) -> Spike:
    population = noise * population_value(value / noise, gamma)
    return Spike(value, population, squared_cosine(population / noise, gamma), direction)


def edge_scale(width: int, samples: int) -> float:
    """Scale by which the largest eigenvalue of noise of variance one fluctuates about the edge."""
    gamma = width / samples
    return float(samples ** (-2 / 3) * (1 + math.sqrt(gamma)) ** (4 / 3) * gamma ** (-1 / 6))


def population_value(value: float, gamma: float) -> float:
    """The variance l that gives a sample eigenvalue above the edge, with noise of variance one."""
    middle = value + 1 - gamma
    return (middle + math.sqrt(max(0.0, middle**2 - 4 * value))) / 2


def sample_value(population: float, gamma: float) -> float:
    """The sample eigenvalue of a direction of variance l, with noise of variance one.

    At or below the threshold it is the bulk's edge.
    """
    seen = max(population, 1 + math.sqrt(gamma))
    return seen * (1 + gamma / (seen - 1))


def squared_cosine(population: float, gamma: float) -> float:
    """Between the sample direction and one of variance l, with noise of variance one; 0 below the threshold."""
    more = population - 1
    return max(0.0, (1 - gamma / more**2) / (1 + gamma / more)) if more > 0 else 0.0


def law(values: Tensor, gamma: float) -> Tensor:
    """Share of the nonzero eigenvalues of noise of variance one that are at most these: MP's distribution function.

    With x = 1 + gamma + 2 sqrt(gamma) cos(a), the share above x is, in closed form,
    ((1 + gamma) a - 2 sqrt(gamma) sin(a) - 2 |1 - gamma| atan(r tan(a / 2))) / (2 pi min(1, gamma)),
    r = |1 - sqrt(gamma)| / (1 + sqrt(gamma)).
    """
    root = math.sqrt(gamma)
    angle = ((values.double() - 1 - gamma) / (2 * root)).clamp(-1, 1).acos()
    half = torch.atan2(abs(1 - root) / (1 + root) * (angle / 2).sin(), (angle / 2).cos())
    above = (1 + gamma) * angle - 2 * root * angle.sin() - 2 * abs(1 - gamma) * half
    return 1 - above / (2 * math.pi * min(1.0, gamma))


def law_median(gamma: float) -> float:
    """The median of the nonzero eigenvalues of noise of variance one, by bisection."""
    low, high = (1 - math.sqrt(gamma)) ** 2, (1 + math.sqrt(gamma)) ** 2
    while (middle := (low + high) / 2) not in (low, high):
        if float(law(torch.tensor(middle, dtype=torch.float64), gamma)) < 0.5:
            low = middle
        else:
            high = middle
    return middle


def distance(values: Tensor, gamma: float) -> float:
    """Kolmogorov-Smirnov distance between eigenvalues, in units of the noise, and MP. 1 if there are none."""
    if not len(values):
        return 1.0
    expected = law(values.sort().values, gamma)
    steps = torch.arange(len(values) + 1).double() / len(values)
    return float(torch.maximum((steps[1:] - expected).abs(), (expected - steps[:-1]).abs()).max())
