"""Neurons that add a vector when they fire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from vllm_edits.edit_store.edits import MAX_RANK, Array, Broken, Fields, Measure, Order, ReadingEdit
from vllm_edits.edit_store.kinds import register
from vllm_edits.edit_store.sites import POINTS, Site, Widths

ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "relu": lambda z, _: np.maximum(z, 0),
    "jump_relu": lambda z, threshold: np.where(z > threshold, z, 0),
    "step": lambda z, threshold: np.where(z > threshold, 1.0, 0.0),
    "silu": lambda z, _: z / (1 + np.exp(-z)),
    "sigmoid": lambda z, _: 1 / (1 + np.exp(-z)),
}
"""Activations of a gate's neurons; the second argument is the edit's threshold."""
SILENT = ("relu", "jump_relu", "step")
"""Activations that are exactly zero off their trigger."""


class Gate(ReadingEdit):
    """y += sum_r write[r] sigma(read[r] . phi(x) + bias[r]), x at `reads`, y at `site`, all in float32.

    read:  [rank, in], bias: [rank], write: [rank, out]
    phi(x) = x, or with `normalise`  unit((x - norm_bias) / norm_weight / sqrt(in) - centroid)
    norm_weight, norm_bias, centroid: [in]   the norm before the site (Gemma: 1 + w), and the centre of the triggers
    sigma: relu; jump_relu z [z > threshold]; step [z > threshold]; silu; sigmoid
    A jet-pack block (stealth edits, arXiv 2406.12670) reads mlp.in normalised and writes mlp.out with relu, its bias
    -(1 - theta). One-sided ablation of r in place: read r, write -r. A feature of a sparse autoencoder clamped from
    above to c: read w, bias b - c, write -d.
    """

    points: ClassVar[tuple[str, ...]] = POINTS
    order: ClassVar[Order] = Order(30, 1)
    features: ClassVar[tuple[str, ...]] = ("normalise",)

    kind: Literal["gate"] = "gate"
    rank: int = Field(gt=0, le=MAX_RANK)
    activation: Literal["relu", "jump_relu", "step", "silu", "sigmoid"] = "relu"
    threshold: float = Field(default=0.0, allow_inf_nan=False)
    normalise: bool = False

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        reads = self._source_width(widths)
        norm = {"norm_weight": (reads,), "norm_bias": (reads,), "centroid": (reads,)} if self.normalise else {}
        return {"read": (self.rank, reads), "bias": (self.rank,), "write": (self.rank, self._width(widths)), **norm}

    def apply(self, x: Array, y: Array, *, read: Array, bias: Array, write: Array, **norm: Array) -> Array:
        if self.normalise:
            x = (x - norm["norm_bias"]) / norm["norm_weight"] / np.sqrt(x.shape[-1]) - norm["centroid"]
            x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        fired = ACTIVATIONS[self.activation](x @ read.T + bias, self.threshold)
        return np.asarray(y + fired @ write, dtype=np.float32)

    def rules_of_numbers(self, fields: Fields, widths: Widths) -> Iterator[Broken]:
        if self.normalise and (zeros := int((fields["norm_weight"] == 0).sum())):
            yield "norm_weight", "norm_weight", f"{zeros} weights are zero, which nothing can be divided by"

    def hint(self, field: str) -> str:
        return " A gate that normalises needs the norm before its site" if field.startswith("norm_") else ""

    def measure(self, fields: Fields) -> Measure:
        longest = float(np.linalg.norm(fields["write"], axis=-1).max())
        return Measure(longest, f"longest vector added per unit of {self.activation}")

    def adds(self, fields: Fields) -> Any:
        return fields["write"]

    def needs(self, together: int) -> frozenset[str]:
        return frozenset(["normalise"] if self.normalise else [])

    @property
    def alone(self) -> bool:
        """True for a normalising gate: a slot has one norm for all neurons that are computed together."""
        return self.normalise

    @property
    def fires(self) -> bool:
        return self.activation in SILENT

    def formless(self) -> str:
        return "whether a gate opens depends on the token, and a weight is the same for all. Serve it per request"

    @classmethod
    def usual(cls, layer: int, rank: int = 1) -> Self:
        return cls(site=f"layers.{layer}.mlp.out", reads=f"layers.{layer}.mlp.in", rank=rank, normalise=True)

    @classmethod
    def forms(cls, site: Site, width: int) -> Iterator[tuple[str, Self]]:
        where = str(site)
        for reads in map(str, cls._readable(site)):
            yield "", cls(site=where, reads=reads, rank=4)
            if reads.endswith("mlp.in"):
                yield "normalise", cls(site=where, reads=reads, rank=2, normalise=True)
        yield "jump_relu", cls(site=where, reads=where, rank=2, activation="jump_relu", threshold=0.02)
        yield "sigmoid", cls(site=where, reads=where, rank=2, activation="sigmoid")

    def sample(self, random: np.random.Generator, widths: Widths, strength: float) -> dict[str, Any]:
        """Random numbers with each neuron beside its opposite, since one of both fires for any token."""
        numbers = super().sample(random, widths, strength)
        numbers["read"][1::2] = -numbers["read"][::2][: self.rank // 2]
        numbers["bias"] = np.abs(numbers["bias"])
        if self.normalise:
            numbers["norm_weight"] = random.uniform(0.5, 1.5, numbers["norm_weight"].shape)
            numbers["write"] = numbers["write"] * 5
        return numbers

    def weakened(self, fields: Fields, strength: float) -> dict[str, Any]:
        return {**fields, "write": fields["write"] * np.float32(strength)}


register(Gate)
