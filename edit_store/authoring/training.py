"""Training of the numbers of edits by gradient steps, with the model itself frozen.

    loss = mean over lessons of  -log p(answer | prompt) / tokens     + penalty
    loss = mean over pairs of    -log sigmoid(beta (gain(answer) - gain(rejected)))     for preferences (DPO)

gain(text) = log p(text | prompt) of the edited model less that of the base model, summed over the tokens

The edits are in the model by their own formulas, which the served engine is compared with: the numbers that are trained
are those that a bundle has, and nothing is converted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
        after_step: Callable[[int], None] | None = None, changing: Sequence[Tensor] = (),
        random: torch.Generator | None = None,
    ) -> list[float]:  # fmt: skip
        """Train parameters, which `edits` makes into edits at every step. Returns the mean loss of each epoch.

        An interrupted build goes on behind the last step that was written down.

        name: of this training; no other step of the build has it
        penalty: added to the loss
        after_step: called with the number of steps that were taken
        changing: more tensors that after_step changes, in place
        random: the generator that shuffles, and that `penalty` draws from
        """
        optimizer = torch.optim.AdamW(parameters, lr=self.rate, weight_decay=self.decay)
        place = _Place(optimizer, (*parameters, *changing), random or torch.Generator().manual_seed(work.seed))
        place.load(work.kept.begin(name))
        count, steps = len(material), self.steps(len(material))
        in_epoch = steps // self.epochs
        while place.step < steps:
            if not (number := place.step % in_epoch):
                place.order, place.total = torch.randperm(count, generator=place.random), 0.0
            some = place.order[number * self.batch : (number + 1) * self.batch].tolist()
            work.step(name, place.step, steps)
            optimizer.zero_grad()
            with edited(work.host.model, edits()):
                loss = material.loss(some)
            place.total += float(loss.detach()) * len(some)
            if float(loss.detach()) >= self.enough:
                whole: Any = loss if penalty is None else loss + penalty()
                whole.backward()
                optimizer.step()
            place.step += 1
            if after_step is not None:
                after_step(place.step)
            if number == in_epoch - 1:
                place.losses.append(place.total / count)
                if place.losses[-1] < self.enough:
                    place.step = steps
            work.kept.save(name, place.tensors, ended=place.step == steps)
        work.step(name, steps, steps)
        return place.losses


@dataclass
class _Place:
    """Everything that a training goes on with."""

    optimizer: torch.optim.Optimizer
    changing: Sequence[Tensor]
    random: torch.Generator
    step: int = 0
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """lessons of this epoch, in the order of their steps"""
    total: float = 0.0
    """sum of the losses of this epoch's lessons so far"""
    losses: list[float] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        moments = {f"optimizer.{number}.{name}": tensor for number, of in self.optimizer.state_dict()["state"].items()
                   for name, tensor in of.items()}  # fmt: skip
        return {
            **moments, **{f"changing.{number}": tensor for number, tensor in enumerate(self.changing)},
            "random": self.random.get_state(), "order": self.order,
            "figures": torch.tensor([self.step, self.total, *self.losses], dtype=torch.float64),
        }  # fmt: skip

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with these; from the start if there are none."""
        if not tensors:
            return
        step, self.total, *self.losses = tensors["figures"].tolist()
        self.step, self.order = int(step), tensors["order"]
        self.random.set_state(tensors["random"])
        for number, tensor in enumerate(self.changing):
            tensor.copy_(tensors[f"changing.{number}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, parameter, moment = name.split(".", 2)
                moments.setdefault(int(parameter), {})[moment] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def finished(edits: Trained) -> Edits:
    """Trained edits as those of a bundle."""
    return [(edit, {name: tensor.detach().cpu().numpy().copy() for name, tensor in numbers.items()})
            for edit, numbers in edits]  # fmt: skip
