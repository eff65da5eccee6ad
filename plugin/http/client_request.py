"""What a client asks for, read once from its headers and body, as vLLM's handlers will read them. Pure.

vLLM takes a body as Starlette does: with `json.loads`, which knows UTF-8, -16 and -32 by their first bytes, NaN,
Infinity and half a surrogate pair, takes the last of equal keys, and gives up on what is nested too deep. A stricter
reader would see no model where vLLM sees one, so what the fast reader does not take is read again in vLLM's way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic

from vllm_edits.edit_store.errors import RequestRefused
from vllm_edits.plugin.serving.version_info import STRENGTH_ARGUMENT, STRENGTH_HEADER

Headers = Sequence[tuple[bytes, bytes]]
"""ASGI's: names in lower case, in the order in which they came."""
SAGEMAKER_PATH, ADAPTER_HEADER = "/invocations", b"x-amzn-sagemaker-adapter-identifier"
"""SageMaker's endpoint, where a header may name the model in the body's place."""


class _Fields(msgspec.Struct):
    """Fields of a body that are looked at, whatever their types."""

    model: Any = None
    user: Any = None
    vllm_xargs: Any = None
    use_beam_search: Any = None


@dataclass(frozen=True)
class ClientRequest:
    """What is looked at of a request. A field of a type that vLLM refuses counts as absent."""

    model: str = ""
    """name in the `model` field, or '' for the base model"""
    user: str = ""
    strengths: tuple[str, ...] = ()
    """strengths asked for, as they were written"""
    beam_search: bool = False

    @classmethod
    def read(cls, path: str, headers: Headers, body: bytes) -> ClientRequest:
        """Read a request. path: below --root-path."""
        fields = _fields(body)
        model = _text(fields.model)
        if path == SAGEMAKER_PATH:
            model = first(headers, ADAPTER_HEADER) or model
        strengths = [value.decode("latin-1") for name, value in headers if name == STRENGTH_HEADER.encode()]
        if isinstance(fields.vllm_xargs, dict) and STRENGTH_ARGUMENT in fields.vllm_xargs:
            strengths.append(str(fields.vllm_xargs[STRENGTH_ARGUMENT]))
        return cls(model, _text(fields.user), tuple(strengths), _truth(fields.use_beam_search))

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
                f"header {STRENGTH_HEADER}, or as vllm_xargs.{STRENGTH_ARGUMENT}"
            ) from None
        return strength


def is_json(headers: Headers) -> bool:
    """Whether vLLM may take a body as JSON: its type says so, or says nothing."""
    kind = first(headers, b"content-type")
    return not kind or "json" in kind.lower()


def first(headers: Headers, name: bytes) -> str:
    """The first value of a header, which is the one that Starlette gives vLLM, or ''."""
    return next((value.decode("latin-1") for key, value in headers if key == name), "")


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
