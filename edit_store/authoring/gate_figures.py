"""Figures of gates that shall open at their triggers alone: success, false positives, and the bound on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.host import Host, batches
from vllm_edits.edit_store.authoring.method import Work
from vllm_edits.edit_store.authoring.neurons import Right
from vllm_edits.edit_store.authoring.selectivity import (
    Dimension,
    FalsePositives,
    Gates,
    Sphere,
    features_needed,
    intrinsic_dimension,
)
from vllm_edits.edit_store.authoring.statistics import TEXTS_AT_ONCE
from vllm_edits.edit_store.bundle import Measurement

_LIKELIHOOD_BATCH = 4


@dataclass(frozen=True)
class Figures:
    """Everything that a build measures."""

    dimension: Dimension
    held_out: FalsePositives
    others: Tensor
    """highest response of each gate at any token of other prompts, [prompts, edits]"""
    before: Right
    after: Right
    likely: float
    """log-probability of held-out text without the edits, in nats per token"""
    still: float
    """the same with them"""

    def measurements(self) -> Iterator[Measurement]:
        """Those for the manifest."""
        count, held, others = len(self.before.first), self.held_out, len(self.others)
        opened = float((self.others > 0).any(1).sum())
        found = {
            "first token of the answer is right, share of edits": (
                _share(self.before.first),
                _share(self.after.first),
                count,
            ),
            "whole answer is right, share of edits": (_share(self.before.whole), _share(self.after.whole), count),
            "false positives, share of held-out tokens": (0, held.share, held.tokens),
            "log-likelihood of held-out text, nats per token": (self.likely, self.still, held.tokens),
            "false positives, share of other prompts": (0, opened / max(others, 1), others),
            "bound on the false positives of one edit, share of tokens": (
                0,
                self.dimension.bound,
                self.dimension.features,
            ),
        }
        for metric, (base, now, n) in found.items():
            if n:
                yield Measurement(metric=metric, base=base, edited=now, n=n)


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def facts_of(dimension: Dimension) -> dict[str, Any]:
    """The dimension as plain data."""
    return {
        "value": dimension.value, "at_least": dimension.at_least, "features": dimension.features,
        "pairs": dimension.pairs, "close": dimension.close, "features_needed": features_needed(dimension.value),
    }  # fmt: skip


def false_positives(work: Work, gates: Gates, reads: str, texts: Sequence[str]) -> FalsePositives:
    """Tokens of these texts at which a gate opens."""
    found = FalsePositives(gates)
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        work.step("false positives", first, len(texts))
        for x in work.host.activations(texts[first : first + TEXTS_AT_ONCE], [reads])[reads]:
            found.add(x)
    if texts:
        work.step("false positives", len(texts), len(texts))
    return found


def highest_responses(host: Host, gates: Gates, reads: str, prompts: Sequence[str]) -> Tensor:
    """Highest response of each gate at any token of each prompt, [prompts, edits]."""
    found = host.activations(prompts, [reads])[reads]
    return torch.stack([gates.responses(x).amax(0) for x in found]) if found else gates.triggers.new_zeros(0, 1)


@torch.inference_mode()
def likelihood_of(host: Host, texts: Sequence[str]) -> float:
    """Mean log-probability of the tokens behind the first of each text; few texts at once, since logits are wide."""
    ids = [host.tokenizer(text)["input_ids"] for text in texts]
    total, count = 0.0, 0
    for some in batches(ids, _LIKELIHOOD_BATCH):  # the logits of one part are let go before those of the next come
        part = host.said(some, [1] * len(some))
        total, count = total + float(part.sums().sum()), count + int(part.counts.sum())
    return total / max(count, 1)


def dimension_of(work: Work, sphere: Sphere, reads: str, *, theta: float, sample: int) -> Dimension:
    """Intrinsic dimension of the table `text`, by tokens that the seed chooses, but no first ones of texts."""
    texts = work.data.texts("text")
    lengths = torch.tensor([len(ids) - 1 for ids in work.inputs.tokens(texts)])
    random = torch.Generator().manual_seed(work.seed)
    chosen = torch.randperm(int(lengths.sum()), generator=random)[:sample].sort().values
    of = torch.repeat_interleave(torch.arange(len(texts)), lengths)[chosen]
    places = chosen - (lengths.cumsum(0) - lengths)[of] + 1

    def features(numbers: Sequence[int]) -> Tensor:
        rows = work.host.activations([texts[number] for number in numbers], [reads])[reads]
        found = [sphere.features(row[places[of == number]]) for number, row in zip(numbers, rows, strict=True)]
        return torch.cat(found)

    found = list(work.each("intrinsic dimension", list(batches(range(len(texts)), TEXTS_AT_ONCE)), features))
    return intrinsic_dimension(torch.cat(found), theta, of)
