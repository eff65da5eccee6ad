"""The numbers of one kind of edit in every slot, as the compiled graph reads them: the base class for `kinds/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vllm_edits.edit_store.edits import EditsWithNumbers
from vllm_edits.edit_store.kinds import SCALED
from vllm_edits.plugin.graph.firing_counters import COUNTED, FiringCounters
from vllm_edits.plugin.graph.reservation import Capacity
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts
from vllm_edits.plugin.graph.slot_rows import Columns, Layout, Rows
from vllm_edits.plugin.graph.stage import Stage
from vllm_edits.plugin.graph.step import Step
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, Shard, identity


@dataclass(frozen=True)
class Shape:
    """Sizes of one group's slot tensors, and the products of tokens with them."""

    capacity: Capacity
    reads: Shard
    writes: Shard
    dtype: torch.dtype
    total: AllReduce = identity
    products: SlotProducts = EXPRESSIONS


class SlotTensors(nn.Module):
    """The tensors of one group of edits, of every slot: columns of the slots' rows. A row of zeros changes nothing.

    `scope_row` [S], which exists with capacity for scaled edits, is the column of a step's token scales for each slot.
    Called with the vectors that the edits read, `x` [T, reads], and each token's slot, [T], it returns the vectors that
    the edits add, in float32. Flags and codes are float32 too: each type is one more input of the graph per layer.
    """

    stage: ClassVar[type[Stage]] = Stage
    """Computation of all edits of this kind, and of other kinds in its stage, at one site."""
    linear: ClassVar[bool] = False
    """True if the result is linear in the vector that is read, and not counted: workers may then add up their parts."""

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__()
        self._shape = shape
        self._layout = layout
        self.columns: dict[str, Columns] = {}
        """the place of each tensor in a row"""
        self._shares: dict[str, Shard] = {}
        self._keep("scope_row", dtype=torch.float32, feature=SCALED)
        self.neurons = 0
        """number of a slot's neurons whose firings are counted, one for each rank"""
        self.firings: FiringCounters | None = None
        """the counters"""
        self.column = 0
        """first column of the counters for these neurons"""

    def bind(self, rows: Rows, layer: int | None) -> None:
        """Make the tensors columns of a layer's part of the rows."""
        self.rows, self.layer = rows, layer

    @property
    def counters(self) -> int:
        """Bytes of a slot outside its row."""
        return self.neurons * COUNTED.itemsize

    def counted_by(self, firings: FiringCounters) -> None:
        """Count the firings of the neurons."""
        self.firings, self.column = firings, firings.take(self.neurons)

    def has(self, name: str) -> bool:
        """True if there is that tensor: some serve a feature, which must be reserved."""
        return name in self.columns

    def tensor(self, name: str) -> Tensor:
        """One of the tensors in every slot: [S, *shape]."""
        return self.rows.tensor(self.layer, self.columns[name])

    def fill(self, row: Tensor, numbers: EditsWithNumbers, scope_row: int) -> None:
        """Write several edits at once into a row [1, bytes] of zeros. Ranks that they do not use stay zero."""
        for name, values in {**self._values(numbers), "scope_row": scope_row}.items():
            if self.has(name):
                columns, source = self.columns[name], torch.as_tensor(values)
                target = columns.of(row.view(columns.dtype))[0]
                if name in self._shares:
                    source = self._shares[name].of(source)
                (target[: len(source)] if source.ndim else target).copy_(source)

    def forward(self, x: Tensor, slots: Tensor, step: Step) -> Tensor:
        token_scale = self.token_scale(step, slots)
        added = self._added(x, slots, token_scale)
        return added if token_scale is None else added * token_scale

    def token_scale(self, step: Step, slots: Tensor) -> Tensor | None:
        """[T, 1]: the edits' factor for each token; None if it is 1 for all."""
        return step.token_scale(self.tensor("scope_row"), slots) if self.has("scope_row") else None

    def _added(self, x: Tensor, slots: Tensor, token_scale: Tensor | None) -> Tensor:
        """Vectors that the edits add at full strength."""
        raise NotImplementedError

    def _values(self, numbers: EditsWithNumbers) -> dict[str, Any]:
        """Values of the tensors for several edits at once, in any type; those without columns are left out."""
        raise NotImplementedError

    def _note(self, fired: Tensor, token_scale: Tensor | None) -> None:
        """Note each neuron's activation, [T, neurons], before the factor of each token."""
        if self.firings is not None:
            self.firings.note(self.column, (fired if token_scale is None else fired * token_scale) != 0)

    def _sums(self) -> dict[str, Any]:
        """Dot products of the vector that is read, whole ones."""
        return {"total": self._shape.total, "products": self._shape.products}

    def _keep(
        self, name: str, *shape: int | Shard, dtype: torch.dtype | None = None, feature: str | None = None
    ) -> None:
        """Columns for a tensor, if there is capacity for the `feature` it serves.

        A tensor whose last dimension is a vector's keeps the worker's share of it only.
        """
        if feature is None or feature in self._shape.capacity.features:
            sizes = tuple(size.width if isinstance(size, Shard) else size for size in shape)
            self.columns[name] = self._layout.take(sizes, dtype or self._shape.dtype)
            if shape and isinstance(shape[-1], Shard):
                self._shares[name] = shape[-1]


def stacked(numbers: EditsWithNumbers, field: str) -> Tensor:
    """One field of several edits, their ranks one after the other."""
    return torch.cat([torch.as_tensor(fields[field]) for _, fields in numbers])
