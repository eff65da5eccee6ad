"""A version, as a reservation sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_edits.edit_store import Strength


@dataclass
class Version:
    """What a version asks of a server."""

    edits: Sequence[Any]
    strength: Strength | None = None
