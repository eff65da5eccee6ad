"""A linear classifier on vectors, to ask whether something can still be told from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DECAY = 1e-3
"""weight of the squared weights in the loss"""
ROUNDS = 50


def fit(vectors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [hidden, labels] and bias [labels] of a logistic regression on standardised vectors [samples, hidden].

    labels: [samples], numbers from 0.
    """
    weights = torch.zeros(vectors.shape[1], int(labels.max()) + 1, dtype=vectors.dtype, device=vectors.device)
    bias = torch.zeros(weights.shape[1], dtype=vectors.dtype, device=vectors.device)
    weights.requires_grad_()
    bias.requires_grad_()
    optimizer: Any = torch.optim.LBFGS([weights, bias], max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        loss: Any = torch.nn.functional.cross_entropy(vectors @ weights + bias, labels) + DECAY * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach(), bias.detach()


def accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Share of the test vectors whose label a probe on the train vectors tells.

    Labels are [samples, labels - 1], one column for each label but the first.
    """
    vectors, labels = (each.clone() for each in train)
    mean, spread = vectors.mean(0), vectors.std(0).clamp_min(1e-6)
    weights, bias = fit((vectors - mean) / spread, _numbers(labels))
    told = ((test[0] - mean) / spread @ weights + bias).argmax(1)
    return float((told == _numbers(test[1])).float().mean())


def _numbers(labels: Tensor) -> Tensor:
    return (labels * torch.arange(1, labels.shape[1] + 1).to(labels)).sum(1).long()
