"""Scales of a transformers model: y += (factor - 1) x."""

from __future__ import annotations

from torch import Tensor

from vllm_edits.edit_store.authoring.formulas import Numbers, register
from vllm_edits.edit_store.kinds.scale import Scale


def _added(_: Scale, numbers: Numbers, x: Tensor, __: Tensor) -> Tensor:
    factor = numbers["factor"].repeat_interleave(x.shape[-1] // len(numbers["factor"]))
    return (factor - 1) * x


register(Scale, _added)
