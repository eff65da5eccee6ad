"""Canonical JSON (RFC 8785), hexadecimal sha256 digests and UTC times in seconds, the same everywhere."""

from __future__ import annotations

import hashlib
import mmap
from datetime import UTC, datetime
from typing import Annotated, Any

import rfc8785
from pydantic import Field

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def sha256(data: bytes | mmap.mmap) -> str:
    """Hex digest of `data`."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The RFC 8785 bytes of a JSON value. Equal values have equal bytes, and so equal digests."""
    return rfc8785.dumps(value)


def now() -> datetime:
    """The present time in UTC, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)
