"""The name of one base model, as a bundle carries it. Pure; `base_model.py` reads it off a checkpoint."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from vllm_edits.edit_store.canonical import Digest
from vllm_edits.edit_store.sites import Widths


class BaseModelRef(BaseModel):
    """The one model a bundle was made for. Its identity is the digests of its files, never its name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    architecture: str
    widths: Widths
    biased: tuple[str, ...] = ()
    """points where the model's own projection adds a bias"""
    files: dict[str, Digest] = Field(min_length=1)
