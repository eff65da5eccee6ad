"""Every kind of edit, a module for each: all of it that needs neither torch nor a server.

A module defines a subclass of `edits.Edit` and ends in `register`. Modules in this folder are found without a list. The
computation in torch is in two modules of the same name: for a transformers model in `authoring/formulas/`, for the
tokens of a batch in `plugin/graph/kinds/`. A package outside this one that brings a kind calls the three `register`
functions, in every process.
"""

from __future__ import annotations

import functools
import operator
from typing import Annotated, Any

from pydantic import Field, PlainValidator, SerializeAsAny, TypeAdapter

from vllm_edits.edit_store.edits import Edit
from vllm_edits.edit_store.registry import Registry, import_modules

KINDS: Registry[type[Edit]] = Registry("kind of edit", key=lambda kind: kind.order)
"""Kinds by name, in the order in which they apply at one site."""


SCALED = "scaled"
"""Feature of a reservation: edits of any kind with a scope, or with a strength that requests choose."""


def register(kind: type[Edit]) -> None:
    """Make a kind of edit known. TypeError when it has no name of its own, ValueError when another one has that."""
    KINDS.add(kind.name(), kind)


def served_per_request() -> tuple[str, ...]:
    """Names of the kinds that a server applies per request, in the order in which they apply at one site."""
    return tuple(name for name, kind in KINDS.items() if not kind.only_in_weights)


def feature_names() -> tuple[str, ...]:
    """Names of the features that a server may reserve beside a rank."""
    return tuple(sorted({SCALED, *(feature for kind in KINDS.values() for feature in kind.features)}))


def _validated(value: object) -> Edit:
    # Those that are only for weights come last.
    return _union(tuple(sorted(KINDS.values(), key=lambda kind: bool(kind.only_in_weights)))).validate_python(value)


@functools.cache
def _union(kinds: tuple[type[Edit], ...]) -> TypeAdapter[Edit]:
    """The class of a record, by its field `kind`."""
    any_kind: Any = functools.reduce(operator.or_, kinds)
    return TypeAdapter(Annotated[any_kind, Field(discriminator="kind")])


AnyEdit = Annotated[Edit, PlainValidator(_validated), SerializeAsAny()]
"""An edit of any kind that is registered when a record is read."""

import_modules(__name__, __path__)
