"""The base of all records that are read from files: frozen, and without unknown fields."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenRecord(BaseModel):
    """A record whose fields never change. An unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
