"""Subspace filters of a transformers model: x <- x - P (x - mean), or  x <- mean + P (x - mean)."""

from __future__ import annotations

from torch import Tensor

from vllm_edits.edit_store.authoring.formulas import Numbers, register
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter


def _added(edit: SubspaceFilter, numbers: Numbers, x: Tensor, _: Tensor) -> Tensor:
    inside = ((x - numbers["mean"]) @ numbers["basis"].T) @ numbers.get("dual", numbers["basis"])
    filtered = numbers["mean"] + inside if edit.onto else x - inside
    return filtered - x


register(SubspaceFilter, _added)
