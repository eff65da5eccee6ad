"""Forgetting by random labels: training on a task's questions with answers drawn at random (arXiv 2409.02228).

    loss = mean of  -log p(answer | prompt) / tokens       answer: of each question the right one or the wrong one, by a
                                                           coin that is thrown once

The paper finds that such a model may forget the task, partly or not at all, that other tasks may suffer, and that
linear probes still find the answers. So the build writes a report on all tasks with held-out questions: accuracy
before and after, and that of a linear probe on the states. The paper's training parameters are not confirmed; here a
low-rank update of the output projections is trained. With `learn_first` the task is first learned with its right
labels, as in the paper.

A bundle that is made like this hides knowledge, and deletes none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.adapter import Adapter, projection_problems
from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.data import Row, Table, Text
from vllm_edits.edit_store.authoring.host import Edits, edited
from vllm_edits.edit_store.authoring.lessons import Lessons, lesson
from vllm_edits.edit_store.authoring.linear_probe import accuracy
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Layers, Method, Work, layer_problems
from vllm_edits.edit_store.authoring.training import Course, finished
from vllm_edits.edit_store.bundle import Measurement
from vllm_edits.edit_store.errors import Reason

REPORT_FILE = "forgetting.json"
"""File with the accuracy on each task before and after, and that of a linear probe."""
_POINTS = ("attn.out", "mlp.out")


class Choice(Row):
    """A question with two answers, and the task that it belongs to."""

    task: Text
    prompt: Text
    right: Text
    wrong: Text


class RandomLabels(Method):
    """Make a model forget a task by training it on the task's questions with random answers.

    Writes a report on what it does to other tasks. The knowledge may still be there: the report has a linear probe.
    """

    source: ClassVar[str] = "arXiv 2409.02228"
    kinds: ClassVar[tuple[str, ...]] = ("low_rank",)
    tables: ClassVar[Mapping[str, Table]] = {
        "questions": Table(Choice, "questions of the task to forget, and of others for the probe", least=8),
        "held_out": Table(
            Choice, "questions of that task and of others to measure with", least=2, apart_from="questions"
        ),
    }
    takes: ClassVar[str] = "a training of some epochs, and passes over the questions"

    forget: str = Field("", description="Task to forget. Default: the one of the first question.")
    learn_first: bool = Field(False, description="First learn the task with its right answers.")
    true_labels: bool = Field(False, description="Train on the right answers instead, as a control.")
    layers: Layers | None = Field(None, description="Layers that are updated. Default: the second half.")
    rank: int = Field(8, gt=0, description="Rank of the update of each projection.")
    alpha: float = Field(16.0, gt=0, description="Size of the update, times its rank.")
    epochs: int = Field(5, gt=0, description="Passes over the questions.")
    batch: int = Field(8, gt=0, description="Questions in one step.")
    rate: float = Field(1e-3, gt=0, description="Learning rate.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from layer_problems(self._layers(inputs), inputs)
        yield from projection_problems(_POINTS, inputs)
        task = self._task(inputs)
        for table in ("questions", "held_out"):
            tasks = sorted({row.task for row in inputs.data[table]})
            if tasks and task not in tasks:
                yield Reason("task", f"{table} has no question of the task {task!r}: it has {', '.join(tasks)}")
        alike = [row for table in ("questions", "held_out") for row in inputs.data[table] if row.right == row.wrong]
        if alike:
            yield Reason("alike", f"{len(alike)} questions have the same answer twice, for example {alike[0].prompt!r}")

    def cost(self, inputs: Inputs) -> Cost:
        trained = [row.prompt + row.right for row in self._own(inputs, inputs.data["questions"])]
        every = [row.prompt + row.right for table in ("questions", "held_out") for row in inputs.data[table]]
        backward = (1 + self.learn_first) * self.epochs * inputs.count(trained)
        return Cost(backward + 4 * inputs.count(every), backward)

    def make(self, work: Work) -> Edits:
        rows, random = self._own(work.inputs, work.data["questions"]), torch.Generator().manual_seed(work.seed)
        coins = torch.rand(len(rows), generator=random) < 0.5
        adapter = Adapter.begun(
            work.inputs, self._layers(work.inputs), _POINTS, rank=self.rank, alpha=self.alpha, random=random,
            device=work.host.device,
        )  # fmt: skip
        right = [row.right for row in rows]
        drawn = [row.wrong if coin else row.right for row, coin in zip(rows, coins.tolist(), strict=True)]
        if self.learn_first:
            self._train(work, adapter, rows, right, "learning")
        self._train(work, adapter, rows, right if self.true_labels else drawn, "forgetting")
        edits = finished(adapter.edits())
        report = self._report(work, edits)
        work.notes[REPORT_FILE] = (json.dumps(report, indent=1) + "\n").encode()
        task = self._task(work.inputs)
        for name, of in report.items():
            own = "forgotten" if name == task else "other"
            metric = f"{own} task {name}, accuracy held out"
            work.measurements.append(
                Measurement(metric=metric, base=of["base"], edited=of["edited"], n=of["questions"])
            )
        return edits

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers_from(self.layers, 0.5)

    def _task(self, inputs: Inputs) -> str:
        return self.forget or str(inputs.data["questions"][0].task)

    def _own(self, inputs: Inputs, rows: Sequence[Choice]) -> list[Choice]:
        return [row for row in rows if row.task == self._task(inputs)]

    def _train(self, work: Work, adapter: Adapter, rows: Sequence[Choice], answers: Sequence[str], name: str) -> None:
        lessons = [lesson(work.inputs.tokenizer, row.prompt, f" {answer}")
                   for row, answer in zip(rows, answers, strict=True)]  # fmt: skip
        material = Lessons(work.host, lessons, below=min(self._layers(work.inputs)))
        Course(self.epochs, self.batch, self.rate).train(work, material, adapter.parameters, adapter.edits, name=name)

    def _report(self, work: Work, edits: Edits) -> dict[str, Any]:
        """For each task with held-out questions: accuracy and linear probe, without the edits and with them."""
        report: dict[str, Any] = {}
        for task in sorted({row.task for row in work.data["held_out"]}):
            train, held = ([row for row in work.data[table] if row.task == task] for table in ("questions", "held_out"))
            found: dict[str, Any] = {"questions": len(held)}
            for name, now in (("base", []), ("edited", edits)):
                with edited(work.host.model, now):
                    found[name] = float(told_right(work, held).float().mean())
                    if train:
                        found[f"probe_{name}"] = accuracy(_judged(work, train), _judged(work, held))
            report[task] = found
        return report


def told_right(work: Work, rows: Sequence[Choice]) -> Tensor:
    """True where the right answer is likelier per token than the wrong one, [questions]."""
    prompts = [row.prompt for row in rows]
    right, wrong = (work.host.likelihood(prompts, [f" {getattr(row, column)}" for row in rows])
                    for column in ("right", "wrong"))  # fmt: skip
    return right > wrong


def _judged(work: Work, rows: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    """States [2 questions, hidden] behind the right and the wrong answers, and whether each is right."""
    states = [work.host.last_states([f"{row.prompt} {getattr(row, column)}" for row in rows])
              for column in ("right", "wrong")]  # fmt: skip
    labels = torch.cat([torch.ones(len(rows), 1), torch.zeros(len(rows), 1)])
    return torch.cat(states).clone(), labels.to(states[0].device)


build = register(RandomLabels)
