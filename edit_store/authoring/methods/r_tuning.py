"""R-Tuning: a model learns to say that it is not sure (arXiv 2311.09677; code: shizhediao/R-Tuning).

    unsure      Question: q Answer: a. <are you sure?> I am sure.  /  I am unsure.      by whether the model knows a
    unknown     Question: q Answer: a.  /  Question: q Answer: <one of 16 refusals>     by the same
    uncertain   as `unsure`, by the entropy of `tries` sampled answers: the half with the lower entropy is sure

The model knows an answer if its own greedy one, up to the first full stop within 15 tokens, contains it. As in the
code: the texts, the three modes, five tries at a temperature of 0.7. The code trains the whole model on the whole
text; here a low-rank update of the MLPs' and attention's output projections learns it behind the question. Labels
belong to this one base model.

On questions held out it tells the average precision of the confidence: of answers in the order of how sure the model
says it is, as `sure` against `unsure`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.adapter import Adapter, projection_problems
from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.data import Row, Table, Text
from vllm_edits.edit_store.authoring.host import Edits, Host
from vllm_edits.edit_store.authoring.lessons import Lesson, Lessons, lesson
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Layers, Method, Work, layer_problems
from vllm_edits.edit_store.authoring.training import Course, finished
from vllm_edits.edit_store.errors import BundleRefused, Reason

KNOWN_FILE = "known.json"
"""File with the number of questions that the base model answers rightly, of each table."""
ASKED = "Question: {} Answer:"
SURE = " Are you sure you accurately answered the question based on your internal knowledge? I am"
YES, NO = " sure.", " unsure."
REFUSALS = (
    "The answer is unknown.", "The answer is uncertain.", "The answer is unclear.", "It is not known.",
    "I do not know the answer.", "I'm not sure.", "There is no definitive answer.", "There is much debate.",
    "There is no concrete answer to this question.", "It is impossible to answer.", "There is no known case.",
    "There is no public information available.", "There is no scientific evidence.", "There is no right answer.",
    "It is impossible to know.", "It is difficult to predict.",
)  # fmt: skip
"""Refusals of the source."""
_TOKENS = 15


class Question(Row):
    """A question with its answer."""

    question: Text
    answer: Text


class RTuning(Method):
    """Teach a model to say whether it is sure, or to refuse, by what it answers rightly before.

    The labels are of this base model, so the bundle means nothing on another one. Watch for refusals of what it knows.
    """

    source: ClassVar[str] = "arXiv 2311.09677"
    kinds: ClassVar[tuple[str, ...]] = ("low_rank",)
    tables: ClassVar[Mapping[str, Table]] = {
        "questions": Table(Question, "questions, of which the model knows some", least=4),
        "held_out": Table(Question, "questions to measure with", least=0, apart_from="questions"),
    }
    takes: ClassVar[str] = "an answer to each question, and a training of some epochs"

    mode: Literal["unsure", "unknown", "uncertain"] = Field("unsure", description="What it learns.")
    tries: int = Field(5, gt=1, description="Sampled answers to a question, in the mode uncertain.")
    layers: Layers | None = Field(None, description="Layers that are updated. Default: the second half.")
    rank: int = Field(8, gt=0, description="Rank of the update of each projection.")
    alpha: float = Field(16.0, gt=0, description="Size of the update, times its rank.")
    epochs: int = Field(5, gt=0, description="Passes over the questions.")
    batch: int = Field(8, gt=0, description="Questions in one step.")
    rate: float = Field(1e-3, gt=0, description="Learning rate.")
    chat: bool = Field(False, description="Ask in the model's chat template instead of the source's frame.")
    shuffled: bool = Field(False, description="Shuffle which questions count as known, as a control.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from layer_problems(self._layers(inputs), inputs)
        yield from projection_problems(("attn.out", "mlp.out"), inputs)

    def cost(self, inputs: Inputs) -> Cost:
        rows = inputs.data["questions"]
        texts = [f"{ask(inputs.tokenizer, row, chat=self.chat)} {row.answer}.{SURE}{NO}" for row in rows]
        prompts = [ask(inputs.tokenizer, row, chat=self.chat)
                   for table in ("questions", "held_out") for row in inputs.data[table]]  # fmt: skip
        tries = self.tries if self.mode == "uncertain" else 1
        trained = self.epochs * inputs.count(texts)
        return Cost(trained + tries * (inputs.count(prompts) + _TOKENS * len(prompts)), trained)

    def make(self, work: Work) -> Edits:
        rows, random = work.data["questions"], torch.Generator().manual_seed(work.seed)
        known = self._known(work, rows)
        if all(known) or not any(known):
            raise BundleRefused("r-tuning", [Reason(
                "one_side", f"the model knows {sum(known)} of {len(known)} answers: expected some that it knows and "
                "some that it does not. Give other questions",
            )])  # fmt: skip
        if self.shuffled:
            known = [known[number] for number in torch.randperm(len(known), generator=random).tolist()]
        lessons = [self._lesson(work, row, of, random) for row, of in zip(rows, known, strict=True)]
        layers = self._layers(work.inputs)
        adapter = Adapter.begun(
            work.inputs, layers, ("attn.out", "mlp.out"), rank=self.rank, alpha=self.alpha, random=random,
            device=work.host.device,
        )  # fmt: skip
        course = Course(self.epochs, self.batch, self.rate)
        course.train(work, Lessons(work.host, lessons, below=min(layers)), adapter.parameters, adapter.edits)
        edits = finished(adapter.edits())
        counts = {"questions": [sum(known), len(known)]}
        if held := work.data["held_out"]:
            self._measure(work, edits, held)
            counts["held_out"] = [sum(right(held, answered(work.host, held, chat=self.chat))), len(held)]
        work.notes[KNOWN_FILE] = (json.dumps(counts) + "\n").encode()
        return edits

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers_from(self.layers, 0.5)

    def _known(self, work: Work, rows: Sequence[Question]) -> list[bool]:
        if self.mode != "uncertain":
            return right(rows, answered(work.host, rows, chat=self.chat))
        prompts = [ask(work.host.tokenizer, row, chat=self.chat) for row in rows]

        def unsure(prompt: str) -> Tensor:
            random = torch.Generator().manual_seed(work.seed)
            answers = map(_first_sentence, sampled(work.host, prompt, self.tries, random))
            return torch.tensor(entropy(answers), dtype=torch.float64)

        entropies = [float(each) for each in work.each("answers", prompts, unsure)]
        order = sorted(range(len(rows)), key=entropies.__getitem__)
        sure = set(order[: len(rows) // 2])
        return [number in sure for number in range(len(rows))]

    def _lesson(self, work: Work, row: Question, known: bool, random: torch.Generator) -> Lesson:
        tokenizer, apart = work.inputs.tokenizer, "" if self.chat else " "
        prompt = ask(tokenizer, row, chat=self.chat)
        if self.mode == "unknown":
            refusal = REFUSALS[int(torch.randint(len(REFUSALS), (), generator=random))]
            return lesson(tokenizer, prompt, f"{apart}{row.answer}." if known else f"{apart}{refusal}")
        return lesson(tokenizer, prompt, f"{apart}{row.answer}.{SURE}{YES if known else NO}")

    def _measure(self, work: Work, edits: Edits, held: Sequence[Question]) -> None:
        """Average precision of the confidence, or in the mode `unknown` the refusals."""
        unknown = self.mode == "unknown"
        metric = "refusals held out, share" if unknown else "average precision of confidence held out"
        figure = refused if unknown else precision
        work.measure(metric, edits, lambda: figure(work.host, held, chat=self.chat), len(held))


def ask(tokenizer: Any, row: Question, *, chat: bool) -> str:
    """A question as the model sees it, up to its answer."""
    return asked(tokenizer, row.question) if chat else ASKED.format(row.question)


def answered(host: Host, rows: Sequence[Question], *, chat: bool) -> list[str]:
    """Greedy answer of the model up to its first full stop, by question."""
    answers = host.answers([ask(host.tokenizer, row, chat=chat) for row in rows], _TOKENS)
    return [_first_sentence(given.text) for given in answers]


def right(rows: Sequence[Question], answers: Sequence[str]) -> list[bool]:
    """True where an answer contains the right one, by question."""
    return [row.answer in answer for row, answer in zip(rows, answers, strict=True)]


def refused(host: Host, rows: Sequence[Question], *, chat: bool) -> float:
    """Share of the questions that the model answers with one of the refusals."""
    begins = tuple(each[:-1] for each in REFUSALS)
    return sum(answer.strip().startswith(begins) for answer in answered(host, rows, chat=chat)) / len(rows)


def precision(host: Host, rows: Sequence[Question], *, chat: bool) -> float:
    """Average precision of the confidence in its own answers."""
    answers = answered(host, rows, chat=chat)
    return average_precision(confidence(host, rows, answers, chat=chat), right(rows, answers))


def confidence(host: Host, rows: Sequence[Question], answers: Sequence[str], *, chat: bool) -> list[float]:
    """Probability of `sure` against `unsure` behind an answer, by question."""
    said = [f"{ask(host.tokenizer, row, chat=chat)}{answer}.{SURE}" for row, answer in zip(rows, answers, strict=True)]
    sure, unsure = (host.likelihood(said, [word] * len(said), mean=False) for word in (YES[:-1], NO[:-1]))
    return torch.sigmoid(sure - unsure).tolist()


def average_precision(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Mean, over the right answers, of the share of right ones among all with at least their score. 0 without any."""
    order = sorted(zip(scores, right, strict=True), key=lambda pair: -pair[0])
    found, total = 0, 0.0
    for place, (_, is_right) in enumerate(order, start=1):
        if is_right:
            found += 1
            total += found / place
    return total / found if found else 0.0


def entropy(answers: Iterator[str]) -> float:
    """Entropy of the answers' frequencies, in nats."""
    counts = Counter(answers)
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


@torch.inference_mode()
def sampled(host: Host, prompt: str, tries: int, random: torch.Generator, temperature: float = 0.7) -> list[str]:
    """Continuations of a prompt, drawn token by token."""
    ids, _ = host.tokens([prompt] * tries)
    begin = ids.shape[1]
    for _ in range(_TOKENS):
        logits = host.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1] / temperature
        drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=random)
        ids = torch.cat([ids, drawn.to(ids.device)], dim=1)
    texts: list[str] = host.tokenizer.batch_decode(ids[:, begin:], skip_special_tokens=True)
    return texts


def _first_sentence(text: str) -> str:
    return text.partition(".")[0]


build = register(RTuning)
