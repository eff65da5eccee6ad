"""Shared parts of commands that ask a running server: address, API key, its answer, and the error without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

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


def no_answer(url: str, error: httpx.HTTPError | httpx.InvalidURL) -> EditsError:
    """The error to raise if the server does not answer."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return EditsError(
            f"no answer from {url}: {error}. Set SSL_CERT_FILE to the certificate of the authority that signed it"
        )
    return EditsError(f"no answer from {url}: {error}. Check that the server runs, or name its address with --url")


def answered(
    method: str, address: str, sent: Mapping[str, str | bytes], body: Any = None, *, seconds: float = 60
) -> dict[str, Any]:
    """The JSON with which a server answers. EditsError if it does not answer, or refuses; with its reason.

    address: with the path. sent: headers.
    """
    url = address.partition("/v1/")[0]
    try:
        headers = [
            (name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in sent.items()
        ]
        answer = httpx.request(method, address, headers=headers, json=body, timeout=seconds)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise no_answer(url, error) from None
    if not answer.is_success:
        raise EditsError(f"{address} answered {answer.status_code}: {reason_of(answer)}")
    try:
        found = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise EditsError(f"{address} answered something else than JSON. Check the address with --url")
    return found


def reason_of(answer: httpx.Response) -> str:
    """The reason in a refusal: FastAPI writes it as `detail`, vLLM as `error`."""
    try:
        told = answer.json()
        reason = told["error"] if "error" in told else told["detail"]
        if isinstance(reason, list):  # fields of the body that are not valid
            return "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in reason)
        return str(reason["message"] if isinstance(reason, dict) else reason)
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
