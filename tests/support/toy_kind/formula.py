"""The formula of a kind that the product does not have, for hooks on a transformers model. The second of its files."""

from __future__ import annotations

from torch import Tensor

from tests.support.toy_kind.store import Clamp
from vllm_edits.edit_store.authoring.formulas import Numbers, register


def _added(_: Clamp, numbers: Numbers, x: Tensor, __: Tensor) -> Tensor:
    return x.clamp(-numbers["bound"], numbers["bound"]) - x


def add() -> None:
    register(Clamp, _added)
