"""The admin token for changes over HTTP. Its file is read at each request, so it can be replaced."""

from __future__ import annotations

import hmac
from pathlib import Path

from vllm_edits.edit_store.errors import EditsError, SettingsError


class TokenUnreadable(EditsError):
    """The file of the admin token cannot be read now."""


def check(file: str | None) -> None:
    """SettingsError if a file is set, but contains no token."""
    if file is not None:
        try:
            read(file)
        except TokenUnreadable as error:
            raise SettingsError(f"edits.admin_token_file: {error}") from error


def matches(file: str, sent: str) -> bool:
    """True if the header's value is the token. TokenUnreadable if the token cannot be read.

    sent: the header's value, decoded as Latin-1, as Starlette does
    """
    return hmac.compare_digest(sent.encode("latin-1"), read(file))


def read(file: str) -> bytes:
    """The bytes of the file's only line, without surrounding spaces and line ends. TokenUnreadable if there is none."""
    try:
        token = Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    except OSError as error:
        raise TokenUnreadable(f"{file} cannot be read: {error.strerror}. Write the token into that file") from error
    if not token:
        raise TokenUnreadable(f"{file} is empty. Write the token into it")
    if any(byte < 0x20 or byte == 0x7F for byte in token):
        raise TokenUnreadable(f"expected one line of text in {file}, found several lines or control characters")
    return token
