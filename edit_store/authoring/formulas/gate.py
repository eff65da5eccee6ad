"""Gates of a transformers model: y += sum_r write[r] sigma(read[r] . phi(x) + bias[r])."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.formulas import Numbers, register
from vllm_edits.edit_store.kinds.gate import Gate

_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, _: torch.relu(z),
    "jump_relu": lambda z, threshold: z * (z > threshold),
    "step": lambda z, threshold: (z > threshold).to(z.dtype),
    "silu": lambda z, _: torch.nn.functional.silu(z),
    "sigmoid": lambda z, _: torch.sigmoid(z),
}


def _added(edit: Gate, numbers: Numbers, x: Tensor, _: Tensor) -> Tensor:
    if edit.normalise:
        on_sphere = (x - numbers["norm_bias"]) / numbers["norm_weight"] / x.shape[-1] ** 0.5 - numbers["centroid"]
        x = on_sphere / on_sphere.norm(dim=-1, keepdim=True)
    z = x @ numbers["read"].T + numbers["bias"]
    return _ACTIVATIONS[edit.activation](z, edit.threshold) @ numbers["write"]


register(Gate, _added)
