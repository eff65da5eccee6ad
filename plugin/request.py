"""What a client asks for, read once from headers and body, as vLLM's handlers will read them. Pure.

vLLM takes a body as Starlette does: with `json.loads`, which knows UTF-8, -16 and -32 by their first bytes, NaN,
Infinity and half a surrogate pair, takes the last of equal keys, and gives up on what is nested too deep. A stricter
reader would see no model where vLLM sees one, so what the fast reader does not take is read again in vLLM's way.
Nothing of a prompt is kept.
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
"""ASGI's: names in lower case, in the order in which they came."""
Source = Literal["header", "user", "key", "request"]
"""What a unit is made of."""
SAGEMAKER_PATH, ADAPTER_HEADER = "/invocations", b"x-amzn-sagemaker-adapter-identifier"
"""SageMaker's endpoint, where a header may name the model in the body's place."""
STRENGTH_ARGUMENT = "edits_strength"
"""Key of `vllm_xargs` that says how strong a request wants the edits."""
_UNIT_PREFIX = "x-"
"""Headers that may name a unit begin so."""
_SECRET = {"x-api-key", names.ADMIN_TOKEN}


@dataclass(frozen=True)
class Unit:
    """What stays in one arm of an experiment. A unit that is a request is in an arm by itself."""

    value: str
    source: Source

    @property
    def hash(self) -> str:
        """The first 16 hex digits of its sha256, which are written down in its place."""
        return hashlib.sha256(self.value.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class _Fields(msgspec.Struct):
    """Fields of a body that are looked at, whatever their types."""

    model: Any = None
    user: Any = None
    vllm_xargs: Any = None
    use_beam_search: Any = None


@dataclass(frozen=True)
class Request:
    """All that is read of one request. A field of a type that vLLM refuses counts as absent."""

    model: str = ""
    """name in the `model` field, or '' for the base model"""
    strengths: tuple[str, ...] = ()
    """strengths asked for, as they were written"""
    beam_search: bool = False
    user: str = ""
    """the field `user` of OpenAI's requests"""
    headers: Mapping[str, str] = field(default_factory=dict)
    """those that begin with `x-`, secrets left out"""
    key: str = ""
    """sha256 of the API key"""
    id: str = ""
    """the server's own name for the request"""
    resolved_arm: str = ""
    """the arm that an operator's resolver gives it"""
    target: str = ""
    """what must answer it, whatever experiments say: of requests that the server makes itself, or narrows down"""

    @classmethod
    def read(cls, path: str, headers: Headers, body: bytes, id: str = "") -> Request:  # noqa: A002
        """Read a request. path: below --root-path."""
        fields = _fields(body)
        model = _text(fields.model)
        if path == SAGEMAKER_PATH:
            model = first(headers, ADAPTER_HEADER) or model
        strengths = [value.decode("latin-1") for name, value in headers if name == names.STRENGTH.encode()]
        if isinstance(fields.vllm_xargs, dict) and STRENGTH_ARGUMENT in fields.vllm_xargs:
            strengths.append(str(fields.vllm_xargs[STRENGTH_ARGUMENT]))
        kept, key = _told(headers)
        return cls(
            model, tuple(strengths), _truth(fields.use_beam_search), _text(fields.user), kept,
            hashlib.sha256(key.encode()).hexdigest() if key else "", id,
        )  # fmt: skip

    @property
    def strength(self) -> float | None:
        """The strength, or None where none was asked for. RequestRefused unless all that were sent are one number."""
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
        """The arm that it asks for itself, or was given by a resolver, or ''."""
        return self.headers.get(names.ARM, "") or self.resolved_arm

    def unit(self, header: str) -> Unit:
        """The unit: that header's value, else the user, else the API key's hash, else the request itself."""
        if value := self.headers.get(header):
            return Unit(value, "header")
        if self.user:
            return Unit(self.user, "user")
        return Unit(self.key, "key") if self.key else Unit(self.id, "request")


def is_json(headers: Headers) -> bool:
    """Whether vLLM may take a body as JSON: its type says so, or says nothing."""
    kind = first(headers, b"content-type")
    return not kind or "json" in kind.lower()


def first(headers: Headers, name: bytes) -> str:
    """The first value of a header, which is the one that Starlette gives vLLM, or ''."""
    return next((value.decode("latin-1") for key, value in headers if key == name), "")


def _told(headers: Headers) -> tuple[Mapping[str, str], str]:
    """The headers that may matter to an experiment, and the API key."""
    told: dict[str, str] = {}
    for name, value in headers:  # of equal ones the first counts, as in vLLM's check of the key
        told.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    scheme, _, sent = told.get("authorization", "").partition(" ")
    key = (sent if scheme.lower() == "bearer" else "") or told.get("x-api-key", "")
    return {name: value for name, value in told.items() if name.startswith(_UNIT_PREFIX) and name not in _SECRET}, key


def _fields(body: bytes) -> _Fields:
    try:
        return msgspec.json.decode(body, type=_Fields)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return _Fields()
    if not isinstance(said, dict):
        return _Fields()
    return _Fields(**{name: said.get(name) for name in _Fields.__struct_fields__})


def _text(value: Any) -> str:
    """A string, or '' for anything else. Half a surrogate pair, which is in no name, is spelled out."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else ""


_BOOL = pydantic.TypeAdapter(bool)


def _truth(value: Any) -> bool:
    """A flag as vLLM reads it: pydantic takes 1, "true" or "on" for true."""
    try:
        return _BOOL.validate_python(value)
    except pydantic.ValidationError:
        return False
