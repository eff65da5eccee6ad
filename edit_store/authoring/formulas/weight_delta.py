"""Weight deltas of a transformers model: y += delta x."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.formulas import Numbers, register
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta


def _added(edit: WeightDelta, numbers: Numbers, x: Tensor, y: Tensor) -> Tensor:
    if edit.layout == "dense":
        return x @ numbers["delta"].T
    parts = x[..., numbers["columns"]] * numbers["values"]
    return torch.zeros_like(y).index_add(-1, numbers["rows"], parts)


register(WeightDelta, _added)
