"""MEMIT: many facts at once, spread over several layers (arXiv 2210.07229; code: kmeng01/memit).

Per edited layer, all facts together (`facts.SpreadEditor`):

    W_down <- W_down + R Q^T        Q = (weight C + K K^T)^-1 K

C   [mlp, mlp]       second moment of the down projection's input over ordinary text, E[x x^T]
K   [mlp, facts]     keys of the subjects (`facts.py`), with the edits of earlier layers
R   [hidden, facts]  share of this layer in what is missing in the stream behind the last edited layer

R Q^T is the least-squares update: it makes |U K - R|^2 + weight E|U x|^2 least. Q is computed as
A (I + K^T A)^-1 with A = (weight C)^-1 K.

A fact by itself gets a / (1 + a) of its change, with a = k^T A. For k from ordinary text k^T C^-1 k is the width `mlp`
on average, whatever the model; so a weight has the same effect where weight / mlp is the same. The default is the
source's 15000 for a width of 14336, in proportion.

The other defaults are those for Llama 3 in AlphaEdit's code (hparams/MEMIT/Llama3-8B.json): layers 4 to 8 of 32 (here
five layers from the same depth on), 25 steps at 0.1, decay 0.5, clamp 0.75, kl 0.0625; five prefixes of 10 tokens, half
of the weight on the prompt alone. EasyEdit's for Llama (hparams/MEMIT/llama-7b.yaml) have rate 0.5, decay 1e-3 and
clamp 4. Unlike the code: the weight on other widths, and the stream is read in the same contexts as the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.facts import SpreadEditor, whitening
from vllm_edits.edit_store.authoring.method import Inputs, Layers
from vllm_edits.edit_store.authoring.statistics import Moments

PER_WIDTH = 15000 / 14336
"""Weight of ordinary text per number that the down projection reads, as for Llama 3 8B."""


class Memit(SpreadEditor):
    """Write many facts at once into several layers: at a subject, the model answers with something else.

    One rank per fact and layer, all facts together.
    The build measures the facts, the same in other words, and facts that must stay.
    """

    source: ClassVar[str] = "arXiv 2210.07229"
    takes: ClassVar[str] = "one pass over the text, kept; then gradient steps for each fact, and passes for each layer"

    layers: Layers | None = Field(None, description="Edited layers, in order. Default: five, as 4-8 of 32.")
    weight: float | None = Field(
        None, gt=0, description="Weight of ordinary text against the facts. Default: 15000 for a width of 14336."
    )

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return self._five_layers(inputs, self.layers)

    def _solver(self, moments: Mapping[str, Moments]) -> Callable[[str, Tensor, Sequence[Tensor]], Tensor]:
        """With the weight for the width of the second moments."""
        whiten = {site: whitening(each, site, self.called()) for site, each in moments.items()}

        def solve(site: str, keys: Tensor, _: Sequence[Tensor]) -> Tensor:
            weight = self.weight or PER_WIDTH * keys.shape[1]
            return read_vectors(keys, whiten[site](keys) / weight)

        return solve


def read_vectors(keys: Tensor, whitened: Tensor) -> Tensor:
    """Q^T [facts, mlp] from the rows of keys K^T and of A^T = K^T (weight C)^-1."""
    identity = torch.eye(len(keys)).to(keys)
    read: Tensor = torch.linalg.solve(identity + keys @ whitened.T, whitened)
    return read


build = register(Memit)
