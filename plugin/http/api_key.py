"""Restricts callers without an API key to the base model, on paths where vLLM asks for no key.

vLLM's own --api-key guards paths that begin with /v1 and a few others. On other paths, such as /invocations and
/tokenize, any caller could page in a variant. So if keys are set, a caller without a key gets only the base model
there.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.request import Headers, first


class KeyMissing(EditsError):
    """A request without an API key names another model than the base model."""


class ApiKeys:
    """The API keys of the server. Without any key, every caller may name a variant."""

    def __init__(self, keys: Iterable[str], base_names: Iterable[str]) -> None:
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._base_names = {"", *base_names}

    def sent(self, headers: Headers) -> bool:
        """True if the request has a valid key, as `Authorization: Bearer KEY`, or if the server has no keys."""
        if not self._keys:
            return True
        scheme, _, key = first(headers, b"authorization").partition(" ")
        found = hashlib.sha256(key.encode()).digest() if scheme.lower() == "bearer" else b""
        return any([hmac.compare_digest(found, key) for key in self._keys])  # noqa: C419  all keys are compared, in constant time

    def require_base(self, model: str) -> None:
        """KeyMissing unless `model` is the base model, the only model for requests without a key."""
        if model not in self._base_names:
            raise KeyMissing(
                f"without an API key this path serves only the base model, found `{model}`. Send the key as "
                "Authorization: Bearer …"
            )
