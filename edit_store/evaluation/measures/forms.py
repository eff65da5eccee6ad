"""Effect in every form: is the edit there when the question is put otherwise?

An edit can work in the form that it was made for and in no other (ORT, arXiv 2506.07795; AlphaEdit's paraphrases). Each
row is one prompt in a named form (question, fill-in, choice, sub-token, paraphrase, …) with the answer that the edited
model shall give, and the one that it shall not. The answers are compared by their log-likelihood per token, and by what
the model says greedily.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from pydantic import Field

from vllm_edits.edit_store.authoring.data import Data, Row, Table, Text
from vllm_edits.edit_store.evaluation.figure import Figure
from vllm_edits.edit_store.evaluation.measure import MEASURES, Measure
from vllm_edits.edit_store.evaluation.speaker import Speaker


class Form(Row):
    """A prompt in one form; answers bring their space."""

    form: Text
    prompt: Text
    answer: Text
    was: Text


class Forms(Measure):
    """Effect in each form: preference for the new answer over the old one, and the greedy answer."""

    tables: ClassVar[Mapping[str, Table]] = {"forms": Table(Form, "prompts by form, with the new answer and the old")}

    tokens: int = Field(8, gt=0, description="Tokens of a greedy answer.")

    def figures(self, base: Speaker, edited: Speaker, data: Data) -> Iterator[Figure]:
        names = list(dict.fromkeys(row.form for row in data["forms"]))
        for name in names:
            rows = [row for row in data["forms"] if row.form == name]
            margins, said = [], []
            for speaker in (base, edited):
                prompts = [row.prompt for row in rows]
                new, old = (speaker.likelihoods(prompts, [getattr(row, column) for row in rows])
                            for column in ("answer", "was"))  # fmt: skip
                margins.append([a - b for a, b in zip(new, old, strict=True)])
                texts = speaker.continuations(prompts, self.tokens)
                said.append([row.answer.strip() in text for row, text in zip(rows, texts, strict=True)])
            yield Figure.share(f"{name}: preferred", ([each > 0 for each in side] for side in margins), "more")
            yield Figure.mean(f"{name}: margin, nats", margins, "more")
            yield Figure.share(f"{name}: said", said, "more")


MEASURES.add(Forms.called(), Forms)
