"""Calls that change a running server, or cost it something: they send the admin token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin import headers
from vllm_edits.plugin.cli_client import answered
from vllm_edits.plugin.http import admin_token

TokenFileOption = Annotated[Path | None, typer.Option("--admin-token-file", help="File with the server's admin token.")]


def changed(address: str, sent: dict[str, str], token_file: Path | None, body: Any = None) -> Any:
    """The answer of a POST with the token of a file. EditsError if the server refuses it."""
    token = {} if token_file is None else {headers.ADMIN_TOKEN: admin_token.read(str(token_file))}
    try:
        return answered("POST", address, {**sent, **token}, body)
    except EditsError as error:
        if token_file is not None or headers.ADMIN_TOKEN not in str(error):
            raise
        raise EditsError(f"{error}. Give the file with the token as --admin-token-file") from None
