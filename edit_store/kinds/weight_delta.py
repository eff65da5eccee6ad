"""Changes of whole weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from vllm_edits.edit_store.edits import Array, Broken, Edit, Fields, Measure, Order, ReadingEdit
from vllm_edits.edit_store.kinds import register
from vllm_edits.edit_store.sites import READS, Site, Widths


class WeightDelta(ReadingEdit):
    """W += delta, the weight between `reads` and `site`: y += delta x.

    dense:  delta [out, in]
    sparse: rows [count], columns [count] (int32, each pair once, in order of row and column), values [count]
    Fine-tuned matrices (LocFT-BF, arXiv 2509.22072), sparse updates with explicit indices (SaRA, arXiv 2409.06633),
    merged models (PCB-Merging, arXiv 2410.02396), Hadamard updates of rank over one.
    """

    points: ClassVar[tuple[str, ...]] = tuple(READS)
    order: ClassVar[Order] = Order(10)
    only_in_weights: ClassVar[str] = (
        "changes a whole matrix, which is not done per request. Make a low_rank edit of it, or serve it in the install "
        "mode `weights`"
    )
    integers: ClassVar[tuple[str, ...]] = ("rows", "columns")

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

    def rules_of_numbers(self, fields: Fields, widths: Widths) -> Iterator[Broken]:
        if self.count is None:
            return
        rows, columns = fields["rows"].astype(np.int64), fields["columns"].astype(np.int64)
        sizes = {"rows": self._width(widths), "columns": self._source_width(widths)}
        outside = False
        for field, indices in (("rows", rows), ("columns", columns)):
            if ((indices < 0) | (indices >= sizes[field])).any():
                outside = True
                yield "index", field, f"expected 0 to {sizes[field] - 1}, found {indices.min()} to {indices.max()}"
        if not outside and (np.diff(rows * sizes["columns"] + columns) <= 0).any():
            yield "index", "rows", "expected each pair once, in order of row and column"

    def measure(self, fields: Fields) -> Measure:
        norm = float(np.linalg.norm(fields["values" if self.count else "delta"]))
        return Measure(norm, "Frobenius norm of the change of W")

    def beside(self, fields: Fields, other: Edit, other_fields: Fields) -> str | None:
        return "the delta comes first, so what it adds is scaled or filtered too" if other.transforms else None

    def formless(self) -> str | None:
        if Site.parse(self.site).point == "logits":
            return (
                "the output head is often the embeddings too, which would change with it. Make a low_rank edit from "
                "final to logits of it, and serve that per request"
            )
        return super().formless()

    def weight_change(self, fields: Fields, shape: Sequence[int]) -> tuple[Any, ...]:
        if self.count is None:
            return (fields["delta"],)
        delta = np.zeros(shape, dtype=np.float32)
        delta[fields["rows"], fields["columns"]] = fields["values"]
        return (delta,)

    @classmethod
    def usual(cls, layer: int, rank: int = 1) -> Self:
        return cls(site=f"layers.{layer}.mlp.out", reads=f"layers.{layer}.mlp.h")

    @classmethod
    def forms(cls, site: Site, width: int) -> Iterator[tuple[str, Self]]:
        for reads in cls._readable(site)[:1]:
            yield "", cls(site=str(site), reads=str(reads))
            yield "sparse", cls(site=str(site), reads=str(reads), layout="sparse", count=20)

    def sample(self, random: np.random.Generator, widths: Widths, strength: float) -> dict[str, Any]:
        numbers = super().sample(random, widths, strength)
        if self.count is not None:
            width = self._source_width(widths)
            places = np.sort(random.choice(self._width(widths) * width, self.count, replace=False))
            numbers |= {"rows": places // width, "columns": places % width}
        return numbers

    def weakened(self, fields: Fields, strength: float) -> dict[str, Any]:
        changed = "delta" if self.count is None else "values"
        return {**fields, changed: fields[changed] * np.float32(strength)}


register(WeightDelta)
