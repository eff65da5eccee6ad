"""The base of all records that are read from files: frozen, and without unknown fields."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_edits.edit_store.errors import Reason


class FrozenRecord(BaseModel):
    """A record whose fields never change. An unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def field_reasons(error: ValidationError) -> Iterator[Reason]:
    """A reason for every field of a record that is wrong."""
    for each in error.errors():
        yield Reason("field", f"{'.'.join(map(str, each['loc']))}: {each['msg']}")
