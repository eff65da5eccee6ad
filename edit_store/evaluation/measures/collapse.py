"""Collapse: one edit can break a model (The Butterfly Effect of Model Editing, arXiv 2402.09656).

perplexity   exp(mean loss) over all tokens of ordinary texts
ratio        perplexity of the edited model over that of the base model; 1 is no change
worst        the same for the text where it is largest
repetition   share of the windows of three words in a free continuation that were there before
emptiness    share of free continuations without a word
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field

from vllm_edits.edit_store.authoring.data import Data, PromptRow, Table, TextRow
from vllm_edits.edit_store.evaluation.figure import Figure, Interval, bootstrap
from vllm_edits.edit_store.evaluation.measure import MEASURES, Measure
from vllm_edits.edit_store.evaluation.speaker import Speaker

_WINDOW = 3
"""words that count as repeated together"""


class Collapse(Measure):
    """Perplexity of ordinary text beside the base model's, and repetition and emptiness of free text."""

    tables: ClassVar[Mapping[str, Table]] = {
        "corpus": Table(TextRow, "ordinary texts", least=2),
        "openings": Table(PromptRow, "beginnings of texts", least=0),
    }

    tokens: int = Field(48, gt=_WINDOW, description="Tokens of a free continuation.")

    def figures(self, base: Speaker, edited: Speaker, data: Data) -> Iterator[Figure]:
        texts = data.texts("corpus")
        before, after = ([_of(losses) for losses in speaker.losses(texts)] for speaker in (base, edited))
        weights = np.array([count for count, _ in before], dtype=np.float64)
        means = [np.array([mean for _, mean in side]) for side in (before, after)]
        whole = [float(np.exp(np.average(side, weights=weights))) for side in means]
        yield Figure(name="perplexity", base=whole[0], edited=whole[1], n=len(texts), better="less")
        apart = means[1] - means[0]
        around = bootstrap(apart.tolist())
        yield Figure(
            name="perplexity: ratio", base=1.0, edited=float(np.exp(np.average(apart, weights=weights))), n=len(texts),
            better="less", interval=Interval(low=math.exp(around.low), high=math.exp(around.high)),
        )  # fmt: skip
        yield Figure(name="perplexity: worst ratio", base=1.0, edited=float(np.exp(apart.max())), n=len(texts),
                     better="less")  # fmt: skip
        if openings := [row.prompt for row in data["openings"]]:
            free = [speaker.continuations(openings, self.tokens) for speaker in (base, edited)]
            yield Figure.mean("free text: repetition", (list(map(repetition, side)) for side in free), "less")
            empty = ([not text.strip() for text in side] for side in free)
            yield Figure.share("free text: empty", empty, "less")


def _of(losses: list[float]) -> tuple[int, float]:
    """Tokens of a text, and their mean loss."""
    return len(losses), float(np.mean(losses)) if losses else 0.0


def repetition(text: str) -> float:
    """Share of the windows of three words that were there before; 0 for a text that is shorter."""
    words = text.lower().split()
    windows = [tuple(words[start : start + _WINDOW]) for start in range(len(words) - _WINDOW + 1)]
    return 1 - len(set(windows)) / len(windows) if windows else 0.0


MEASURES.add(Collapse.called(), Collapse)
