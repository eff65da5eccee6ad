"""The kinds of edit: what each does to one token's vector, its tensors and their shapes.

An edit record is frozen and small; its numbers live in the bundle's tensor file under `<site>/<kind>/<field>`, as
float32 (indices as int32). `apply` is the reference in numpy, one token a row, which the served form is tested against.

Several edits may meet at one site. They apply in this order, whatever their order in the bundle:

    1. weight_delta      added to the weight: the others edit what the new weight gives
    2. scale             factors multiply
    3. low_rank, gate    every one reads what 2 gave, and all are added: their order does not matter
    4. subspace_filter   one after the other, by `part`
    5. offset            all are added; then, if one of them asks for it, the norm from before 5 is restored

An edit that reads another point of its layer reads it as that point's own edits left it. `scope` says for which tokens
an edit counts, and a request's strength s, within the bundle's bounds, how much: what an edit adds is multiplied by s
(a factor becomes 1 + s (factor - 1)).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vllm_edits.edit_store.scope import ALL, Scope
from vllm_edits.edit_store.sites import LAYER_POINTS, POINTS, Site, Widths

Array = NDArray[np.float32]
Tensors = dict[str, Any]
SiteName = Annotated[str, AfterValidator(lambda text: str(Site.parse(text)))]

MAX_RANK = 512
MAX_PARTS = 64

READS: Mapping[str, tuple[str, ...]] = {
    "q.proj": ("attn.in",), "k.proj": ("attn.in",), "q.out": ("attn.in",), "k.out": ("attn.in",),
    "v.out": ("attn.in",), "attn.out": ("attn.z",), "gate.out": ("mlp.in",), "up.out": ("mlp.in",),
    "mlp.out": ("mlp.h", "mlp.in"), "logits": ("final",),
}  # fmt: skip
"""Points that an edit at a point may read, besides that point itself: its module's input, or its block's."""
_MODULE_READS = {point: reads[0] for point, reads in READS.items()}
IN_PLACE = tuple(point for point in POINTS if point != "logits")


class _Edit(BaseModel):
    """What all kinds share. `site` is where the edit writes; `part` tells several of one kind at one site apart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: ClassVar[tuple[str, ...]]
    """Points where this kind has a meaning."""
    site: SiteName
    part: int = Field(default=1, ge=1, le=MAX_PARTS)
    scope: Scope = ALL

    @property
    def capacity(self) -> int:
        """How much of a server's reservation this edit needs: its rank, or 1 where rank has no meaning."""
        return getattr(self, "rank", 1)

    @property
    def label(self) -> str:
        """What tells this edit from the others of its kind, for people: its site, and its part where there are more."""
        return self.site if self.part == 1 else f"{self.site}.{self.part}"

    @property
    def ranked(self) -> bool:
        """Whether rank has a meaning: ranks of edits that are computed together add up."""
        return hasattr(self, "rank")

    @property
    def source(self) -> str:
        """The site whose vector the edit reads."""
        return getattr(self, "reads", None) or self.site

    @classmethod
    def sources(cls, site: Site, besides: Iterable[str]) -> list[Site]:  # noqa: ARG003
        """What this kind may read at `site`, the usual one first; `besides`: other points that can be read there."""
        return [site]

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
        kind: str = self.kind  # type: ignore[attr-defined]
        return f"{self.site}/{kind}{'' if self.part == 1 else f'.{self.part}'}/{field}"

    def numbers(self, tensors: Mapping[str, Any], widths: Widths) -> dict[str, Any]:
        """This edit's own of a bundle's tensors, by field."""
        return {field: tensors[self.tensor_name(field)] for field in self.shapes(widths)}

    def _width(self, widths: Widths) -> int:
        return widths.of(Site.parse(self.site).point)


class _Reading(_Edit):
    """An edit that reads one point and adds to another of the same layer, or reads the point it changes."""

    reads: SiteName

    def misplaced(self) -> str | None:
        if why := super().misplaced():
            return why
        site, reads = Site.parse(self.site), Site.parse(self.reads)
        allowed = self.sources(site, READS.get(site.point, ()))
        if reads in allowed:
            return None
        return f"a {self.kind} edit at {self.site} must read {' or '.join(map(str, allowed))}, not {self.reads}"  # type: ignore[attr-defined]

    @classmethod
    def sources(cls, site: Site, besides: Iterable[str]) -> list[Site]:
        in_place = [site] if site.point in IN_PLACE else []
        return [site.beside(point) for point in besides] + in_place

    def _source_width(self, widths: Widths) -> int:
        return widths.of(Site.parse(self.reads).point)


class Scale(_Edit):
    """x *= factor, one factor for each head or for each channel.

    factor: [heads] or [width]   1 leaves alone, 0 removes; at k.out and v.out heads are the key-value heads
    Per head at attn.z it removes a head's contribution, at q.out it makes a head attend evenly (Ships/Sahara, arXiv
    2410.13708); per channel it is IA3 (arXiv 2205.05638), and at attn.in or mlp.in together with a projection's output
    a rank-one Hadamard update (HUT, arXiv 2409.13501). It stands before rotary positions, so factors may differ within
    a pair. Where the projection adds a bias that is scaled too: `bias` must then say so.
    """

    points: ClassVar[tuple[str, ...]] = (*(point for point in LAYER_POINTS if point != "resid"), "final")

    kind: Literal["scale"] = "scale"
    per: Literal["head", "channel"] = "head"
    bias: Literal["scaled"] | None = None

    def misplaced(self) -> str | None:
        point = Site.parse(self.site).point
        if point in self.points and self.per == "head" and point not in _HEADED:
            return f"{self.site} is not made of heads; per-head factors can stand at {', '.join(_HEADED)}"
        return super().misplaced()

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        heads = widths.heads_at(Site.parse(self.site).point)
        return {"factor": (heads if self.per == "head" and heads else self._width(widths),)}

    @staticmethod
    def apply(x: Array, *, factor: Array) -> Array:
        return x * np.repeat(factor, x.shape[-1] // factor.shape[0])


_HEADED = ("q.proj", "k.proj", "q.out", "k.out", "v.out", "attn.z")


class LowRank(_Reading):
    """y += sum_r write[r] (read[r] . x), x at `reads`, y at `site`.

    read:  [rank, in]   directions looked for
    write: [rank, out]  directions added
    From a module's input to its output this is an update of its weight, W + write^T read: redirections (ROCR, arXiv
    2506.07795: rank one, mlp.h to mlp.out), ROME, MEMIT and AlphaEdit, rows shifted by a probe (Model Surgery, arXiv
    2407.08770: mlp.in to gate.out, `write` of zeros and ones), LoRA's B A. In place it is a linear map of the vector.
    """

    points: ClassVar[tuple[str, ...]] = POINTS

    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(gt=0, le=MAX_RANK)

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        return {"read": (self.rank, self._source_width(widths)), "write": (self.rank, self._width(widths))}

    @staticmethod
    def apply(x: Array, y: Array, *, read: Array, write: Array) -> Array:
        return np.asarray(y + (x @ read.T) @ write, dtype=np.float32)


ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "relu": lambda z, _: np.maximum(z, 0),
    "jump_relu": lambda z, threshold: np.where(z > threshold, z, 0),
    "step": lambda z, threshold: np.where(z > threshold, 1.0, 0.0),
    "silu": lambda z, _: z / (1 + np.exp(-z)),
    "sigmoid": lambda z, _: 1 / (1 + np.exp(-z)),
}
"""Of a gate's neurons; the second argument is the edit's threshold."""
SILENT = ("relu", "jump_relu", "step")
"""Activations that are exactly zero off their trigger."""


class Gate(_Reading):
    """y += sum_r write[r] sigma(read[r] . phi(x) + bias[r]), x at `reads`, y at `site`, all in float32.

    read:  [rank, in], bias: [rank], write: [rank, out]
    phi(x) = x, or with `normalise`  unit((x - norm_bias) / norm_weight / sqrt(in) - centroid)
    norm_weight, norm_bias, centroid: [in]   the norm before the site (Gemma: 1 + w), and where triggers are centred
    sigma: relu; jump_relu z [z > threshold]; step [z > threshold]; silu; sigmoid
    A jet-pack block (stealth edits, arXiv 2406.12670) reads mlp.in normalised and writes mlp.out with relu, its bias
    -(1 - theta). One-sided ablation of r in place: read r, write -r. A feature of a sparse autoencoder clamped from
    above to c: read w, bias b - c, write -d.
    """

    points: ClassVar[tuple[str, ...]] = POINTS

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


class SubspaceFilter(_Edit):
    """x <- x - P (x - mean), P = basis^T basis; with `onto`  x <- mean + P (x - mean).

    basis: [rank, width]  orthonormal rows: the directions that are removed, or with `onto` the only ones that are kept
    mean:  [width]        what the removed coordinates become; zeros for a plain projection
    dual:  [rank, width]  only with `oblique`: P = dual^T basis, where basis dual^T is the identity
    Off a subspace: abliteration of the residual stream (arXiv 2406.11717), and concept erasure, which is oblique
    (LEACE, arXiv 2306.03819). Onto one: EigenShield's fixed form (arXiv 2502.14976). A second time changes nothing.
    """

    points: ClassVar[tuple[str, ...]] = IN_PLACE

    kind: Literal["subspace_filter"] = "subspace_filter"
    rank: int = Field(gt=0, le=MAX_RANK)
    onto: bool = False
    oblique: bool = False

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        width = self._width(widths)
        dual = {"dual": (self.rank, width)} if self.oblique else {}
        return {"basis": (self.rank, width), "mean": (width,), **dual}

    def apply(self, x: Array, *, basis: Array, mean: Array, dual: Array | None = None) -> Array:
        inside = ((x - mean) @ basis.T) @ (basis if dual is None else dual)
        return np.asarray(mean + inside if self.onto else x - inside, dtype=np.float32)


class Offset(_Edit):
    """x += vector; with `renorm`  x <- (x + vector) |x| / |x + vector|.

    vector: [width]   in the units of the point
    A steering vector at resid (ActAdd, arXiv 2308.10248), or with `renorm` a norm-preserving one; at attn.z the offsets
    of chosen heads (ITI, arXiv 2306.03341; LoFiT, arXiv 2406.01563), zeros elsewhere; at logits a bias.
    """

    points: ClassVar[tuple[str, ...]] = POINTS

    kind: Literal["offset"] = "offset"
    renorm: bool = False

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        return {"vector": (self._width(widths),)}

    def apply(self, x: Array, *, vector: Array) -> Array:
        moved = x + vector
        if not self.renorm:
            return moved
        norms = np.linalg.norm(x, axis=-1, keepdims=True), np.linalg.norm(moved, axis=-1, keepdims=True)
        return np.asarray(moved * norms[0] / norms[1], dtype=np.float32)


class WeightDelta(_Reading):
    """W += delta, the weight between `reads` and `site`: y += delta x.

    dense:  delta [out, in]
    sparse: rows [count], columns [count] (int32, each pair once, in order of row and column), values [count]
    Fine-tuned matrices (LocFT-BF, arXiv 2509.22072), sparse updates with explicit indices (SaRA, arXiv 2409.06633),
    merged models (PCB-Merging, arXiv 2410.02396), Hadamard updates of rank over one.
    """

    points: ClassVar[tuple[str, ...]] = tuple(_MODULE_READS)

    kind: Literal["weight_delta"] = "weight_delta"
    layout: Literal["dense", "sparse"] = "dense"
    count: int | None = Field(default=None, gt=0, description="how many entries a sparse delta has")

    def misplaced(self) -> str | None:
        if (self.layout == "sparse") != (self.count is not None):
            return f"{self.site}: a sparse weight_delta has a count, a dense one has none"
        return super().misplaced()

    @classmethod
    def sources(cls, site: Site, besides: Iterable[str]) -> list[Site]:
        return [site.beside(point) for point in besides]

    def shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        if self.count is not None:
            return {"rows": (self.count,), "columns": (self.count,), "values": (self.count,)}
        return {"delta": (self._width(widths), self._source_width(widths))}

    def apply(self, x: Array, y: Array, **fields: Any) -> Array:
        if self.count is None:
            return np.asarray(y + x @ fields["delta"].T, dtype=np.float32)
        moved = np.array(y.T)
        np.add.at(moved, fields["rows"], (x[:, fields["columns"]] * fields["values"]).T)
        return moved.T


INDEX_FIELDS = ("rows", "columns")
"""Tensor fields of integers; all others are float32."""

Edit = Scale | LowRank | Gate | SubspaceFilter | Offset | WeightDelta
AnyEdit = Annotated[Edit, Field(discriminator="kind")]
KINDS: dict[str, type[Edit]] = {
    "weight_delta": WeightDelta,
    "scale": Scale,
    "low_rank": LowRank,
    "gate": Gate,
    "subspace_filter": SubspaceFilter,
    "offset": Offset,
}
"""Every kind, in the order in which they apply at one site."""
SERVED_PER_REQUEST = tuple(kind for kind in KINDS if kind != "weight_delta")
"""Kinds that a server applies per request."""


def order_at_site(edit: Edit) -> tuple[int, int]:
    """Sorting key of the edits that meet at one site."""
    return list(KINDS).index(edit.kind), edit.part
