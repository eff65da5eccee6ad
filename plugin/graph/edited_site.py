"""What runs inside the compiled graph: the slot tensors of a site, and the modules of the model that they sit around.

A module stays the same object with the same parameters; only its class becomes a subclass whose forward applies the
edits around the original one (as torch's own parametrization does). So weight names, isinstance checks and weight
reloading are untouched. Slot tensors live in a child module named `edits` and never change address.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_edits.edit_store.edits import Array, Edit, Gate, Offset, SubspaceFilter
from vllm_edits.plugin.graph import edit_math
from vllm_edits.plugin.graph.fold import fold_filters
from vllm_edits.plugin.graph.reservation import Capacity
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts
from vllm_edits.plugin.graph.slot_rows import Columns, Layout, Rows
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, Shard, identity

GroupEdits = Sequence[tuple[Edit, Mapping[str, Array]]]
"""Edits that share one place in one version, in order, each with its arrays."""


@dataclass(frozen=True)
class Shape:
    """What decides the shapes of one place's slot tensors, and how tokens are multiplied with them."""

    capacity: Capacity
    reads: Shard
    writes: Shard
    dtype: torch.dtype
    total: AllReduce = identity
    products: SlotProducts = EXPRESSIONS


class SlotTensors(nn.Module):
    """The tensors of one kind at one place, of every slot: columns of the slots' rows. A row of zeros changes nothing.

    `scope_row` [S], where there is room for weighted edits, says which column of a step's weights weighs a slot's edit.
    Called with the vectors that the edits read, `x` [T, reads], and each token's slot, [T], it gives what the edits
    add, in float32. Flags and codes are kept in float32 too: each type is an input more of the graph, at every layer.
    """

    counters = 0
    """bytes of a slot outside its row"""

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__()
        self._shape = shape
        self._layout = layout
        self.columns: dict[str, Columns] = {}
        """where each tensor lies in a row"""
        self._shares: dict[str, Shard] = {}
        self._keep("lane", dtype=torch.float32, feature="weighted")

    def bind(self, rows: Rows, layer: int | None) -> None:
        """Let the tensors be columns of a layer's part of the rows."""
        self.rows, self.layer = rows, layer

    def has(self, name: str) -> bool:
        """Whether there is that tensor: some serve a feature, which there must be room for."""
        return name in self.columns

    def tensor(self, name: str) -> Tensor:
        """One of the tensors in every slot: [S, *shape]."""
        return self.rows.tensor(self.layer, self.columns[name])

    def fill(self, row: Tensor, numbers: GroupEdits, scope_row: int) -> None:
        """Write several edits at once into a row [1, bytes] of zeros. Ranks that they do not use stay zero."""
        for name, values in {**self._values(numbers), "lane": scope_row}.items():
            if self.has(name):
                columns, source = self.columns[name], torch.as_tensor(values)
                target = columns.of(row.view(columns.dtype))[0]
                if name in self._shares:
                    source = self._shares[name].of(source)
                (target[: len(source)] if source.ndim else target).copy_(source)

    def forward(self, x: Tensor, slots: Tensor, step: Step) -> Tensor:
        weight = self.weight(step, slots)
        added = self._added(x, slots, weight)
        return added if weight is None else added * weight

    def weight(self, step: Step, slots: Tensor) -> Tensor | None:
        """[T, 1]: how much the edits count for each token; None where they count wholly for all."""
        return step.weight(self.tensor("lane"), slots) if self.has("lane") else None

    def _added(self, x: Tensor, slots: Tensor, weight: Tensor | None) -> Tensor:
        """What the edits add at full strength."""
        raise NotImplementedError

    def _values(self, numbers: GroupEdits) -> dict[str, Any]:
        """What the tensors hold for several edits at once, in any type; what there are no columns for is left out."""
        raise NotImplementedError

    def _sums(self) -> dict[str, Any]:
        """How what is read becomes dot products, whole ones."""
        return {"total": self._shape.total, "products": self._shape.products}

    def _keep(
        self, name: str, *shape: int | Shard, dtype: torch.dtype | None = None, feature: str | None = None
    ) -> None:
        """Columns for a tensor, if there is room for the `feature` it serves.

        Of a tensor whose last dimension is a vector's, what the worker has no share in is not kept.
        """
        if feature is None or feature in self._shape.capacity.features:
            sizes = tuple(size.width if isinstance(size, Shard) else size for size in shape)
            self.columns[name] = self._layout.take(sizes, dtype or self._shape.dtype)
            if shape and isinstance(shape[-1], Shard):
                self._shares[name] = shape[-1]


class ScaleSlots(SlotTensors):
    """change: [S, writes] = factor - 1, in float32."""

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__(shape, layout)
        self._keep("change", shape.writes, dtype=torch.float32)

    def _added(self, x: Tensor, slots: Tensor, weight: Tensor | None) -> Tensor:
        return edit_math.scale(x, self.tensor("change"), slots)

    def _values(self, numbers: GroupEdits) -> dict[str, Any]:
        factor = torch.ones(self._shape.writes.whole, dtype=torch.float64)
        for _, fields in numbers:
            each = torch.as_tensor(fields["factor"], dtype=torch.float64)
            factor *= each.repeat_interleave(len(factor) // len(each))
        return {"change": (factor - 1).float()}


class LowRankSlots(SlotTensors):
    """read: [S, rank, reads], write: [S, rank, writes]."""

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__(shape, layout)
        self._keep("read", shape.capacity.rank, shape.reads)
        self._keep("write", shape.capacity.rank, shape.writes)

    def _added(self, x: Tensor, slots: Tensor, weight: Tensor | None) -> Tensor:
        return edit_math.low_rank(x, slots, read=self.tensor("read"), write=self.tensor("write"), **self._sums())

    def _values(self, numbers: GroupEdits) -> dict[str, Any]:
        return {field: _stacked(numbers, field) for field in ("read", "write")}


_COUNTED = torch.float64


class Carried:
    """Tensors that one module hands to a later one within a forward pass, by name; after it there are none.

    They are attributes. A compiled forward writes back what it changed of objects that outlive it, and a dictionary
    that is written back is for vLLM a changed buffer, which it refuses where CUDA graphs are captured. An attribute
    that is None before and None after costs one assignment.
    """

    def keep(self, name: str, value: Tensor) -> None:
        """Carry a tensor."""
        setattr(self, _attribute(name), value)

    def get(self, name: str) -> Tensor:
        """A tensor that was kept in this forward pass."""
        value: Tensor = getattr(self, _attribute(name))
        return value

    def drop(self, name: str) -> None:
        """Carry it no further."""
        setattr(self, _attribute(name), None)


def _attribute(name: str) -> str:
    return "of_" + name.replace(".", "_")


class FiringCounters(nn.Module):
    """How many tokens each neuron of every gate gave something for, by slot; no part of what a slot holds.

    Gates note what they gave while the model runs, and the last one has all of it added in one operation: one for each
    gate would be nine calls of torch more, at every gate. Counts are float64, exact far beyond what is ever counted:
    for int64 torch's compiler has no kernel on a GPU that adds, and sorts instead.
    """

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.neurons = 0
        self._columns: list[int] = []
        """the first of each gate"""
        self._noted = Carried()

    def take(self, rank: int) -> int:
        """The first of `rank` columns for the neurons of a gate."""
        column = self.neurons
        self._columns.append(column)
        self.neurons += rank
        return column

    def bind(self, slots: int, device: torch.device) -> None:
        """Make the counts [S, neurons], when every gate has its columns."""
        counts = torch.zeros(slots, self.neurons, dtype=_COUNTED, device=device)
        self.register_buffer("counts", counts, persistent=False)

    def note(self, column: int, fired: Tensor) -> None:
        """For which tokens the neurons from `column` on gave something: [T, rank] of bool."""
        self._noted.keep(f"column_{column}", fired)

    def add(self, slots: Tensor) -> None:
        """Count what was noted of tokens in these slots, [T]."""
        names = [f"column_{column}" for column in self._columns]
        noted = torch.cat([self._noted.get(name) for name in names], dim=-1)
        self.counts.index_add_(0, slots, noted.to(_COUNTED))
        for name in names:
            self._noted.drop(name)


class GateSlots(SlotTensors):
    """read: [S, rank, reads] in float32, write: [S, rank, writes]; bias, activation and threshold: [S, rank].

    With room for normalising gates also stretch and centre: [S, reads] in float32, normalise: [S].
    """

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__(shape, layout)
        rank = shape.capacity.rank
        self._keep("read", rank, shape.reads, dtype=torch.float32)
        self._keep("bias", rank, dtype=torch.float32)
        self._keep("write", rank, shape.writes)
        self._keep("activation", rank, dtype=torch.float32)
        self._keep("threshold", rank, dtype=torch.float32)
        self._keep("stretch", shape.reads, dtype=torch.float32, feature="normalise")
        self._keep("centre", shape.reads, dtype=torch.float32, feature="normalise")
        self._keep("normalise", dtype=torch.float32, feature="normalise")
        self.counters = rank * _COUNTED.itemsize
        self.firings: FiringCounters | None = None
        """what is told which neurons gave something"""
        self.column = 0

    def counted_by(self, firings: FiringCounters) -> None:
        """Have the firings of the neurons counted."""
        self.firings, self.column = firings, firings.take(self._shape.capacity.rank)

    def _added(self, x: Tensor, slots: Tensor, weight: Tensor | None) -> Tensor:
        shrink = None
        if self.has("normalise"):
            on_sphere = {name: self.tensor(name) for name in ("stretch", "centre", "normalise")}
            x, shrink = edit_math.centred(x, slots, **on_sphere, total=self._shape.total)
        neurons: Any = {name: self.tensor(name) for name in ("read", "bias", "write", "activation", "threshold")}
        added, fired = edit_math.gate(x, slots, **neurons, shrink=shrink, **self._sums())
        if self.firings is not None:
            self.firings.note(self.column, (fired if weight is None else fired * weight) != 0)
        return added

    def _values(self, numbers: GroupEdits) -> dict[str, Any]:
        gates = [(edit, fields) for edit, fields in numbers if isinstance(edit, Gate)]
        neurons = [edit for edit, _ in gates for _ in range(edit.rank)]
        values: dict[str, Any] = {
            **{field: _stacked(numbers, field) for field in ("read", "bias", "write")},
            "activation": torch.tensor([edit_math.ACTIVATION_CODES[edit.activation] for edit in neurons]),
            "threshold": torch.tensor([edit.threshold for edit in neurons]),
            "stretch": torch.ones(self._shape.reads.whole),
        }
        edit, fields = gates[0]
        if edit.normalise:  # the only one of its place
            weight, bias = (torch.as_tensor(fields[name], dtype=torch.float64) for name in ("norm_weight", "norm_bias"))
            stretch = 1 / (weight * self._shape.reads.whole**0.5)
            centre = bias * stretch + torch.as_tensor(fields["centroid"], dtype=torch.float64)
            values |= {"stretch": stretch.float(), "centre": centre.float(), "normalise": torch.tensor(True)}
        return values


class SubspaceFilterSlots(SlotTensors):
    """read: [S, rank, writes], shift: [S, rank] in float32; write: [S, rank, writes] where it may differ from -read.

    With room for projections onto a subspace also drop: [S], constant: [S, writes], in float32.
    """

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__(shape, layout)
        rank = shape.capacity.rank
        self._keep("read", rank, shape.writes)
        self._keep("shift", rank, dtype=torch.float32)
        self._keep("write", rank, shape.writes, feature="dual")
        self._keep("drop", dtype=torch.float32, feature="onto")
        self._keep("constant", shape.writes, dtype=torch.float32, feature="onto")

    def _added(self, x: Tensor, slots: Tensor, weight: Tensor | None) -> Tensor:
        write = self.tensor("write") if self.has("write") else None
        added = edit_math.subspace_filter(
            x, slots, read=self.tensor("read"), write=write, shift=self.tensor("shift"), **self._sums()
        )
        if self.has("drop"):
            added = added + edit_math.pull(x, self.tensor("drop"), self.tensor("constant"), slots)
        return added

    def _values(self, numbers: GroupEdits) -> dict[str, Any]:
        folded = fold_filters([(edit, fields) for edit, fields in numbers if isinstance(edit, SubspaceFilter)])
        return {name: getattr(folded, name) for name in ("read", "shift", "write", "drop", "constant")}


class OffsetSlots(SlotTensors):
    """vector: [S, writes]; with room for norm-preserving ones also renorm: [S]."""

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__(shape, layout)
        self._keep("vector", shape.writes)
        self._keep("renorm", dtype=torch.float32, feature="renorm")

    def _added(self, x: Tensor, slots: Tensor, weight: Tensor | None) -> Tensor:
        return self.tensor("vector")[slots].float()

    def keeps_norm(self, slots: Tensor, step: Step) -> Tensor | None:
        """[T, 1]: the tokens whose norm is to be restored; None where nobody's is."""
        if not self.has("renorm"):
            return None
        asked, weight = self.tensor("renorm")[slots].unsqueeze(-1) != 0, self.weight(step, slots)
        return asked if weight is None else asked & (weight != 0)

    def _values(self, numbers: GroupEdits) -> dict[str, Any]:
        return {
            "vector": sum(torch.as_tensor(fields["vector"]) for _, fields in numbers),
            "renorm": any(isinstance(edit, Offset) and edit.renorm for edit, _ in numbers),
        }


def _stacked(numbers: GroupEdits, field: str) -> Tensor:
    return torch.cat([torch.as_tensor(fields[field]) for _, fields in numbers])


SLOT_TENSORS: dict[str, type[SlotTensors]] = {
    "scale": ScaleSlots,
    "low_rank": LowRankSlots,
    "gate": GateSlots,
    "subspace_filter": SubspaceFilterSlots,
    "offset": OffsetSlots,
}


class Step(nn.Module):
    """What every site reads of the coming step: each token's slot, [T], and its weight in each lane, [T, lanes]."""

    slots: Tensor
    weights: Tensor

    def __init__(self, max_tokens: int, scope_rows: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("slots", torch.zeros(max_tokens, dtype=torch.int32, device=device), persistent=False)
        weights = torch.ones(max_tokens, scope_rows, dtype=torch.float32, device=device)
        self.register_buffer("weights", weights, persistent=False)

    def weight(self, scope_row: Tensor, slots: Tensor) -> Tensor:
        """[T, 1]: each token's weight in the lane of its slot's edit."""
        # One flat index: a gather would compare lengths, and so fix the graph to one number of tokens.
        tokens = torch.arange(slots.shape[0], device=slots.device)
        return self.weights.flatten()[tokens * self.weights.shape[1] + scope_row[slots].long()].unsqueeze(-1)


class SiteEdits(nn.Module):
    """All edits of one site, in the order that `vllm_edits.edit_store.edits` lays down."""

    def __init__(self, step: Step, width: int, carried: Carried, total: AllReduce = identity) -> None:
        """width: of the worker's share of the vector; total: how sums over the vector become whole."""
        super().__init__()
        self.step = step
        self.width = width
        self.total = total
        self.carries_as: str | None = None
        """the name under which later taps of the layer find this site's vector, if any of them reads it"""
        self._carried = carried
        self.scales, self.adds, self.filters, self.offsets = (nn.ModuleList() for _ in range(4))
        self.sources: list[str | None] = []
        """what each of `adds` reads: another site's name, or None for this one"""
        self.forgets: list[str] = []
        """names that nobody reads after this tap"""
        self.adds_up: FiringCounters | None = None
        """what counts the gates, where none of them comes after this tap"""

    def add(self, kind: str, slots: SlotTensors, source: str | None) -> None:
        """Attach the slot tensors of one place."""
        if kind in ("low_rank", "gate"):
            self.adds.append(slots)
            self.sources.append(source)
        else:
            {"scale": self.scales, "subspace_filter": self.filters, "offset": self.offsets}[kind].append(slots)

    @property
    def edits(self) -> bool:
        """Whether anything is edited here, or the vector only read."""
        return any(len(each) for each in (self.scales, self.adds, self.filters, self.offsets))

    def forward(self, value: Tensor) -> Tensor:
        """What the edits add to `value` [T, width], in float32."""
        value = value.float()
        step, slots = self.step, self.step.slots[: value.shape[0]]
        added = torch.zeros_like(value)
        for scale in self.scales:
            added = added + scale(value, slots, step)
        now = value + added
        for adding, source in zip(self.adds, self.sources, strict=True):
            added = added + adding(now if source is None else self._carried.get(source), slots, step)
        if self.adds_up is not None:
            self.adds_up.add(slots)
        for source in self.forgets:
            self._carried.drop(source)
        for filtering in self.filters:
            added = added + filtering(value + added, slots, step)
        return added + self._moved(value + added, slots) if len(self.offsets) else added

    def _moved(self, value: Tensor, slots: Tensor) -> Tensor:
        """What all offsets together add; the norm is restored once, after them."""
        moved, keeps = torch.zeros_like(value), None
        moving: Any
        for moving in self.offsets:
            moved = moved + moving(value, slots, self.step)
            asked = moving.keeps_norm(slots, self.step)
            if asked is not None:
                keeps = asked if keeps is None else keeps | asked
        return moved if keeps is None else edit_math.renormed(value, moved, keeps, self.total)

    def keep(self, value: Tensor) -> None:
        """Let later taps of the layer read this site's vector."""
        if self.carries_as is not None:
            self._carried.keep(self.carries_as, value)

    def supply(self, value: Tensor) -> None:
        """Give this tap the vector that its edits read elsewhere, where no tap before it could keep it."""
        for source in self.forgets:
            self._carried.keep(source, value)

    def edited(self, tensor: Tensor, start: int | None) -> Tensor:
        """A module's input or output, or the part of it from `start` on that is this site, after the edits."""
        whole = tensor if start is None else tensor[..., start : start + self.width]
        value = whole.reshape(-1, self.width)
        if self.edits:
            value = (value.float() + self(value)).to(tensor.dtype)
        self.keep(value)
        if not self.edits:
            return tensor
        part: Tensor = value.reshape(whole.shape)
        if start is None:
            return part
        return torch.cat([tensor[..., :start], part, tensor[..., start + self.width :]], dim=-1)

    def edited_stream(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """One half of the residual stream, so changed that the sum of both halves is the edited stream."""
        edited: Tensor = hidden.float() + self(hidden.float() + residual.float())
        return edited.to(hidden.dtype)


class ModuleEdits(nn.Module):
    """The taps around one module: on its input, and on its output or parts of it."""

    def __init__(self, argument: str, position: int) -> None:
        super().__init__()
        self.argument, self.position = argument, position
        """name and place of the input among the forward's arguments"""
        self.before: SiteEdits | None = None
        self.within: SiteEdits | None = None
        """on what this worker adds to an output that is the sum of what all workers give"""
        self.sum: AllReduce = identity
        """what then makes that sum, in the module's place"""
        self.after = nn.ModuleList()
        self.starts: list[int | None] = []

    def edited_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the module's forward, its input edited."""
        if self.before is None:
            return args, kwargs
        if self.argument in kwargs:
            return args, {**kwargs, self.argument: self.before.edited(kwargs[self.argument], None)}
        value = self.before.edited(args[self.position], None)
        return (*args[: self.position], value, *args[self.position + 1 :]), kwargs

    def edited_output(self, output: Any, *, stream: bool) -> Any:
        """What the module's forward gave, edited; of the two halves of a residual stream, one is."""
        if not isinstance(output, tuple):
            return self._edited_parts(output)
        first, *rest = output
        if stream and isinstance(rest[0], Tensor):
            for site_edits, _ in self._outputs():
                first = site_edits.edited_stream(first, rest[0])
            return first, *rest
        return self._edited_parts(first), *rest

    def _edited_parts(self, output: Tensor) -> Tensor:
        if self.within is not None:
            output = self.sum(self.within.edited(output, None))
        for site_edits, start in self._outputs():
            output = site_edits.edited(output, start)
        return output

    def _outputs(self) -> Iterator[tuple[Any, int | None]]:
        return zip(self.after, self.starts, strict=True)


class LogitsEdits(nn.Module):
    """The tap on the logits, which are computed outside the graph and for some tokens only; `rows` says for which."""

    def __init__(
        self, site_edits: SiteEdits, step: Step, rows: Callable[[Tensor], Tensor | None], argument: str, position: int
    ) -> None:
        """argument, position: name and place of the hidden states among the arguments of what computes logits."""
        super().__init__()
        self.argument, self.position = argument, position
        self.site_edits = site_edits
        self._whole_step = step
        self._rows = rows

    def edited(self, logits: Tensor | None, hidden: Tensor) -> Tensor | None:
        """The logits of the tokens whose hidden states are `hidden`, edited."""
        rows = self._rows(hidden)
        if logits is None or rows is None:
            return logits
        self.site_edits.step.slots = self._whole_step.slots[rows]
        self.site_edits.step.weights = self._whole_step.weights[rows]
        self.site_edits.supply(hidden)
        return self.site_edits.edited(logits, None)


@functools.cache
def edited_logits(cls: type[Any]) -> type[nn.Module]:
    """A subclass of what computes logits, whose logits are edited."""

    class EditedLogits(cls):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            named = self.edits.argument in kwargs
            hidden = kwargs[self.edits.argument] if named else args[self.edits.position]
            return self.edits.edited(super().forward(*args, **kwargs), hidden)

    return EditedLogits


@functools.cache
def edited_class(cls: type[Any], *, stream: bool) -> type[nn.Module]:
    """A subclass of a module's class with edits around its forward; `stream`: of a decoder layer."""

    class Edited(cls):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.edits.edited_input(args, kwargs)
            return self.edits.edited_output(super().forward(*args, **kwargs), stream=stream)

    Edited.__name__ = Edited.__qualname__ = f"Edited{cls.__name__}"
    return Edited
