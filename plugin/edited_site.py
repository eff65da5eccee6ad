"""A module of the model with its slot tensors: what runs inside the compiled graph.

The module stays the same object with the same parameters; only its class becomes a subclass whose forward applies the
edits around the original one (as torch's own parametrization does). So weight names, isinstance checks and weight
reloading are untouched. Slot tensors live in a child module named `edits` and never change address.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plugin import edit_math


@dataclass(frozen=True)
class Sizes:
    """Widths that slot tensors of one site are made of."""

    reads: int
    writes: int
    heads: int


class SlotTensors(nn.Module):
    """The tensors of one kind at one site, a row for each slot; `neutral` fills a row that changes nothing."""

    neutral = 0.0

    def reset(self, slot: int) -> None:
        """Make a slot's edit the identity."""
        for buffer in self.buffers():
            buffer[slot] = self.neutral

    def fill(self, slot: int, fields: Mapping[str, Tensor]) -> None:
        """Write an edit's numbers into a neutral slot; ranks the edit does not use stay neutral."""
        raise NotImplementedError

    def _keep(self, name: str, *shape: int, **made: Any) -> None:
        self.register_buffer(name, torch.full(shape, self.neutral, **made), persistent=False)


class ScaleSlots(SlotTensors):
    """factor: [S, heads]."""

    neutral = 1.0
    factor: Tensor

    def __init__(self, slots: int, rank: int, sizes: Sizes, **made: Any) -> None:
        super().__init__()
        self._keep("factor", slots, sizes.heads, **made)

    def forward(self, z: Tensor, slots: Tensor) -> Tensor:
        return edit_math.scale(z, self.factor, slots)

    def fill(self, slot: int, fields: Mapping[str, Tensor]) -> None:
        self.factor[slot] = fields["factor"]


class LowRankSlots(SlotTensors):
    """read: [S, rank, reads], write: [S, rank, writes]."""

    read: Tensor
    write: Tensor

    def __init__(self, slots: int, rank: int, sizes: Sizes, **made: Any) -> None:
        super().__init__()
        self._keep("read", slots, rank, sizes.reads, **made)
        self._keep("write", slots, rank, sizes.writes, **made)

    def forward(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        return edit_math.low_rank(x, y, self.read, self.write, slots)

    def fill(self, slot: int, fields: Mapping[str, Tensor]) -> None:
        rank = fields["read"].shape[0]
        self.read[slot, :rank] = fields["read"]
        self.write[slot, :rank] = fields["write"]


class SubspaceFilterSlots(SlotTensors):
    """basis: [S, rank, hidden], shift: [S, rank] = basis @ mean, kept in float32."""

    basis: Tensor
    shift: Tensor

    def __init__(self, slots: int, rank: int, sizes: Sizes, **made: Any) -> None:
        super().__init__()
        self._keep("basis", slots, rank, sizes.writes, **made)
        self._keep("shift", slots, rank, **{**made, "dtype": torch.float32})

    def forward(self, hidden: Tensor, stream: Tensor, slots: Tensor) -> Tensor:
        return edit_math.subspace_filter(hidden, stream, self.basis, self.shift, slots)

    def fill(self, slot: int, fields: Mapping[str, Tensor]) -> None:
        rank = fields["basis"].shape[0]
        self.basis[slot, :rank] = fields["basis"]
        self.shift[slot, :rank] = fields["basis"] @ fields["mean"]


class OffsetSlots(SlotTensors):
    """vector: [S, hidden]."""

    vector: Tensor

    def __init__(self, slots: int, rank: int, sizes: Sizes, **made: Any) -> None:
        super().__init__()
        self._keep("vector", slots, sizes.writes, **made)

    def forward(self, hidden: Tensor, slots: Tensor) -> Tensor:
        return edit_math.offset(hidden, self.vector, slots)

    def fill(self, slot: int, fields: Mapping[str, Tensor]) -> None:
        self.vector[slot] = fields["vector"]


SLOT_TENSORS: dict[str, Callable[..., SlotTensors]] = {
    "scale": ScaleSlots,
    "low_rank": LowRankSlots,
    "subspace_filter": SubspaceFilterSlots,
    "offset": OffsetSlots,
}


class ModuleEdits(nn.Module):
    """The slot tensors of one module by kind, and the token slots they are gathered by.

    A kind that is not reserved here is None: the compiler never sees it.
    """

    token_slots: Tensor

    def __init__(self, token_slots: Tensor) -> None:
        super().__init__()
        self.register_buffer("token_slots", token_slots, persistent=False)
        self.scale: ScaleSlots | None = None
        self.low_rank: LowRankSlots | None = None
        self.subspace_filter: SubspaceFilterSlots | None = None
        self.offset: OffsetSlots | None = None

    def around_linear(self, x: Tensor) -> Tensor:
        """The input of a projection, edited."""
        return x if self.scale is None else self.scale(x, self.token_slots[: x.shape[0]])

    def after_linear(self, x: Tensor, y: Tensor) -> Tensor:
        """The output of a projection, edited; `x` is the input it saw."""
        return y if self.low_rank is None else self.low_rank(x, y, self.token_slots[: x.shape[0]])

    def after_layer(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """One half of the residual stream, so changed that the sum of both halves is the edited stream."""
        slots = self.token_slots[: hidden.shape[0]]
        if self.subspace_filter is not None:
            hidden = self.subspace_filter(hidden, hidden.float() + residual.float(), slots)
        if self.offset is not None:
            hidden = self.offset(hidden, slots)
        return hidden


@functools.cache
def edited_linear(cls: Any) -> type[nn.Module]:
    """A subclass of a linear layer of vLLM (input -> output, or (output, bias)) with edits around it."""

    class EditedLinear(cls):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            x = self.edits.around_linear(x)
            outputs = super().forward(x)
            if isinstance(outputs, tuple):
                return self.edits.after_linear(x, outputs[0]), *outputs[1:]
            return self.edits.after_linear(x, outputs)

    return _named(EditedLinear, cls)


@functools.cache
def edited_layer(cls: Any) -> type[nn.Module]:
    """A subclass of a decoder layer of vLLM that returns the residual stream as two halves (hidden, residual)."""

    class EditedLayer(cls):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            hidden, residual = super().forward(*args, **kwargs)
            return self.edits.after_layer(hidden, residual), residual

    return _named(EditedLayer, cls)


def _named(edited: type[nn.Module], original: Any) -> type[nn.Module]:
    edited.__name__ = edited.__qualname__ = f"Edited{original.__name__}"
    return edited
