"""Reads a client's request from headers and body, once and in the same way as vLLM's handlers. Pure.

vLLM parses a body as Starlette does: with `json.loads`. It accepts UTF-8, UTF-16 and UTF-32, NaN, Infinity and half a
surrogate pair, uses the last of equal keys, and refuses too deep nesting. A stricter parser would find no model where
vLLM finds one. So a body that the fast parser refuses is parsed again in vLLM's way. No part of a prompt is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import pydantic

from vllm_edits.edit_store.errors import RequestRefused
from vllm_edits.plugin import headers as names

Headers = Sequence[tuple[bytes, bytes]]
"""Headers as in ASGI: names in lower case, in the order of the request."""
Source = Literal["header", "user", "key", "request"]
"""The source of a unit: a header, the user, the API key, or the request itself."""
SAGEMAKER_PATH, ADAPTER_HEADER = "/invocations", b"x-amzn-sagemaker-adapter-identifier"
"""SageMaker's endpoint, and its header that may name the model instead of the body."""
STRENGTH_ARGUMENT = "edits_strength"
"""Key of `vllm_xargs` with the strength of the edits."""
_UNIT_PREFIX = "x-"
"""Prefix of headers that may contain a unit."""
_SECRET = {"x-api-key", names.ADMIN_TOKEN}


@dataclass(frozen=True)
class Unit:
    """A unit, e.g. a user, which stays in one arm of an experiment. Without a better source, it is the request."""

    value: str
    source: Source

    @property
    def hash(self) -> str:
        """The first 16 hex digits of its sha256. Logs contain this hash instead of the unit."""
        return hashlib.sha256(self.value.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class _Fields(msgspec.Struct):
    """The fields of a body that are read. They may have any type."""

    model: Any = None
    user: Any = None
    vllm_xargs: Any = None
    use_beam_search: Any = None


@dataclass(frozen=True)
class Request:
    """The parts of a request that the plugin reads. A field of a type that vLLM refuses counts as absent."""

    model: str = ""
    """value of the `model` field, or '' for the base model"""
    strengths: tuple[str, ...] = ()
    """requested strengths, as they are written"""
    beam_search: bool = False
    user: str = ""
    """the field `user` of OpenAI's API"""
    headers: Mapping[str, str] = field(default_factory=dict)
    """headers that begin with `x-`, without secrets"""
    api_key_hash: str = ""
    """sha256 of the API key"""
    id: str = ""
    """the server's own id for the request"""
    resolved_arm: str = ""
    """the arm that the operator's resolver chose"""
    target: str = ""
    """the name that must answer, independent of experiments; for requests that the server makes or restricts itself"""

    @classmethod
    def read(cls, path: str, headers: Headers, body: bytes, id: str = "") -> Request:  # noqa: A002
        """Read a request. path: the path below --root-path."""
        fields = _fields(body)
        model = _text(fields.model)
        if path == SAGEMAKER_PATH:
            model = first(headers, ADAPTER_HEADER) or model
        strengths = [value.decode("latin-1") for name, value in headers if name == names.STRENGTH.encode()]
        if isinstance(fields.vllm_xargs, dict) and STRENGTH_ARGUMENT in fields.vllm_xargs:
            strengths.append(str(fields.vllm_xargs[STRENGTH_ARGUMENT]))
        kept, key = _read_headers(headers)
        return cls(
            model, tuple(strengths), _truth(fields.use_beam_search), _text(fields.user), kept,
            hashlib.sha256(key.encode()).hexdigest() if key else "", id,
        )  # fmt: skip

    @property
    def strength(self) -> float | None:
        """The requested strength, or None. RequestRefused if the request has different or invalid strengths."""
        if not self.strengths:
            return None
        try:
            (strength,) = {float(value) for value in self.strengths}
        except ValueError:
            raise RequestRefused(
                f"expected one number as strength, found {' and '.join(map(repr, self.strengths))}. Send it in the "
                f"header {names.STRENGTH}, or as vllm_xargs.{STRENGTH_ARGUMENT}"
            ) from None
        return strength

    @property
    def arm(self) -> str:
        """The arm that the request asks for, or that a resolver chose, or ''."""
        return self.headers.get(names.ARM, "") or self.resolved_arm

    def unit(self, header: str) -> Unit:
        """The unit: the value of `header`, else the user, else the API key's hash, else the request itself."""
        if value := self.headers.get(header):
            return Unit(value, "header")
        if self.user:
            return Unit(self.user, "user")
        return Unit(self.api_key_hash, "key") if self.api_key_hash else Unit(self.id, "request")


def is_json(headers: Headers) -> bool:
    """True if vLLM may parse the body as JSON: its content type is JSON or missing."""
    kind = first(headers, b"content-type")
    return not kind or "json" in kind.lower()


def first(headers: Headers, name: bytes) -> str:
    """The first value of a header, as Starlette gives it to vLLM, or ''."""
    return next((value.decode("latin-1") for key, value in headers if key == name), "")


def _read_headers(headers: Headers) -> tuple[Mapping[str, str], str]:
    """The headers that experiments may read, and the API key."""
    values: dict[str, str] = {}
    for name, value in headers:  # of equal ones the first counts, as in vLLM's check of the key
        values.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    scheme, _, sent = values.get("authorization", "").partition(" ")
    key = (sent if scheme.lower() == "bearer" else "") or values.get("x-api-key", "")
    return {name: value for name, value in values.items() if name.startswith(_UNIT_PREFIX) and name not in _SECRET}, key


def _fields(body: bytes) -> _Fields:
    try:
        return msgspec.json.decode(body, type=_Fields)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return _Fields()
    if not isinstance(parsed, dict):
        return _Fields()
    return _Fields(**{name: parsed.get(name) for name in _Fields.__struct_fields__})


def _text(value: Any) -> str:
    """A string, or '' for any other type. Half a surrogate pair, which no name contains, is escaped."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else ""


_BOOL = pydantic.TypeAdapter(bool)


def _truth(value: Any) -> bool:
    """A flag as vLLM reads it: pydantic accepts 1, "true" or "on" as true."""
    try:
        return _BOOL.validate_python(value)
    except pydantic.ValidationError:
        return False
