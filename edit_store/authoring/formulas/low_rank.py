"""Low-rank updates of a transformers model: y += sum_r write[r] (read[r] . x)."""

from __future__ import annotations

from torch import Tensor

from vllm_edits.edit_store.authoring.formulas import Numbers, register
from vllm_edits.edit_store.kinds.low_rank import LowRank


def _added(_: LowRank, numbers: Numbers, x: Tensor, __: Tensor) -> Tensor:
    return (x @ numbers["read"].T) @ numbers["write"]


register(LowRank, _added)
