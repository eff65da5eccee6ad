"""Every kind of edit as a formula in torch, for hooks on a transformers model: a module for each.

A module ends in `register`. Modules in this folder are found without a list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vllm_edits.edit_store.edits import Edit
from vllm_edits.edit_store.registry import Registry, import_modules

Numbers = Mapping[str, Tensor]
"""An edit's numbers by tensor field, in the type that is computed in."""
Added = Callable[[Any, Numbers, Tensor, Tensor], Tensor]
"""Vector that an edit with these numbers adds at full strength to `y` [..., width], having read `x` [..., in]."""
Settled = Callable[[Sequence[tuple[Any, Tensor]], Tensor, Tensor], Tensor]
"""Vector of a site when all edits of a kind are added: given these edits, each with its factor for each token, the
vector before them, and the one after them."""


@dataclass(frozen=True)
class Formula:
    """Computation of a kind of edit."""

    added: Added
    settled: Settled


FORMULAS: Registry[Formula] = Registry("formula of kind")
"""By the name of the kind."""


def register(kind: type[Edit], added: Added, settled: Settled = lambda _edits, _before, now: now) -> None:
    """Make a kind's formula known. ValueError when it has another one."""
    FORMULAS.add(kind.name(), Formula(added, settled))


import_modules(__name__, __path__)
