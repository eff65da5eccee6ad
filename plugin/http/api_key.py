"""Who may name an edited variant where vLLM asks for no API key.

vLLM's own --api-key guards paths that begin with /v1 and a few others. /invocations, /tokenize and what else lies
outside would bring a variant to the device for any caller. So where keys are set, a caller without one gets the base
model there, as from vLLM, and nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.request import Headers, first


class KeyMissing(EditsError):
    """A request without an API key names something other than the base model."""


class ApiKeys:
    """The keys a server was started with; without any, every caller may name a variant."""

    def __init__(self, keys: Iterable[str], base_names: Iterable[str]) -> None:
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._base_names = {"", *base_names}

    def sent(self, headers: Headers) -> bool:
        """Whether a key came with a request, as `Authorization: Bearer KEY`."""
        if not self._keys:
            return True
        scheme, _, key = first(headers, b"authorization").partition(" ")
        found = hashlib.sha256(key.encode()).digest() if scheme.lower() == "bearer" else b""
        return any([hmac.compare_digest(found, key) for key in self._keys])  # noqa: C419  each is compared, always

    def require_base(self, model: str) -> None:
        """KeyMissing unless `model` is the base model, which is all that may be asked for without a key."""
        if model not in self._base_names:
            raise KeyMissing(
                f"without an API key this path serves only the base model, found `{model}`. Send the key as "
                "Authorization: Bearer …"
            )
