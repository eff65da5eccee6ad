"""AlphaEdit: facts written where ordinary text reads next to nothing (arXiv 2410.02355; code: jianghoucheng/AlphaEdit).

As MEMIT (`facts.SpreadEditor`), with another Q. Per edited layer and batch of facts:

    W_down <- W_down + R Q^T        Q = (P (K K^T + K_p K_p^T) + ridge I)^-1 P K

P    [mlp, mlp]      projector onto the directions of the down projection's input in which ordinary text has a second
                     moment below `nullspace`, so that Q reads next to nothing there
K    [mlp, facts]    keys of this batch, with the edits so far
K_p  [mlp, before]   keys of the batches before, in the model that they edited
R    [hidden, facts] share of this layer in what is missing in the stream

Q is computed as P B (ridge I + B^T P B)^-1, the columns of K in B = [K, K_p].

Defaults are those for Llama 3 in the authors' code (hparams/AlphaEdit/Llama3-8B.json, and its README for batches of
100): layers 4 to 8 of 32 (here five layers from the same depth on), 25 steps at 0.1, decay 0.5, clamp 0.75, kl 0.0625,
nullspace 0.02, ridge 10. Unlike the code: the stream is read in the same contexts as the keys. A build --on another one
does not know the keys of that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.facts import InContexts, SpreadEditor
from vllm_edits.edit_store.authoring.method import Inputs, Layers
from vllm_edits.edit_store.authoring.statistics import Moments, unused_directions
from vllm_edits.edit_store.errors import BundleRefused, Reason


class Alphaedit(SpreadEditor):
    """Write many facts into several layers, along directions that ordinary text does not use.

    One rank per fact and layer. Facts are written in batches; the later ones leave the earlier ones alone.
    The build measures the facts, the same in other words, and facts that must stay.
    """

    source: ClassVar[str] = "arXiv 2410.02355"
    takes: ClassVar[str] = "one pass over the text, kept; then gradient steps for each fact, and passes for each layer"

    layers: Layers | None = Field(None, description="Edited layers, in order. Default: five, as 4-8 of 32.")
    nullspace: float = Field(
        0.02, gt=0, description="A direction is unused if ordinary text has a second moment below this in it."
    )
    ridge: float = Field(10.0, gt=0, description="Added to the squares of keys; the source's L2.")
    batch: int = Field(100, gt=0, description="Facts that are written together.")

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return self._five_layers(inputs, self.layers)

    def _batches(self, facts: Sequence[InContexts]) -> Iterator[Sequence[InContexts]]:
        for start in range(0, len(facts), self.batch):
            yield facts[start : start + self.batch]

    def _solver(self, moments: Mapping[str, Moments]) -> Callable[[str, Tensor, Sequence[Tensor]], Tensor]:
        unused = {site: unused_directions(each, self.nullspace) for site, each in moments.items()}
        if full := [site for site, directions in unused.items() if not directions.shape[1]]:
            least = min(float(torch.linalg.eigvalsh(moments[site].second)[0]) for site in full)
            raise BundleRefused(self.called(), [Reason(
                "nothing_unused", f"ordinary text uses every direction at {', '.join(full)}: expected some second "
                f"moment below nullspace = {self.nullspace:g}, found {least:.3g} and more. Raise nullspace",
            )])  # fmt: skip

        def solve(site: str, keys: Tensor, before: Sequence[Tensor]) -> Tensor:
            return read_vectors(keys, unused[site].to(keys), before, self.ridge)

        return solve


def read_vectors(keys: Tensor, unused: Tensor, before: Sequence[Tensor] = (), ridge: float = 10.0) -> Tensor:
    """Q^T [facts, mlp] from keys K^T [facts, mlp], the columns U of P = U U^T, and the keys of earlier batches."""
    projected = torch.cat([keys, *(each[None] for each in before)]) @ unused
    identity = torch.eye(len(projected)).to(projected)
    solved = torch.linalg.solve(ridge * identity + projected @ projected.T, projected)
    read: Tensor = solved[: len(keys)] @ unused.T
    return read


build = register(Alphaedit)
