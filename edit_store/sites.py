"""Model-neutral names of the sites of edits, with their widths.

A site is `layers.<n>.<point>`, or one of the three sites outside the layers. Every point names one tensor per token:

    embed.out   [hidden]             input of layer 0: embeddings, with positions and multipliers if the model has them
    attn.in     [hidden]             input of the query, key and value projections
    q.proj      [heads * head_dim]   queries before their own norm, in models that have one (QK-norm)
    k.proj      [kv_heads * head_dim]
    q.out       [heads * head_dim]   queries after bias and QK-norm, before rotary positions
    k.out       [kv_heads * head_dim]
    v.out       [kv_heads * head_dim]
    attn.z      [heads * head_dim]   concatenated head outputs, the input of the output projection
    attn.out    [hidden]             output of the output projection
    attn.post   [hidden]             the same after its own norm, in models that have one (post-norm)
    mlp.in      [hidden]             input of the MLP, or of the experts' router
    gate.out    [mlp]                gate projection, before the activation function
    up.out      [mlp]                up projection; before the activation function where there is no gate
    mlp.h       [mlp]                act(gate) * up, the input of the down projection
    mlp.out     [hidden]             output of the down projection, or of all experts together
    mlp.post    [hidden]             the same after its own norm
    resid       [hidden]             the residual stream after layer n
    final       [hidden]             after the last norm, the input of the output head
    logits      [vocab]              the next token's logits, with soft cap and multiplier

`layers.<n>.resid.in` is another name for the input of layer n: `layers.<n-1>.resid`, or `embed.out`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import total_ordering

from pydantic import BaseModel, ConfigDict, Field

FIRST, LAST = ("embed.out",), ("final", "logits")
LAYER_POINTS = (
    "attn.in", "q.proj", "k.proj", "q.out", "k.out", "v.out", "attn.z", "attn.out", "attn.post",
    "mlp.in", "gate.out", "up.out", "mlp.h", "mlp.out", "mlp.post", "resid",
)  # fmt: skip
POINTS = (*FIRST, *LAYER_POINTS, *LAST)
"""All points, in the order in which a token passes them."""

READS: Mapping[str, tuple[str, ...]] = {
    "q.proj": ("attn.in",), "k.proj": ("attn.in",), "q.out": ("attn.in",), "k.out": ("attn.in",),
    "v.out": ("attn.in",), "attn.out": ("attn.z",), "gate.out": ("mlp.in",), "up.out": ("mlp.in",),
    "mlp.out": ("mlp.h", "mlp.in"), "logits": ("final",),
}  # fmt: skip
"""Points that an edit at a point may read, besides that point itself: its module's input, or its block's."""

_SITE = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.([a-z]+(?:\.[a-z]+)?)")
_QUERIES, _KEYS_VALUES = ("q.proj", "q.out", "attn.z"), ("k.proj", "k.out", "v.out")
_MLP = ("gate.out", "up.out", "mlp.h")


class Widths(BaseModel):
    """The sizes of a model that determine the shapes of its edits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    mlp: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab: int = Field(gt=0)

    def of(self, point: str) -> int:
        """Width of the per-token vector at `point`."""
        if (heads := self.heads_at(point)) is not None:
            return heads * self.head_dim
        return self.mlp if point in _MLP else self.vocab if point == "logits" else self.hidden

    def heads_at(self, point: str) -> int | None:
        """The number of heads in the vector at `point`, or None if it has no heads."""
        return self.heads if point in _QUERIES else self.kv_heads if point in _KEYS_VALUES else None

    def per_worker(self, workers: int) -> Widths:
        """The sizes in each worker when tensor parallel divides heads and MLP among `workers`.

        With fewer key-value heads than workers, each worker has one head, and several workers have the same head.
        """
        kv_heads = max(1, self.kv_heads // workers)
        divided = {"heads": self.heads // workers, "kv_heads": kv_heads, "mlp": self.mlp // workers}
        return self.model_copy(update=divided)


@total_ordering
@dataclass(frozen=True)
class Site:
    """A place in a model: a point, and its layer (None outside the layers)."""

    layer: int | None
    point: str

    @classmethod
    def parse(cls, text: str) -> Site:
        """Parse a site such as `layers.3.mlp.out`. ValueError describes the valid forms."""
        if text in (*FIRST, *LAST):
            return cls(None, text)
        name, _, side = text.rpartition(".resid.")
        match = _SITE.fullmatch(f"{name}.resid" if side in ("in", "out") else text)
        if match is None or match[2] not in LAYER_POINTS:
            raise ValueError(
                f"unknown site {text!r}: expected {', '.join((*FIRST, *LAST))}, or layers.<n>.<point> with one of the "
                f"points {', '.join(LAYER_POINTS)}"
            )
        layer = int(match[1])
        if side == "in":
            return cls(layer - 1, "resid") if layer else cls(None, "embed.out")
        return cls(layer, match[2])

    def beside(self, point: str) -> Site:
        """The site of another point in the same layer, or outside the layers if the point is outside them."""
        return Site(self.layer if point in LAYER_POINTS else None, point)

    def __str__(self) -> str:
        return self.point if self.layer is None else f"layers.{self.layer}.{self.point}"

    def __lt__(self, other: Site) -> bool:
        return self._order() < other._order()

    def _order(self) -> tuple[int, int, int]:
        part = 1 if self.layer is not None else 0 if self.point in FIRST else 2
        return part, self.layer or 0, POINTS.index(self.point)


def every_site(layers: int) -> list[Site]:
    """Every site that a model with `layers` layers may have, in model order."""
    inside = [Site(layer, point) for layer in range(layers) for point in LAYER_POINTS]
    return [*(Site(None, point) for point in FIRST), *inside, *(Site(None, point) for point in LAST)]
