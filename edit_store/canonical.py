"""What is spelled, hashed and dated alike everywhere: canonical JSON (RFC 8785), sha256 in hexadecimal, UTC seconds."""

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
    """RFC 8785 bytes of a JSON value: one value has one spelling, so one digest."""
    return rfc8785.dumps(value)


def now() -> datetime:
    """This moment, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)
