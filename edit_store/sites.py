"""Model-neutral names of the places an edit can attach to, and how wide each is.

A site is `layers.<n>.<point>`. Points, with the tensor they name per token:

    attn.z    [heads * head_dim]   concatenated head outputs, the input of the output projection
    attn.out  [hidden]             output of the attention block, before it joins the residual stream
    mlp.h     [mlp]                act(gate) * up, the input of the down projection
    mlp.out   [hidden]             output of the MLP block, before it joins the residual stream
    resid     [hidden]             the residual stream after layer n (the sum of vLLM's two halves)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

POINTS = ("attn.z", "attn.out", "mlp.h", "mlp.out", "resid")
_SITE = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.([a-z]+(?:\.[a-z]+)?)")


class Widths(BaseModel):
    """The sizes of a model that decide the shapes of its edits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    mlp: int = Field(gt=0)
    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)

    def of(self, point: str) -> int:
        """Width of the per-token vector at `point`."""
        return {"attn.z": self.heads * self.head_dim, "mlp.h": self.mlp}.get(point, self.hidden)


@dataclass(frozen=True, order=True)
class Site:
    """One place in one model: a layer and a point in it."""

    layer: int
    point: str

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read `layers.3.mlp.out`; ValueError says what a site looks like."""
        match = _SITE.fullmatch(text)
        if match is None or match[2] not in POINTS:
            raise ValueError(f"unknown site {text!r}: expected layers.<n>.<point> with a point of {', '.join(POINTS)}")
        return cls(int(match[1]), match[2])

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.point}"
