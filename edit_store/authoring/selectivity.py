"""Gates on the sphere: features, responses, false positives, their bound, and the intrinsic dimension behind it.

    phi(x) = unit((x - bias) / weight / sqrt(width) - centroid)
    n      = -1 - log2 P(<phi - phi', phi'> >= delta)          delta = 2 (1 - theta)^2 - 2
    P(<phi, t> > 1 - theta) <= sqrt(2^(-n-1))                   for every trigger t

x             [width]  vector behind a norm with `weight` and `bias` [width]; norms that scale by 1 + w have that weight
phi, phi', t  [width]  unit vectors; phi and phi' are of ordinary text, independent of one another
centroid      [width]  mean over ordinary text of what stands before it in phi

The bound is short to see. Two features at which the same gate fires are within twice its angle of one another, so
<phi, phi'> >= 2 (1 - theta)^2 - 1, and that two independent ones fire has the square of the probability that one does.
It is for one gate; several have at most the sum of theirs.

Source: stealth edits (arXiv 2406.12670), `util/measures.py` and `evaluation/jetpack/construct.py` of its code: the same
n, delta, and the same root. Editability in the paper's abstract is n itself, and the code has no other score. As in
the code, n is counted over pairs. The code takes one token of each text, so that its pairs are independent; here a text
may give several, and pairs within one text are left out, which has the same expectation with more pairs.

A gate without a bias of its own (`folded_rows`) has it folded into its row, as `stealth_edit/compute_wb.py` does:

    w = (alpha s + v b / <v, s>) / weight / sqrt(width)
    v = C^-1 s      b = alpha (theta - |s|^2)      alpha = height / theta

s  [width]         the trigger on the surface, without a centroid
C  [width, width]  second moment of ordinary text about s: <v, .> is nearly <v, s> on all of it. The bound is that of a
                   gate with a bias, and holds as far as this does
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_AT_ONCE = 1024
"""features that are compared with all others at once"""


@dataclass(frozen=True)
class Sphere:
    """The map from vectors behind a norm to features, as a gate with `normalise` computes it."""

    weight: Tensor
    bias: Tensor
    centroid: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> Sphere:
        """The sphere about zero."""
        return cls(weight, bias, torch.zeros_like(weight))

    def surface(self, x: Tensor) -> Tensor:
        """Vectors [..., width] without the norm's weight and bias: of length one, but for the norm's epsilon."""
        return (x - self.bias) / self.weight / math.sqrt(x.shape[-1])

    def features(self, x: Tensor) -> Tensor:
        """phi(x), [..., width]."""
        return torch.nn.functional.normalize(self.surface(x) - self.centroid, dim=-1)


@dataclass(frozen=True)
class Gates:
    """Gates, one for each trigger. Each opens where its response is above zero."""

    sphere: Sphere
    triggers: Tensor
    """features of the triggers, [gates, width]"""
    theta: float
    height: float
    """response at the own trigger"""
    rows: Tensor | None = None
    """rows with the bias folded in, [gates, width]; None if a gate has its bias"""

    def cosines(self, x: Tensor) -> Tensor:
        """<phi(x), t>, [..., gates]."""
        return self.sphere.features(x) @ self.triggers.T

    def responses(self, x: Tensor) -> Tensor:
        """Response of each gate before its activation, [..., gates]."""
        if self.rows is not None:
            return x @ self.rows.T
        return (self.cosines(x) - (1 - self.theta)) * (self.height / self.theta)

    def crossing(self, x: Tensor) -> list[tuple[int, int]]:
        """Pairs of which one's trigger opens the other's gate; x: all triggers, [gates, width]."""
        opens = (self.responses(x) > 0) | (self.cosines(x) > 1 - self.theta)
        return [(one, other) for one, other in (opens | opens.T).triu(1).nonzero().tolist()]


@dataclass
class FalsePositives:
    """Tokens of ordinary text at which gates open. First tokens are counted apart: they are alike in all texts."""

    gates: Gates
    tokens: int = 0
    opened: int = 0
    """tokens at which any gate opens"""
    first_opened: int = 0
    """of the first tokens of texts, those at which any gate opens"""
    by_gate: Tensor = field(init=False)
    """tokens at which each gate opens"""
    cosines: Tensor = field(init=False)
    """highest cosine with each trigger, at any token"""

    def __post_init__(self) -> None:
        self.by_gate = self.gates.triggers.new_zeros(len(self.gates.triggers))
        self.cosines = self.by_gate - 1

    def add(self, x: Tensor) -> None:
        """Count the tokens of one text, [tokens, width]."""
        opens = self.gates.responses(x) > 0
        self.tokens += len(x) - 1
        self.opened += int(opens[1:].any(1).sum())
        self.first_opened += int(opens[0].any())
        self.by_gate = self.by_gate + opens[1:].sum(0)
        self.cosines = torch.maximum(self.cosines, self.gates.cosines(x).amax(0))

    @property
    def share(self) -> float:
        """Share of the tokens at which any gate opens."""
        return self.opened / max(self.tokens, 1)


@dataclass(frozen=True)
class Dimension:
    """Intrinsic dimension of features, counted over pairs."""

    features: int
    pairs: int
    """pairs that were compared"""
    close: int
    """of them, those with <phi - phi', phi'> >= delta"""

    @property
    def at_least(self) -> bool:
        """True if no pair is close: `value` then is what one close pair would give, and the dimension is higher."""
        return self.close == 0

    @property
    def probability(self) -> float:
        """Share of close pairs; where there are none, what one would give."""
        return max(self.close, 1) / self.pairs

    @property
    def value(self) -> float:
        """The dimension n. The lowest is -1, where all features are alike."""
        return -1 - math.log2(self.probability)

    @property
    def bound(self) -> float:
        """Most of the probability that one gate fires on ordinary text, sqrt(2^(-n-1))."""
        return math.sqrt(2 ** (-self.value - 1))


def closeness(theta: float) -> float:
    """delta: the least <phi - phi', phi'> of two features at which one gate may fire."""
    return 2 * (1 - theta) ** 2 - 2


def intrinsic_dimension(features: Tensor, theta: float, texts: Tensor | None = None) -> Dimension:
    """The dimension of unit vectors [n, width]. `texts` [n]: of each, the number of its text; one for each if None.

    ValueError if there is no pair of two texts.
    """
    of = torch.arange(len(features)) if texts is None else texts
    of = of.to(features.device)
    pairs = close = 0
    for start in range(0, len(features), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        later = torch.ones(len(of[some]), len(of) - start, dtype=torch.bool, device=features.device).triu(1)
        apart = later & (of[some, None] != of[None, start:])
        # Of unit vectors both orders of a pair say the same.
        near = features[some] @ features[start:].T - 1 >= closeness(theta)
        pairs += int(apart.sum())
        close += int((near & apart).sum())
    if not pairs:
        raise ValueError("expected features of two texts or more")
    return Dimension(len(features), pairs, close)


def features_needed(dimension: float, close: int = 10) -> int:
    """Features of as many texts with which `close` pairs are expected to be close, so that n can be counted."""
    return math.ceil((1 + math.sqrt(1 + 8 * close * 2 ** (dimension + 1))) / 2)


def folded_rows(
    sphere: Sphere, x: Tensor, mean: Tensor, covariance: Tensor, *, theta: float, height: float
) -> Tensor | None:
    """Rows w [gates, width] with w . x = height at each trigger x [gates, width], and below zero on most text.

    mean, covariance: of ordinary text. None if it does not vary in every direction.
    """
    scale = (1 / sphere.weight / math.sqrt(x.shape[-1])).double()
    triggers = sphere.surface(x).double()
    factor, failed = torch.linalg.cholesky_ex(covariance.double() * torch.outer(scale, scale))
    if failed:
        return None
    apart = sphere.surface(mean).double() - triggers
    solved, by_apart = (torch.cholesky_solve(each.T, factor).T for each in (triggers, apart))
    # The second moment about a trigger is the covariance and a product of rank one (Sherman-Morrison).
    weight = (apart * solved).sum(1) / (1 + (apart * by_apart).sum(1))
    v = solved - weight[:, None] * by_apart
    alpha = height / theta
    bias = alpha * (theta - (triggers**2).sum(1))
    rows = alpha * triggers + v * (bias / (v * triggers).sum(1))[:, None]
    return (rows * scale).to(x)
