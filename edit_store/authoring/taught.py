"""Common parts of the methods that learn answers to prompts: data, lessons, measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from pydantic import Field

from vllm_edits.edit_store.authoring.chat import said
from vllm_edits.edit_store.authoring.data import Row, Table, Text
from vllm_edits.edit_store.authoring.host import Edits
from vllm_edits.edit_store.authoring.lessons import Lesson, Lessons, lesson
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Method, Work
from vllm_edits.edit_store.authoring.training import Course
from vllm_edits.edit_store.errors import Reason


class Example(Row):
    """A prompt, and how the model shall answer it."""

    prompt: Text
    answer: Text


class Taught(Method):
    """Base of the methods that learn answers to prompts."""

    tables: ClassVar[Mapping[str, Table]] = {
        "examples": Table(Example, "prompts with the answers to learn"),
        "held_out": Table(Example, "prompts with answers to measure with", least=0, apart_from="examples"),
    }
    takes: ClassVar[str] = "a training of some epochs"

    epochs: int = Field(5, gt=0, description="Passes over the examples.")
    batch: int = Field(8, gt=0, description="Examples in one step.")
    rate: float = Field(1e-3, gt=0, description="Learning rate.")
    chat: bool = Field(False, description="Put prompts into the model's chat template.")
    end: bool = Field(False, description="Teach too that the text ends behind the answer.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        for table in ("examples", "held_out"):
            yield from self._merged(inputs, inputs.data[table])
        answers: dict[str, set[str]] = {}
        for row in inputs.data["examples"]:
            answers.setdefault(row.prompt, set()).add(row.answer)
        if several := [prompt for prompt, found in answers.items() if len(found) > 1]:
            yield Reason(
                "several_answers", f"{len(several)} prompts have more than one answer, for example {several[0]!r}. "
                "Only one of them can be learned",
            )  # fmt: skip

    def _merged(self, inputs: Inputs, rows: Sequence[Example]) -> Iterator[Reason]:
        """Rows whose answer has no tokens of its own, since the first ones begin in the prompt."""
        for row in rows:
            prompt, answer = self.said(inputs.tokenizer, row.prompt, row.answer)
            found = lesson(inputs.tokenizer, prompt, answer)
            begins = tuple(inputs.tokens([prompt])[0])
            if found.ids[: found.prompt] != begins or len(found.ids) == found.prompt or not begins:
                yield Reason(
                    "merged", f"the tokens of the answer {answer!r} cannot be told from those of its prompt "
                    f"{prompt[-40:]!r}. End the prompt with a whole word",
                )  # fmt: skip

    def cost(self, inputs: Inputs) -> Cost:
        rows, held = ([*self.said_text(inputs, inputs.data[table])] for table in ("examples", "held_out"))
        tokens = self._passes(inputs) * inputs.count(rows)
        return Cost(tokens + 2 * inputs.count(held), tokens)

    def _passes(self, inputs: Inputs) -> int:
        """Passes over the examples with gradients."""
        return self.epochs

    def said_text(self, inputs: Inputs, rows: Sequence[Example]) -> Iterator[str]:
        """Each row as one text."""
        for row in rows:
            yield "".join(self.said(inputs.tokenizer, row.prompt, row.answer))

    def said(self, tokenizer: Any, prompt: str, answer: str) -> tuple[str, str]:
        """A prompt and its answer as the model sees them."""
        return said(tokenizer, prompt, answer, chat=self.chat)

    @property
    def course(self) -> Course:
        """Length and pace of the training."""
        return Course(self.epochs, self.batch, self.rate)

    def lessons(self, work: Work, rows: Sequence[Example], *, below: int) -> Lessons:
        """The rows to train with. below: the first layer that is edited."""
        tokenizer = work.inputs.tokenizer
        found: list[Lesson] = [
            lesson(tokenizer, *self.said(tokenizer, row.prompt, row.answer), end=self.end) for row in rows
        ]
        return Lessons(work.host, found, below=below)

    def measure(self, work: Work, edits: Edits) -> None:
        """Log-likelihood of the answers without the edits and with them, for the manifest."""
        for table, name in (("examples", "learned answers"), ("held_out", "answers held out")):
            if rows := work.data[table]:
                metric = f"{name}, log-likelihood per token in nats"
                work.measure(metric, edits, partial(self.likely, work, rows), len(rows))

    def likely(self, work: Work, rows: Sequence[Example]) -> float:
        """Mean log-likelihood per token of the answers."""
        texts = [self.said(work.inputs.tokenizer, row.prompt, row.answer) for row in rows]
        return float(work.host.likelihood(*map(list, zip(*texts, strict=True))).mean())
