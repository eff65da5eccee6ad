"""Shared parts of commands that ask a running server: address, API key, and the error without an answer."""

from __future__ import annotations

from typing import Annotated

import httpx
import typer

from vllm_edits.edit_store.errors import EditsError

DEFAULT_URL = "http://127.0.0.1:8000"
UrlOption = Annotated[str, typer.Option("--url", help="Address of the server.")]
ApiKeyOption = Annotated[
    str, typer.Option("--api-key", envvar="VLLM_API_KEY", help="API key of the server, if it needs one.")
]


def authorization(api_key: str) -> dict[str, str]:
    """The header with the API key. Empty without a key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def no_answer(url: str, error: httpx.HTTPError) -> EditsError:
    """The error to raise if the server does not answer."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return EditsError(
            f"no answer from {url}: {error}. Set SSL_CERT_FILE to the certificate of the authority that signed it"
        )
    return EditsError(f"no answer from {url}: {error}. Check that the server runs, or name its address with --url")
