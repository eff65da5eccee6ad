"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError

from vllm_edits.edit_store.errors import SettingsError


def bytes_of(text: str) -> int:
    """A size that somebody wrote, such as 8GiB or 500MB."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise SettingsError(f"{text!r} is not a size: expected a number with a unit, e.g. 8GiB or 500MB") from None


def sized(size: int) -> str:
    """A size for people, in the units that vLLM's log uses."""
    for unit, bytes_ in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= bytes_:
            return f"{size / bytes_:.1f} {unit}"
    return f"{size} bytes"
