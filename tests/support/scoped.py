"""Edits of every scope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.proofs.parity import random_numbers
from tests.support.bundles import bundle_of
from vllm_edits.edit_store import BaseModelRef, Bundle, LowRank, Offset, Scope
from vllm_edits.edit_store.authoring.host import Edits

SCOPES = {
    "whole": Scope(),
    "generated": Scope(segment="generated"),
    "prompt": Scope(segment="prompt"),
    "first": Scope(first=3),
    "last": Scope(last=2),
    "tokens": Scope(tokens=(198, 253, 260, 338, 339)),
}


def numbered(edits: list[Any], base: Any, size: float = 1.0) -> Edits:
    return [(edit, random_numbers(edit, base, seed, 0.3 * size)) for seed, edit in enumerate(edits)]


def scoped(scopes: Mapping[str, Scope], base: BaseModelRef) -> list[Bundle]:
    """A variant for each scope, by name: all of its edits are for that scope."""
    return [
        bundle_of(name, base, numbered([Offset(site="layers.1.resid", scope=scope),
                                        LowRank(site="layers.2.mlp.out", reads="layers.2.mlp.h", rank=2, scope=scope)],
                                       base))
        for name, scope in scopes.items()
    ]  # fmt: skip
