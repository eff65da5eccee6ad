"""The kinds of edit: what each does to one token's vector, its tensors and their shapes.

An edit record is frozen and small; its numbers live in the bundle's tensor file as float32 under the name
`<site>/<kind>/<field>`. `apply` is the reference in numpy, one token a row, which the served form is tested against.
When several edits meet at one site the order is: scale, low_rank, subspace_filter, offset.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from edit_store.sites import Site, Widths

Array = NDArray[np.float32]
Tensors = dict[str, Array]
SiteName = Annotated[str, AfterValidator(lambda text: str(Site.parse(text)))]

MAX_RANK = 512


class _Edit(BaseModel):
    """What all kinds share. `site` is where the edit writes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: ClassVar[tuple[str, ...]]
    """Points where this kind has a meaning."""
    site: SiteName

    @property
    @abstractmethod
    def capacity(self) -> int:
        """How much of a server's reservation this edit needs: its rank, or 1 where rank has no meaning."""

    @abstractmethod
    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor field for a model of these widths."""

    def misplaced(self) -> str | None:
        """Why this kind cannot stand at its site, or None."""
        point = Site.parse(self.site).point
        if point in self.points:
            return None
        return f"kind {self.kind!r} has no meaning at {self.site}; it can stand at {', '.join(self.points)}"  # type: ignore[attr-defined]

    def tensor_name(self, field: str) -> str:
        """Name of a tensor field in the bundle's tensor file."""
        return f"{self.site}/{self.kind}/{field}"  # type: ignore[attr-defined]


class LowRank(_Edit):
    """y += sum_r write[r] * (read[r] . x), x at `reads`, y at `site`.

    read:  [rank, in]   directions looked for in the module's input
    write: [rank, out]  directions added to its output
    A rank-one redirection (ROCR, arXiv 2506.07795) is rank 1 at mlp.h -> mlp.out: W_down + write read^T.
    """

    points: ClassVar[tuple[str, ...]] = ("mlp.out",)

    kind: Literal["low_rank"] = "low_rank"
    reads: SiteName
    rank: int = Field(gt=0, le=MAX_RANK)

    @property
    def capacity(self) -> int:
        return self.rank

    def misplaced(self) -> str | None:
        reads, writes = Site.parse(self.reads), Site.parse(self.site)
        if reads != Site(writes.layer, "mlp.h"):
            return f"a low_rank edit at {self.site} must read layers.{writes.layer}.mlp.h, not {self.reads}"
        return super().misplaced()

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        reads, writes = Site.parse(self.reads), Site.parse(self.site)
        return {"read": (self.rank, widths.of(reads.point)), "write": (self.rank, widths.of(writes.point))}

    @staticmethod
    def apply(x: Array, y: Array, *, read: Array, write: Array) -> Array:
        return np.asarray(y + (x @ read.T) @ write, dtype=np.float32)


class Scale(_Edit):
    """z[head] *= factor[head].

    factor: [heads]  one number per query head; 1 leaves the head alone, 0 removes its contribution
    Ablation by contribution (Ships/Sahara, arXiv 2410.13708): the head's output, not its weights; GQA does not matter.
    """

    points: ClassVar[tuple[str, ...]] = ("attn.z",)

    kind: Literal["scale"] = "scale"

    @property
    def capacity(self) -> int:
        return 1

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        return {"factor": (widths.heads,)}

    @staticmethod
    def apply(x: Array, *, factor: Array) -> Array:
        return x * np.repeat(factor, x.shape[-1] // factor.shape[0])


class SubspaceFilter(_Edit):
    """x <- x - V^T V (x - mean).

    basis: [rank, hidden]  V, orthonormal rows: the directions removed
    mean:  [hidden]        where the removed coordinates are moved to; zeros for a plain projection
    Affine concept erasure (LEACE, arXiv 2306.03819) with orthogonal projection; idempotent.
    """

    points: ClassVar[tuple[str, ...]] = ("resid",)

    kind: Literal["subspace_filter"] = "subspace_filter"
    rank: int = Field(gt=0, le=MAX_RANK)

    @property
    def capacity(self) -> int:
        return self.rank

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        return {"basis": (self.rank, widths.hidden), "mean": (widths.hidden,)}

    @staticmethod
    def apply(x: Array, *, basis: Array, mean: Array) -> Array:
        return np.asarray(x - ((x - mean) @ basis.T) @ basis, dtype=np.float32)


class Offset(_Edit):
    """x += vector.

    vector: [hidden]  a steering vector in the residual stream's own units (ActAdd, arXiv 2308.10248)
    """

    points: ClassVar[tuple[str, ...]] = ("resid",)

    kind: Literal["offset"] = "offset"

    @property
    def capacity(self) -> int:
        return 1

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        return {"vector": (widths.hidden,)}

    @staticmethod
    def apply(x: Array, *, vector: Array) -> Array:
        return x + vector


Edit = LowRank | Scale | SubspaceFilter | Offset
AnyEdit = Annotated[Edit, Field(discriminator="kind")]
KINDS: dict[str, type[Edit]] = {
    "scale": Scale,
    "low_rank": LowRank,
    "subspace_filter": SubspaceFilter,
    "offset": Offset,
}
"""Every kind, in the order in which they apply at one site."""
