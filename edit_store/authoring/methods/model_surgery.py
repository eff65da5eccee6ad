"""Model Surgery: a behaviour shifted through rows of the gate projection (arXiv 2407.08770, and its code).

    W_gate[rows] <- W_gate[rows] + alpha v

v      [hidden]  the row of a linear probe for the undesired class, not normalised; the probe reads the mean over a
                 text's tokens of the vectors behind the last norm, and is trained with Adam on cross-entropy
rows             of all layers together, the `share` whose cosine with v is most negative

The gate projection reads its layer's normed stream, and v is a direction behind the last norm: a heuristic of the
source. As there: share 4.65 %, alpha 1.08, rate 1e-4. The source trains 20 epochs on a large set; a small one needs
more, so the steps are counted here, and the probe's accuracy on held-out texts is told. Alpha goes with the length of
v. Whether the sign is right shows in the measurement: on held-out texts, the preference for the desired ones must grow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.chat import beginning
from vllm_edits.edit_store.authoring.data import Row, Table, Text
from vllm_edits.edit_store.authoring.formula import own_layers, weight_of
from vllm_edits.edit_store.authoring.host import Edits, Host
from vllm_edits.edit_store.authoring.method import Cost, Inputs, Method, Work
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.edit_store.sites import Site

PROBE_FILE = "probe.json"
"""File with the accuracy of the probe on held-out texts, and the length of its vector."""
_BATCH = 32


class Judged(Row):
    """A text, and whether it shows what is not wanted."""

    text: Text
    undesired: bool


class ModelSurgery(Method):
    """Shift a behaviour through a few rows of the gate projections, along the direction of a linear probe.

    Meant to make the undesired behaviour rarer, and with a negative alpha more frequent. The build measures on held-out
    texts what it does to this model.
    """

    source: ClassVar[str] = "arXiv 2407.08770"
    kinds: ClassVar[tuple[str, ...]] = ("low_rank",)
    tables: ClassVar[Mapping[str, Table]] = {
        "texts": Table(Judged, "texts with the behaviour and without", least=8),
        "held_out": Table(Judged, "texts to test with", least=4, apart_from="texts"),
    }
    takes: ClassVar[str] = "one pass over the texts, and the training of a probe"

    alpha: float = Field(1.08, description="Factor on the probe's vector.")
    share: float = Field(0.0465, gt=0, le=1, description="Share of all rows of the gate projections that are shifted.")
    rate: float = Field(1e-4, gt=0, description="Learning rate of the probe.")
    steps: int = Field(2000, gt=0, description="Training steps of the probe, with 32 texts each.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        if hidden := supported(inputs.base.architecture).hidden("gate.out"):
            yield Reason("site", f"model surgery needs gate projections: {hidden}")
        for table in ("texts", "held_out"):
            if len({row.undesired for row in inputs.data[table]}) < 2:
                yield Reason("labels", f"{table}: expected texts with undesired true and false, found one of both")

    def cost(self, inputs: Inputs) -> Cost:
        texts, held = (inputs.count(inputs.data.texts(table)) for table in ("texts", "held_out"))
        return Cost(texts + 3 * held)

    def make(self, work: Work) -> Edits:
        rows, held = work.data["texts"], work.data["held_out"]
        work.step("probe", 0, self.steps)
        vectors = {name: _pooled(work.host, of) for name, of in (("texts", rows), ("held", held))}
        probe = self._trained(work, vectors["texts"], torch.tensor([row.undesired for row in rows]).long())
        told = probe(vectors["held"]).argmax(1) == torch.tensor([row.undesired for row in held])
        v = probe.weight[1].detach()
        edits = self._edits(work.host, v)
        metric = "preference for desired texts held out, nats per token"
        work.measure(metric, edits, lambda: preference(work, held), len(held))
        facts = {"accuracy": float(told.float().mean()), "length": float(v.norm()), "texts": len(held)}
        work.notes[PROBE_FILE] = (json.dumps(facts, indent=1) + "\n").encode()
        return edits

    def _trained(self, work: Work, vectors: Tensor, labels: Tensor) -> nn.Linear:
        probe = nn.Linear(vectors.shape[1], 2)
        optimizer = torch.optim.Adam(probe.parameters(), lr=self.rate)
        random = torch.Generator().manual_seed(work.seed)
        for number in range(self.steps):
            if number % 100 == 0:
                work.step("probe", number, self.steps)
            chosen = torch.randint(len(vectors), (_BATCH,), generator=random)
            optimizer.zero_grad()
            loss: Any = nn.functional.cross_entropy(probe(vectors[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
        work.step("probe", self.steps, self.steps)
        return probe

    def _edits(self, host: Host, v: Tensor) -> Edits:
        """Rank one per layer: read alpha v, write one at the chosen rows."""
        sites = [Site(layer, "gate.out") for layer in range(len(own_layers(host.model)))]
        cosines = torch.stack([torch.cosine_similarity(weight_of(host.model, site), v, dim=1) for site in sites])
        count = max(1, round(self.share * cosines.numel()))
        chosen = torch.zeros_like(cosines)
        chosen.view(-1)[cosines.flatten().argsort()[:count]] = 1
        read = (self.alpha * v)[None].cpu().numpy()
        return [
            (LowRank(site=f"layers.{layer}.gate.out", reads=f"layers.{layer}.mlp.in", rank=1),
             {"read": read, "write": np.ascontiguousarray(rows[None].cpu().numpy())})
            for layer, rows in enumerate(chosen) if rows.any()
        ]  # fmt: skip


def _pooled(host: Host, rows: Sequence[Judged]) -> Tensor:
    """Mean over the tokens of each text of the vectors behind the last norm, [texts, hidden]."""
    found = host.activations([row.text for row in rows], ["final"])["final"]
    return torch.stack([states.mean(0) for states in found]).cpu().clone()


def preference(work: Work, rows: Sequence[Judged]) -> float:
    """Log-likelihood of the desired texts less that of the undesired ones, in nats per token."""
    begins = [beginning(work.inputs.tokenizer)] * len(rows)
    likely = work.host.likelihood(begins, [row.text for row in rows])
    undesired = torch.tensor([row.undesired for row in rows], device=likely.device)
    return float(likely[~undesired].mean() - likely[undesired].mean())


build = register(ModelSurgery)
