"""LEACE: linear erasure of a concept (arXiv 2306.03819), fitted by its authors' library, concept-erasure.

    x <- x - A B (x - mean)      A = W^-1 U [hidden, rank], B = U^T W [rank, hidden]

W      [hidden, hidden]  whitening of the vectors at the site
U      [hidden, rank]    orthonormal basis of the whitened covariance with the labels; rank = labels - 1
mean   [hidden]          of all vectors

No linear classifier then does better than one that does not see the vectors, and no other linear erasure moves them
less. Layers are fitted one after the other, each behind the edits of those before it, as the paper scrubs concepts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from concept_erasure import LeaceFitter
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.data import Row, Table, Text
from vllm_edits.edit_store.authoring.host import Edits, Host, edited
from vllm_edits.edit_store.authoring.linear_probe import accuracy
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Layers, Method, Work, layer_problems
from vllm_edits.edit_store.edits import Array
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter


class Labelled(Row):
    """A text, and what the concept is in it."""

    text: Text
    label: Text


class Leace(Method):
    """Erase a concept: no linear classifier can tell its labels from the residual stream any more.

    What a text says about the concept is removed, for every label alike. A model may still work it out again in later
    layers, so erase behind several, or behind all from the first that knows it.
    """

    source: ClassVar[str] = "arXiv 2306.03819"
    kinds: ClassVar[tuple[str, ...]] = ("subspace_filter",)
    tables: ClassVar[Mapping[str, Table]] = {
        "texts": Table(Labelled, "texts with their labels", least=4),
        "held_out": Table(Labelled, "texts to measure with", least=0, apart_from="texts"),
    }
    takes: ClassVar[str] = "one pass over the texts for each layer"

    layers: Layers | None = Field(None, description="Layers behind which it is erased. Default: 0.4 of the depth.")
    tokens: Literal["all", "last"] = Field("all", description="Which tokens of the texts are fitted.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from layer_problems(self._layers(inputs), inputs)
        counts = Counter(row.label for row in inputs.data["texts"])
        if len(counts) < 2:
            yield Reason("labels", f"expected two labels or more, found {', '.join(counts) or 'none'}")
        for label in sorted({row.label for row in inputs.data["held_out"]} - set(counts)):
            yield Reason("labels", f"held_out has the label {label!r}, which texts does not have")
        texts, width = inputs.data.texts("texts"), inputs.base.widths.hidden
        samples = len(texts) if self.tokens == "last" else sum(len(ids) - 1 for ids in inputs.tokens(texts))
        if samples <= width:
            yield Reason(
                "too_few_samples", f"{samples} vectors of {width} numbers: their covariance is singular, and every "
                f"label could be told. Give more than {width} tokens, with tokens = all",
            )  # fmt: skip

    def cost(self, inputs: Inputs) -> Cost:
        layers, width = len(self._layers(inputs)), inputs.base.widths.hidden
        texts, held = (inputs.count(inputs.data.texts(table)) for table in ("texts", "held_out"))
        return Cost(texts * layers + 2 * (texts + held) * bool(held), statistics_bytes=width**2 * 4)

    def make(self, work: Work) -> Edits:
        edits: Edits = []
        rows, layers = work.data["texts"], self._layers(work.inputs)
        for number, layer in enumerate(layers):
            work.step("layers", number, len(layers))
            site = f"layers.{layer}.resid"
            with edited(work.host.model, edits):
                vectors, labels = self._vectors(work.host, rows, site)
            numbers = _fitted(vectors, labels, site)
            edits.append((SubspaceFilter(site=site, rank=len(numbers["basis"]), oblique=True), numbers))
        work.step("layers", len(layers), len(layers))
        if held := work.data["held_out"]:
            self._measure(work, edits, held)
        return edits

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers(self.layers, 0.4, 0.4)

    def _vectors(self, host: Host, rows: Sequence[Labelled], site: str) -> tuple[Tensor, Tensor]:
        """Vectors [samples, hidden], without those of each text's first token; labels but the first [samples, rank]."""
        names = sorted({row.label for row in rows})
        found = host.activations([row.text for row in rows], [site])[site]
        parts = [states[-1:] if self.tokens == "last" else states[1:] for states in found]
        numbers = [names.index(row.label) for row, part in zip(rows, parts, strict=True) for _ in range(len(part))]
        labels = torch.nn.functional.one_hot(torch.tensor(numbers), len(names))[:, 1:]
        return torch.cat(parts), labels.to(parts[0])

    def _measure(self, work: Work, edits: Edits, held: Sequence[Labelled]) -> None:
        """Accuracy of a linear probe behind the last edited layer, on texts that it was not fitted to."""
        site = edits[-1][0].site

        def told() -> float:
            train, test = (self._vectors(work.host, rows, site) for rows in (work.data["texts"], held))
            return accuracy(train, test)

        work.measure("linear probe held out, accuracy", edits, told, len(held))


def _fitted(vectors: Tensor, labels: Tensor, site: str) -> dict[str, Array]:
    eraser = LeaceFitter.fit(vectors.double(), labels.double()).eraser
    told = eraser.proj_right.abs().amax(1) > 0  # the library leaves out what is too weak to be told
    if not told.any() or eraser.bias is None:
        raise BundleRefused("leace", [Reason(
            "nothing_to_erase", f"the labels cannot be told linearly at {site}, so there is nothing to erase there. "
            "Choose later layers, or more texts",
        )])  # fmt: skip
    numbers = {"basis": eraser.proj_right[told], "dual": eraser.proj_left.T[told], "mean": eraser.bias}
    return {name: tensor.float().cpu().numpy() for name, tensor in numbers.items()}


build = register(Leace)
