"""Gates, in slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_edits.edit_store.edits import EditsWithNumbers
from vllm_edits.edit_store.kinds.gate import Gate
from vllm_edits.plugin.graph.kinds import register
from vllm_edits.plugin.graph.slot_products import EXPRESSIONS, SlotProducts
from vllm_edits.plugin.graph.slot_rows import Layout
from vllm_edits.plugin.graph.slot_tensors import Shape, SlotTensors, stacked
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, identity

ACTIVATION_CODES = {"relu": 0, "jump_relu": 1, "step": 2, "silu": 3, "sigmoid": 4}
"""Code of each activation in a slot."""


class GateSlots(SlotTensors):
    """read: [S, rank, reads] in float32, write: [S, rank, writes]; bias, activation and threshold: [S, rank].

    With capacity for normalising gates also stretch and centre: [S, reads] in float32, normalise: [S].
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
        self.neurons = rank

    def _added(self, x: Tensor, slots: Tensor, token_scale: Tensor | None) -> Tensor:
        shrink = None
        if self.has("normalise"):
            on_sphere = {name: self.tensor(name) for name in ("stretch", "centre", "normalise")}
            x, shrink = centred(x, slots, **on_sphere, total=self._shape.total)
        neurons: Any = {name: self.tensor(name) for name in ("read", "bias", "write", "activation", "threshold")}
        added, fired = gate(x, slots, **neurons, shrink=shrink, **self._sums())
        self._note(fired, token_scale)
        return added

    def _values(self, numbers: EditsWithNumbers) -> dict[str, Any]:
        gates = [(edit, fields) for edit, fields in numbers if isinstance(edit, Gate)]
        neurons = [edit for edit, _ in gates for _ in range(edit.rank)]
        values: dict[str, Any] = {
            **{field: stacked(numbers, field) for field in ("read", "bias", "write")},
            "activation": torch.tensor([ACTIVATION_CODES[edit.activation] for edit in neurons]),
            "threshold": torch.tensor([edit.threshold for edit in neurons]),
            "stretch": torch.ones(self._shape.reads.whole),
        }
        edit, fields = gates[0]
        if edit.normalise:  # the only one of its group
            weight, bias = (torch.as_tensor(fields[name], dtype=torch.float64) for name in ("norm_weight", "norm_bias"))
            stretch = 1 / (weight * self._shape.reads.whole**0.5)
            centre = bias * stretch + torch.as_tensor(fields["centroid"], dtype=torch.float64)
            values |= {"stretch": stretch.float(), "centre": centre.float(), "normalise": torch.tensor(True)}
        return values


def gate(
    x: Tensor, slots: Tensor, *, read: Tensor, bias: Tensor, write: Tensor, activation: Tensor, threshold: Tensor,
    shrink: Tensor | None = None, total: AllReduce = identity, products: SlotProducts = EXPRESSIONS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sum_k write[s, k] sigma_sk(read[s, k] . x[t] shrink[t] + bias[s, k]), and each neuron's activation, [T, K].

    x: [T, I], read: [S, K, I], write: [S, K, O], bias, activation (a code) and threshold: [S, K], shrink: [T, 1]
    """
    along = total(products.dots(x, read, slots))
    z = (along if shrink is None else along * shrink) + bias[slots]
    code, positive = activation[slots], z > threshold[slots]
    fired = torch.relu(z)
    for name, form in _ACTIVATIONS.items():
        fired = torch.where(code == ACTIVATION_CODES[name], form(z, positive), fired)
    return products.combine(fired, write, slots), fired


_ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "jump_relu": lambda z, positive: torch.where(positive, z, 0.0),
    "step": lambda _, positive: positive.float(),
    "silu": lambda z, _: torch.nn.functional.silu(z),
    "sigmoid": lambda z, _: torch.sigmoid(z),
}


def centred(
    x: Tensor, slots: Tensor, *, stretch: Tensor, centre: Tensor, normalise: Tensor, total: AllReduce = identity
) -> tuple[Tensor, Tensor]:
    """y[t] = x[t] * stretch[s] - centre[s], and the factor of its dot products: 1 / |y[t]| where normalise[s], else 1.

    So one pass over the vector sums up both the length and the dot products.

    x, y: [T, I], stretch, centre: [S, I], normalise, 0 or 1: [S], the second result: [T, 1]
    """
    y = x * stretch[slots] - centre[slots]
    shrink = torch.rsqrt(total((y * y).sum(-1, keepdim=True)))
    return y, torch.where(normalise[slots].unsqueeze(-1) != 0, shrink, 1.0)


register(Gate, GateSlots)
