"""APET: an arbitrary few parameters are trained (Exploring the Impact of Model Scaling on PET, arXiv 2306.02320).

    vectors    whole vectors, each an offset or a scale at some layer's point, at random until `budget` is used up
    entries    `budget` single entries of random projections, at random

The paper says that with a large model it matters little which parameters are trained. Its text has any number of
parameters in arbitrary positions, which is `entries`; its code chooses whole tensors at random, half of them from
adapters, LoRA and prompts, and half from the base. Offsets and scales are what remains of that where nothing but the
model's own vectors may change; soft prompts are no edit of a model. As in the code: rate 1e-4 with its long training
of 20,000 steps; here the default is a higher rate with fewer steps, and the seed decides the choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.authoring.build import register
from vllm_edits.edit_store.authoring.host import Edits
from vllm_edits.edit_store.authoring.method import Inputs, Layers, Work, layer_problems
from vllm_edits.edit_store.authoring.taught import Taught
from vllm_edits.edit_store.authoring.training import Trained, finished
from vllm_edits.edit_store.edits import Edit
from vllm_edits.edit_store.errors import Reason
from vllm_edits.edit_store.kinds.offset import Offset
from vllm_edits.edit_store.kinds.scale import Scale
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
from vllm_edits.edit_store.sites import Site

_OFFSETS = ("attn.z", "attn.out", "mlp.h", "mlp.out")
_SCALES = ("attn.z", "mlp.h")


class Apet(Taught):
    """Learn answers by training a few parameters in random places.

    As `vectors` it is served per request, as `entries` in the install mode `weights`.
    """

    source: ClassVar[str] = "arXiv 2306.02320"
    kinds: ClassVar[tuple[str, ...]] = ("offset", "scale", "weight_delta")

    budget: int = Field(10_000, gt=0, description="Numbers that are trained.")
    positions: Literal["vectors", "entries"] = Field("vectors", description="Whole vectors, or single weights.")
    layers: Layers | None = Field(None, description="Layers that are chosen from. Default: all.")
    epochs: int = Field(20, gt=0, description="Passes over the examples.")
    rate: float = Field(1e-2, gt=0, description="Learning rate.")

    def problems(self, inputs: Inputs) -> Iterator[Reason]:
        yield from super().problems(inputs)
        yield from layer_problems(self._layers(inputs), inputs)
        least = min((inputs.base.widths.of(site.point) for _, site in self._candidates(inputs)), default=1)
        if self.positions == "vectors" and self.budget < least:
            yield Reason("budget", f"expected at least {least}, the numbers of one vector, found {self.budget}")

    def make(self, work: Work) -> Edits:
        random = torch.Generator().manual_seed(work.seed)
        trained = self._vectors(work, random) if self.positions == "vectors" else self._entries(work, random)
        parameters = [numbers[name] for edit, numbers in trained for name in numbers if numbers[name].requires_grad]
        layers = [Site.parse(edit.site).layer or 0 for edit, _ in trained]
        lessons = self.lessons(work, work.data["examples"], below=min(layers))
        self.course.train(work, lessons, parameters, lambda: trained)
        done = finished(trained)
        self.measure(work, done)
        return done

    def _layers(self, inputs: Inputs) -> tuple[int, ...]:
        return inputs.layers_from(self.layers, 0)

    def _candidates(self, inputs: Inputs) -> Sequence[tuple[type[Edit], Site]]:
        """Vectors that may be chosen. Points with a bias have no scale, which would change the bias too."""
        there = supported(inputs.base.architecture)
        kinds: tuple[tuple[type[Edit], tuple[str, ...]], ...] = ((Offset, _OFFSETS), (Scale, _SCALES))
        return [
            (kind, Site(layer, point)) for layer in self._layers(inputs) for kind, points in kinds for point in points
            if there.hidden(point) is None
        ]  # fmt: skip

    def _vectors(self, work: Work, random: torch.Generator) -> Trained:
        candidates, left = self._candidates(work.inputs), self.budget
        chosen: list[tuple[Edit, dict[str, Tensor]]] = []
        for number in torch.randperm(len(candidates), generator=random).tolist():
            kind, site = candidates[number]
            size = work.inputs.base.widths.of(site.point)
            if size > left:
                continue
            left -= size
            begun = torch.zeros if kind is Offset else torch.ones
            vector = begun(size, device=work.host.device).requires_grad_()
            if kind is Offset:
                chosen.append((Offset(site=str(site)), {"vector": vector}))
            else:
                chosen.append((Scale(site=str(site), per="channel"), {"factor": vector}))
        return chosen

    def _entries(self, work: Work, random: torch.Generator) -> Trained:
        widths, reads = work.inputs.base.widths, supported(work.inputs.base.architecture).projections()
        sites = [Site(layer, point) for layer in self._layers(work.inputs) for point in reads]
        sizes = [(widths.of(site.point), widths.of(reads[site.point])) for site in sites]
        ends = torch.tensor([rows * columns for rows, columns in sizes]).cumsum(0)
        drawn = torch.randint(int(ends[-1]), (self.budget,), generator=random).tolist()
        places = torch.tensor(sorted(set(drawn)))
        found = []
        for site, (rows, columns), end in zip(sites, sizes, ends.tolist(), strict=True):
            own = places[(places < end) & (places >= end - rows * columns)] - (end - rows * columns)
            if not len(own):
                continue
            reading = str(site.beside(reads[site.point]))
            edit = WeightDelta(site=str(site), reads=reading, layout="sparse", count=len(own))
            numbers = {
                "rows": (own // columns).int(), "columns": (own % columns).int(), "values": torch.zeros(len(own)),
            }  # fmt: skip
            moved = {name: tensor.to(work.host.device) for name, tensor in numbers.items()}
            moved["values"].requires_grad_()
            found.append((edit, moved))
        return found


build = register(Apet)
