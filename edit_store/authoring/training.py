"""Training of the numbers of edits by gradient steps, with the model itself frozen.

    loss = mean over lessons of  -log p(answer | prompt) / tokens     + penalty
    loss = mean over pairs of    -log sigmoid(beta (gain(answer) - gain(rejected)))     for preferences (DPO)

gain(text) = log p(text | prompt) of the edited model less that of the base model, summed over the tokens

The edits are in the model by their own formulas, which the served engine is compared with: the numbers that are trained
are those that a bundle has, and nothing is converted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_edits.edit_store.authoring.host import Edits, batches, edited
from vllm_edits.edit_store.authoring.lessons import Lessons
from vllm_edits.edit_store.authoring.method import Work
from vllm_edits.edit_store.edits import Edit

Trained = Sequence[tuple[Edit, Mapping[str, Tensor]]]
"""Edits with numbers that gradients flow through."""


@dataclass(frozen=True)
class Preferences:
    """Pairs of lessons, an answer and a rejected one (direct preference optimisation, arXiv 2305.18290)."""

    answers: Lessons
    rejected: Lessons
    beta: float
    base: Tensor
    """difference of the two log-probabilities in the base model, [pairs]"""

    @classmethod
    def of(cls, answers: Lessons, rejected: Lessons, beta: float, batch: int) -> Preferences:
        """Call it with nothing trained yet, since it reads the base model."""
        with torch.no_grad():
            parts = [_difference(answers, rejected, some) for some in batches(range(len(answers)), batch)]
        return cls(answers, rejected, beta, torch.cat(parts))

    def __len__(self) -> int:
        return len(self.answers)

    def loss(self, chosen: Sequence[int]) -> Tensor:
        """Mean loss of the chosen pairs."""
        gained = _difference(self.answers, self.rejected, chosen) - self.base[list(chosen)]
        return -nn.functional.logsigmoid(self.beta * gained).mean()


def _difference(answers: Lessons, rejected: Lessons, chosen: Sequence[int]) -> Tensor:
    return answers.said(chosen).sums() - rejected.said(chosen).sums()


@dataclass(frozen=True)
class Course:
    """Length and pace of a training, with Adam over shuffled batches."""

    epochs: int
    batch: int
    rate: float
    decay: float = 0.0
    """decoupled weight decay, per step and rate"""
    enough: float = 0.0
    """mean loss of an epoch at which the training ends; a batch below it takes no step"""

    def steps(self, lessons: int) -> int:
        """The most steps that it takes."""
        return self.epochs * -(-lessons // self.batch)

    def train(
        self, work: Work, material: Lessons | Preferences, parameters: Sequence[Tensor], edits: Callable[[], Trained],
        *, name: str = "training", penalty: Callable[[], Tensor] | None = None,
        after_step: Callable[[int], None] | None = None,
    ) -> list[float]:  # fmt: skip
        """Train parameters, which `edits` makes into edits at every step. Returns the mean loss of each epoch.

        penalty: added to the loss. after_step: called with the number of steps that were taken.
        """
        optimizer = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=self.decay)
        random = torch.Generator().manual_seed(work.seed)
        losses, step, steps = list[float](), 0, self.steps(len(material))
        for _ in range(self.epochs):
            total = 0.0
            for some in batches(torch.randperm(len(material), generator=random).tolist(), self.batch):
                work.step(name, step, steps)
                optimizer.zero_grad()
                with edited(work.host.model, edits()):
                    loss = material.loss(some)
                total += float(loss.detach()) * len(some)
                if float(loss.detach()) >= self.enough:
                    whole: Any = loss if penalty is None else loss + penalty()
                    whole.backward()
                    optimizer.step()
                step += 1
                if after_step is not None:
                    after_step(step)
            losses.append(total / len(material))
            if losses[-1] < self.enough:
                break
        work.step(name, steps, steps)
        return losses


def finished(edits: Trained) -> Edits:
    """Trained edits as those of a bundle."""
    return [(edit, {name: tensor.detach().cpu().numpy().copy() for name, tensor in numbers.items()})
            for edit, numbers in edits]  # fmt: skip
