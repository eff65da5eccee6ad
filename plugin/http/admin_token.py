"""The token that changes over HTTP need, read from its file at each request, so it can be exchanged any time."""

from __future__ import annotations

import hmac
from pathlib import Path

from vllm_edits.edit_store.errors import EditsError, SettingsError


class TokenUnreadable(EditsError):
    """The file of the admin token cannot be used now."""


def check(file: str | None) -> None:
    """SettingsError unless there is a token in the file, or no file is set."""
    if file is not None:
        try:
            _token(file)
        except TokenUnreadable as error:
            raise SettingsError(f"edits.admin_token_file: {error}") from error


def matches(file: str, sent: str) -> bool:
    """Whether the header's value is the token. TokenUnreadable while there is none to compare it with.

    sent: as Starlette decodes headers, by Latin-1
    """
    return hmac.compare_digest(sent.encode("latin-1"), _token(file))


def _token(file: str) -> bytes:
    """The bytes of a file's one line, without the spaces and line end around them."""
    try:
        token = Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    except OSError as error:
        raise TokenUnreadable(f"{file} cannot be read: {error.strerror}. Write the token into that file") from error
    if not token:
        raise TokenUnreadable(f"{file} is empty. Write the token into it")
    if any(byte < 0x20 or byte == 0x7F for byte in token):
        raise TokenUnreadable(f"expected one line of text in {file}, found several lines or control characters")
    return token
