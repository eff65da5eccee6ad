"""Offsets of a transformers model: x += vector, then x gets back its norm if one of them asks for that."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.formulas import Numbers, register
from vllm_edits.edit_store.kinds.offset import Offset


def _added(_: Offset, numbers: Numbers, __: Tensor, ___: Tensor) -> Tensor:
    return numbers["vector"]


def _settled(edits: Sequence[tuple[Offset, Tensor]], before: Tensor, now: Tensor) -> Tensor:
    """Give x its norm from before all offsets, at tokens where an offset that asks for that counts."""
    asked = functools.reduce(operator.or_, (edit.renorm & (scale != 0) for edit, scale in edits))
    kept = now * before.norm(dim=-1, keepdim=True) / now.norm(dim=-1, keepdim=True)
    return torch.where(asked, kept, now)


register(Offset, _added, _settled)
