"""Who asks: what of a request may decide which arm of an experiment it gets. Nothing of its prompt is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_edits.plugin.experiments.records import Source

ARM_HEADER = "x-edits-arm"
"""A request that says itself which arm it wants: gateways, flag systems, a tester."""
PREFIX = "x-"
"""Headers that may name a unit begin so."""
_SECRET = {"x-api-key", "x-edits-admin-token"}


@dataclass(frozen=True)
class Unit:
    """What stays in one arm. One that is a request is in an arm by itself: the next one may be in another."""

    value: str
    source: Source

    @property
    def hash(self) -> str:
        """What is written down in its place."""
        return hashlib.sha256(self.value.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class EvaluationContext:
    """One request, as far as experiments look at it."""

    headers: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    """the field `user` of OpenAI's requests"""
    key: str = ""
    """sha256 of the API key"""
    request: str = ""
    """the request's own id"""
    arm_given: str = ""
    """the arm that an operator's resolver gives it"""
    serves: str = ""
    """what it is to be served by, whatever experiments say: of requests that the server makes itself"""

    @classmethod
    def of(cls, headers: list[tuple[bytes, bytes]], user: str, request: str) -> EvaluationContext:
        """Of ASGI's headers, of which only those that may matter are kept."""
        told: dict[str, str] = {}
        for name, value in headers:  # of equal ones the first counts, as in vLLM's check of the key
            told.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        scheme, _, sent = told.get("authorization", "").partition(" ")
        key = (sent if scheme.lower() == "bearer" else "") or told.get("x-api-key", "")
        kept = {name: value for name, value in told.items() if name.startswith(PREFIX) and name not in _SECRET}
        return cls(kept, user, hashlib.sha256(key.encode()).hexdigest() if key else "", request)

    @property
    def arm(self) -> str:
        """The arm that it asks for itself, or was given by a resolver, or ''."""
        return self.headers.get(ARM_HEADER, "") or self.arm_given

    def unit(self, header: str) -> Unit:
        """The unit: that header's value, else the user, else the API key's hash, else the request itself."""
        if value := self.headers.get(header):
            return Unit(value, "header")
        if self.user:
            return Unit(self.user, "user")
        return Unit(self.key, "key") if self.key else Unit(self.request, "request")


NO_CONTEXT = EvaluationContext()
"""Of what asks within the server."""
