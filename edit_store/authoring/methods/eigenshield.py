"""EigenShield: a filter for directions that perturbed inputs move most (after arXiv 2502.14976).

    x <- x - P (x - mean)            `off`   P onto the correlational spikes; the default
    x <- mean + P (x - mean)         `onto`  P onto the causal spikes

x, mean   [width]         vectors at one site, and their mean over ordinary text
spikes    [k, width]      eigenvectors of the covariance whose eigenvalue is above the noise (`spiked_covariance.py`)
score     [k]             mean over pairs of |v . (perturbed - text)| / deviation of v . x over ordinary text
          correlational   spikes with a score above the `quantile` of the scores; the others are causal

Confirmed of the source is its abstract: the spiked covariance model, a Robustness-based Nonconformity Score (RbNS), a
quantile that separates causal from correlational eigenvectors, embeddings that are projected onto the causal ones, at
inference time. Notes of others on its later version (AAAI-26) say that it filters the embedding layer, of language
models too. NOT confirmed: the formula of RbNS, the level of the quantile, which tensor, centring, and if the subspace
is found once or for every input. All of these are ours here, and this is no reproduction of the paper's figures.

Why `off` is the default: the hidden states of a language model are no noise with a few signals. Their bulk carries what
the model knows too, and a projection onto a few spikes destroys it. `onto`, as the abstract has it, is for vectors that
are nearly all signal. `off` takes a perturbation only where there is a spike, so perturbed texts are analysed with the
ordinary ones, and may make spikes of their own (`analysed`). The stream is the default site: on SmolLM2-135M the same
filter at the embeddings, where the largest spike was among those taken, cost many times as much on clean text.

The first token of a text is left out, since behind early layers it is an attention sink; the filter sees it all the
same. The analysis takes vectors and not texts, so a form for images changes the site and the scope alone. A quantile
removes its share even if no perturbation is in any spike, so the measurements on `held_out` tell if the filter helps.
A filter that destroys a model makes its answers alike too: read the first of them together with the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.chat import beginning
from vllm_edits.edit_store.authoring.data import Row, Table, Text, TextRow
from vllm_edits.edit_store.authoring.host import Edits, divergence, edited
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Method, Work, layer_problems
from vllm_edits.edit_store.authoring.spiked_covariance import GOOD_FIT, SpikedCovariance, analyse
from vllm_edits.edit_store.authoring.statistics import TEXTS_AT_ONCE, Moments
from vllm_edits.edit_store.bundle import Measurement
from vllm_edits.edit_store.edits import MAX_RANK
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter

SPECTRUM_FILE = "spectrum.json"
"""File with the noise, the edge, how well the bulk fits, and every spike with its score."""
LEAST_PAIRS = 8
"""Pairs below which a mean over them says little."""


class Perturbed(Row):
    """A text, and what a perturbation made of it."""

    text: Text
    perturbed: Text


class Eigenshield(Method):
    """Filter out the directions that perturbed texts move most, of those that stand out of noise.

    The perturbations are yours: typos, distractors, attacks. Whether the filter helps, and what it costs on clean text,
    is measured on held-out pairs.
    """

    source: ClassVar[str] = "after arXiv 2502.14976 (abstract)"
    kinds: ClassVar[tuple[str, ...]] = ("subspace_filter",)
    tables: ClassVar[Mapping[str, Table]] = {
        "texts": Table(TextRow, "ordinary texts, whose vectors are analysed"),
        "pairs": Table(Perturbed, "texts with a perturbed version of each", least=LEAST_PAIRS),
        "held_out": Table(Perturbed, "pairs to measure with", least=0, apart_from="pairs"),
    }
    takes: ClassVar[str] = "one pass over the texts and the pairs"

    at: Literal["stream", "embeddings"] = Field("stream", description="What is filtered.")
    layer: int | None = Field(
        None, ge=0, description="Layer behind which the stream is filtered. Default: 0.4 of the depth."
    )
    form: Literal["off", "onto"] = Field(
        "off", description="Remove the correlational spikes, or keep the causal ones alone."
    )
    quantile: float = Field(0.9, ge=0, lt=1, description="Spikes with a score above this quantile are correlational.")
    spikes: int | None = Field(None, gt=0, description="Only the largest so many spikes are looked at. Default: all.")
    analysed: Literal["texts", "both"] = Field(
        "both", description="What the spikes are found in: ordinary texts, or the perturbed ones too."
    )
    tokens: Literal["all", "last"] = Field(
        "all", description="What of two texts is compared: the mean over their tokens, or the last token."
    )

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        if self.at == "stream":
            yield from layer_problems(inputs.layers(self._layers, 0.4, 0.4), inputs)
        elif self.layer is not None:
            yield Reason(
                "layer", f"the embeddings are before all layers: expected none, found {self.layer}. Leave one out"
            )  # fmt: skip
        yield from self._few(inputs)
        pairs = [(table, row) for table in ("pairs", "held_out") for row in inputs.data[table]]
        clean, perturbed = (
            inputs.tokens([getattr(row, column) for _, row in pairs]) for column in ("text", "perturbed")
        )
        alike = [row.text for one, other, (_, row) in zip(clean, perturbed, pairs, strict=True) if one == other]
        if alike:
            yield Reason(
                "alike", f"{len(alike)} pairs have the same tokens twice, for example {alike[0][:60]!r}: nothing is "
                "perturbed there. Remove them",
            )  # fmt: skip
        short = [row.text for one, other, (_, row) in zip(clean, perturbed, pairs, strict=True)
                 if min(len(one), len(other)) < 2]  # fmt: skip
        if short:
            yield Reason(
                "short", f"{len(short)} pairs have a text of one token, for example {short[0]!r}: the first token is "
                "left out. Give longer ones",
            )  # fmt: skip
        if self.at == "embeddings" and self.tokens == "last" and all(
            one[-1:] == other[-1:] for one, other in zip(clean, perturbed, strict=True)
        ):  # fmt: skip
            yield Reason(
                "last_alike", "the two texts of every pair end in the same token, so their last embeddings are alike. "
                "Compare all tokens, or choose a layer",
            )  # fmt: skip

    def _few(self, inputs: Inputs) -> Iterator[Reason]:
        """Too few vectors, or at the embeddings too few different ones."""
        width = inputs.base.widths.hidden
        tokens = [token for ids in inputs.tokens(inputs.data.texts("texts")) for token in ids[1:]]
        weak = "with fewer a direction needs more than twice the variance of noise to stand out of it"
        counted = [(len(tokens), "tokens behind the first of each text", weak)]
        if self.at == "embeddings":
            counted.append(
                (len(set(tokens)), "different tokens", "fewer embeddings leave directions without any noise")
            )
        for found, of, why in counted:
            if found <= width:
                yield Reason(
                    "too_few_samples", f"expected more than {width} {of}, as a vector has {width} numbers, found "
                    f"{found}: {why}. Give more texts",
                )  # fmt: skip

    def cost(self, inputs: Inputs) -> Cost:
        texts = inputs.count(inputs.data.texts("texts"))
        clean, perturbed, held_clean, held_perturbed = (
            inputs.count([getattr(row, column) for row in inputs.data[table]])
            for table in ("pairs", "held_out") for column in ("text", "perturbed")
        )  # fmt: skip
        pairs = clean + perturbed * (1 + (self.analysed == "both"))
        held = 4 * held_clean + 2 * held_perturbed
        return Cost(texts + pairs + held, statistics_bytes=8 * inputs.base.widths.hidden**2)

    def make(self, work: Work) -> Edits:
        site, pairs = self._site(work.inputs), work.data["pairs"]
        clean, perturbed = ([getattr(row, column) for row in pairs] for column in ("text", "perturbed"))
        ordinary = _moments(work, site, work.data.texts("texts"), "texts")
        analysed = (
            _together(ordinary, _moments(work, site, perturbed, "perturbed")) if self.analysed == "both" else ordinary
        )
        spectrum = spectrum_of(analysed, site)
        directions = torch.stack([spike.direction for spike in spectrum.spikes[: self.spikes]])
        states = [self._states(work, site, texts) for texts in (clean, perturbed)]
        split = separate(nonconformity(directions, states[0], states[1], ordinary.covariance), self.quantile)
        basis = directions[split.chosen(self.form)]
        work.notes[SPECTRUM_FILE] = self._told(work, site, spectrum, split)
        edit = SubspaceFilter(site=site, rank=len(basis), onto=self.form == "onto")
        numbers = {"basis": basis, "mean": ordinary.mean}
        edits: Edits = [(edit, {name: tensor.float().cpu().numpy() for name, tensor in numbers.items()})]
        if held := work.data["held_out"]:
            work.measurements += _measured(work, edits, held)
        return edits

    def _site(self, inputs: Inputs) -> str:
        """The filtered site."""
        if self.at == "embeddings":
            return "embed.out"
        (layer,) = inputs.layers(self._layers, 0.4, 0.4)
        return f"layers.{layer}.resid"

    @property
    def _layers(self) -> tuple[int] | None:
        return None if self.layer is None else (self.layer,)

    def _states(self, work: Work, site: str, texts: Sequence[str]) -> Tensor:
        """A vector for each text [texts, width]: that of its last token, or the mean over all but the first."""
        rows = [row for some in _streamed(work, site, texts, "pairs") for row in some]
        return torch.stack([row[-1] if self.tokens == "last" else row[1:].mean(0) for row in rows]).double()

    def _told(self, work: Work, site: str, spectrum: SpikedCovariance, split: Separated) -> bytes:
        """The note on the spectrum."""
        scores, correlational = split.scores.tolist(), split.correlational.tolist()
        rows = [
            {"eigenvalue": spike.value, "population": spike.population, "squared_cosine": spike.squared_cosine,
             "score": score, "correlational": is_correlational}
            for spike, score, is_correlational in zip(spectrum.spikes, scores, correlational, strict=False)
        ]  # fmt: skip
        bulk = {"eigenvalues": spectrum.bulk, "distance": spectrum.fit, "follows_law": spectrum.follows_law}
        content: dict[str, Any] = {
            "schema_version": 1, "base": dict(work.inputs.base.files), "site": site, "width": spectrum.width,
            "samples": spectrum.samples, "gamma": spectrum.gamma, "noise": spectrum.noise, "edge": spectrum.edge,
            "cut": spectrum.cut, "detectable": spectrum.detectable, "bulk": bulk, "note": _note(spectrum),
            "spikes_found": len(spectrum.spikes), "form": self.form, "score_threshold": split.threshold, "spikes": rows,
        }  # fmt: skip
        return (json.dumps(content, indent=1) + "\n").encode()


def _streamed(work: Work, site: str, texts: Sequence[str], step: str) -> Iterator[list[Tensor]]:
    """Vectors [tokens, width] of each text, some texts at a time."""
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        work.step(step, start, len(texts))
        yield work.host.activations(texts[start : start + TEXTS_AT_ONCE], [site])[site]
    work.step(step, len(texts), len(texts))


def _moments(work: Work, site: str, texts: Sequence[str], step: str) -> Moments:
    """Moments in float64 over every token but the first of each text."""
    found: list[Moments] = []
    for some in _streamed(work, site, texts, step):
        x = torch.cat([rows[1:] for rows in some]).double()
        now = Moments(len(x), x.sum(0), x.T @ x)
        found = [_together(found[0], now) if found else now]
    return found[0]


def _together(one: Moments, other: Moments) -> Moments:
    return Moments(one.count + other.count, one.total + other.total, one.products + other.products)


def _note(spectrum: SpikedCovariance) -> str:
    """A sentence about the fit of the bulk."""
    if spectrum.follows_law:
        return f"The bulk follows the Marchenko-Pastur law (distance {spectrum.fit:.2f}, at most {GOOD_FIT:g})."
    return (
        f"The bulk does not follow the Marchenko-Pastur law (distance {spectrum.fit:.2f}, more than {GOOD_FIT:g}): its "
        "edge is a convention here, and the corrected eigenvalues and cosines mean little."
    )


def spectrum_of(moments: Moments, site: str) -> SpikedCovariance:
    """The spectrum at a site. BundleRefused without noise, or without spikes."""
    try:
        spectrum = analyse(moments.covariance, moments.count - 1)
    except ValueError as error:
        raise BundleRefused("eigenshield", [Reason(
            "no_noise", f"at {site}: {error}. The texts are too much alike: give more, and more various ones"
        )]) from None  # fmt: skip
    if not spectrum.spikes:
        raise BundleRefused("eigenshield", [Reason(
            "no_spike", f"no direction at {site} stands out of noise: expected an eigenvalue above {spectrum.cut:.3g} "
            f"in {spectrum.samples} vectors of {spectrum.width} numbers, found none. More texts show weaker directions",
        )])  # fmt: skip
    return spectrum


def nonconformity(directions: Tensor, clean: Tensor, perturbed: Tensor, covariance: Tensor) -> Tensor:
    """Scores [k]: mean |v . (perturbed - clean)| over pairs, in standard deviations of v . x.

    directions [k, width], clean and perturbed [pairs, width], covariance of x [width, width]
    """
    deviations = ((directions @ covariance) * directions).sum(1).clamp_min(0).sqrt()
    moved: Tensor = ((perturbed - clean) @ directions.T).abs().mean(0)
    return moved / deviations.clamp_min(float(deviations.max()) * 1e-6)


@dataclass(frozen=True)
class Separated:
    """Spikes as correlational and causal ones."""

    scores: Tensor
    """[k]"""
    threshold: float

    @property
    def correlational(self) -> Tensor:
        """True for the spikes with a score above the threshold, [k]."""
        return self.scores > self.threshold

    def chosen(self, form: Literal["off", "onto"]) -> Tensor:
        """True for the spikes in the filter's basis, [k]. BundleRefused if they are too many for a filter."""
        chosen = self.correlational if form == "off" else ~self.correlational
        if (rank := int(chosen.sum())) > MAX_RANK:
            raise BundleRefused("eigenshield", [Reason(
                "rank", f"expected at most {MAX_RANK} directions in a filter, found {rank} of {len(chosen)} spikes. "
                "Look at fewer spikes, or choose another quantile",
            )])  # fmt: skip
        return chosen


def separate(scores: Tensor, quantile: float) -> Separated:
    """The spikes with a score above the quantile. BundleRefused if there are none."""
    split = Separated(scores, float(scores.quantile(quantile)))
    if not split.correlational.any():
        raise BundleRefused("eigenshield", [Reason(
            "nothing_removed", f"none of {len(scores)} spikes has a score above the quantile {quantile:g} of the "
            f"scores, which is {split.threshold:.3g}: expected one that the pairs move more than others. Lower the "
            "quantile, or give pairs that differ more",
        )])  # fmt: skip
    return split


def _measured(work: Work, edits: Edits, held: Sequence[Perturbed]) -> Iterator[Measurement]:
    """Reach of the perturbation without the filter and with it, and the filter's cost on clean text."""
    clean, perturbed = [row.text for row in held], [row.perturbed for row in held]
    begins = [beginning(work.inputs.tokenizer)] * len(held)

    def seen() -> tuple[Tensor, Tensor, float]:
        likely = float(work.host.likelihood(begins, clean).mean())
        return work.host.next_token(clean), work.host.next_token(perturbed), likely

    base, moved, likely = seen()
    with edited(work.host.model, edits):
        filtered, filtered_moved, filtered_likely = seen()
    reach = divergence(base, moved)
    for metric, before, after in (
        ("perturbed from clean", reach, divergence(filtered, filtered_moved)),
        ("perturbed from the base's clean", reach, divergence(base, filtered_moved)),
        ("clean from the base's clean", torch.zeros(1), divergence(base, filtered)),
    ):
        name = f"next token held out, {metric}, nats"
        yield Measurement(metric=name, base=float(before.mean()), edited=float(after.mean()), n=len(held))
    name = "clean text held out, log-likelihood per token in nats"
    yield Measurement(metric=name, base=likely, edited=filtered_likely, n=len(held))


build = register(Eigenshield)
