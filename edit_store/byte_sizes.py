"""Sizes in bytes, written for people: parsing and formatting."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError

from vllm_edits.edit_store.errors import SettingsError


def bytes_of(text: str) -> int:
    """Parse a size such as 8GiB or 500MB. SettingsError if it is not a size."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise SettingsError(f"{text!r} is not a size: expected a number with a unit, e.g. 8GiB or 500MB") from None


def sized(size: int) -> str:
    """Format a size for people, in the units of vLLM's log."""
    for unit, bytes_ in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= bytes_:
            return f"{size / bytes_:.1f} {unit}"
    return f"{size} bytes"
