"""Every setting of the server: name, type, default and one line of help. The README's table is checked against this.

Settings travel as `--additional-config '{"edits": {...}}'`, so every process of the engine sees the same ones, and they
are part of the key of vLLM's compile cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticKnownError

from vllm_edits.edit_store.edits import MAX_RANK
from vllm_edits.edit_store.errors import SettingsError, nearest
from vllm_edits.edit_store.kinds import feature_names, served_per_request
from vllm_edits.edit_store.reading.cache import DEFAULT_LIMIT_BYTES
from vllm_edits.edit_store.refs import DEFAULT_TAG, is_bundle_name, is_name, is_version_prefix
from vllm_edits.edit_store.trust import Enforcement

KEY = "edits"


def _one_of(known: Callable[[], Sequence[str]]) -> PlainValidator:
    """Of names that are known when a setting is read: packages may register kinds of edit of their own."""

    def validated(value: object) -> object:
        if value not in known():
            *others, last = map(repr, known())
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
        return value

    return PlainValidator(validated)


class Reserve(BaseModel):
    """Room for one kind of edit at the sites that match a pattern."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Annotated[str, _one_of(served_per_request)] = Field(description="kind of edit")
    site: str = Field(description="site or pattern, e.g. layers.*.mlp.out or layers.3.resid")
    rank: int = Field(default=1, ge=1, le=MAX_RANK, description="largest rank an edit there may have")
    reads: str | None = Field(default=None, description="point that it reads; by default the input of its module")
    index: int = Field(default=0, ge=0, description="counts edits there that cannot be computed together")
    features: tuple[Annotated[str, _one_of(feature_names)], ...] = Field(
        default=(), description="what else an edit there may be; refusals name what is missing"
    )


class ReserveWeight(BaseModel):
    """A projection that versions in the weights may change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str = Field(description="what the projection gives, or a pattern, e.g. layers.*.mlp.out")
    bias: bool = Field(default=False, description="give it a bias of zeros if it has none, so constants can be added")


def _variant(text: str) -> str:
    name, at, tag = text.partition("@")
    if not is_bundle_name(name) or (at and (not is_name(tag) or is_version_prefix(tag))):
        raise ValueError("expected one variant, as name or name@tag; several are composed (`vllm-edits compose a b`)")
    return text


def _tag(text: str) -> str:
    if not is_name(text) or is_version_prefix(text):
        raise ValueError("expected a lower-case name that does not read as a version")
    return text


class EditSettings(BaseModel):
    """What an operator can set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str = Field(min_length=1, description="the edit store: a folder, or a URL of a supported backend")
    slots: int = Field(
        default=16, ge=1, le=4096, description="versions held on the device at once; more are paged in on demand"
    )
    reserve: tuple[Reserve, ...] | None = Field(
        default=None,
        description="kinds, sites and ranks to keep room for; by default what the store promotes at the start",
    )
    scopes: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="scopes that one version may have; by default as many as what the store promotes at the start",
    )
    default_tag: Annotated[str, AfterValidator(_tag)] = Field(
        default=DEFAULT_TAG, description="tag that a bare variant name means"
    )
    poll_seconds: float = Field(
        default=2.0, ge=0.05, le=3600, description="how often the store is looked at for promotions"
    )
    admin_token_file: str | None = Field(
        default=None, description="file with the token that changes over HTTP must send; without it they are refused"
    )
    trust_file: str | None = Field(
        default=None, description="trust file: whose signatures count, and how many are needed"
    )
    signatures: Enforcement | None = Field(
        default=None,
        description="`require`, `warn` or `off`; by default `require` as soon as the trust file holds a key",
    )
    signing_key_file: str | None = Field(
        default=None, description="private key with which changes over HTTP are signed as their promoter"
    )
    cache_folder: str | None = Field(
        default=None,
        description="this node's copies of remote versions, and which promotions it has seen; by default in the user's "
        "cache folder",
    )
    cache_bytes: int = Field(
        default=DEFAULT_LIMIT_BYTES, ge=1 << 20, description="size of that folder; the least recently used go first"
    )
    host_cache_bytes: int = Field(
        default=1 << 30,
        ge=0,
        description="memory of each worker for versions ready to be paged in; the least recently used go first",
    )
    exposure_folder: str | None = Field(
        default=None, description="where requests of experiments are written down, a JSON line each; without it nowhere"
    )
    exposure_bytes: int = Field(default=1 << 28, ge=1 << 12, description="size at which such a file is begun anew")
    feedback_key_file: str | None = Field(
        default=None,
        description="file with a secret that servers share, so that feedback on a request may go to any of them, and "
        "after a restart; by default each has one of its own",
    )
    arm_resolver: str | None = Field(
        default=None,
        description="`package.module:function` that may give requests of experiments their arms",
    )
    any_vllm: bool = Field(
        default=False, description="start on a vLLM outside the supported range too; what it lacks is logged"
    )
    inner_load_format: str = Field(default="auto", description="vLLM load format that reads the base model's weights")
    weights: Annotated[str, AfterValidator(_variant)] | None = Field(
        default=None,
        description="a variant (`name` or `name@tag`) served from the engine's weights, alone while it is there",
    )
    weights_reserve: tuple[ReserveWeight, ...] | None = Field(
        default=None,
        description="projections that it may change; by default those that what it promotes at the start changes",
    )
    weights_running: Literal["finish", "abort", "keep"] = Field(
        default="finish",
        description="requests that run when the weights change: they `finish` first, `abort`, or `keep` running on "
        "the new ones",
    )
    weights_patience_seconds: float = Field(
        default=60.0, ge=0, le=3600, description="how long a change of the weights waits for requests to finish"
    )


def read_settings(additional_config: object) -> EditSettings:
    """Settings out of vLLM's additional config. SettingsError lists every unknown or impossible one."""
    if not isinstance(additional_config, Mapping) or not isinstance(additional_config.get(KEY), Mapping):
        raise SettingsError(
            f"expected settings under {KEY!r} in --additional-config, found {additional_config!r}. "
            """Start with: --additional-config '{"edits": {"store": "/path/to/store"}}'"""
        )
    try:
        return EditSettings.model_validate(additional_config[KEY])
    except ValidationError as error:
        raise SettingsError("\n".join(["settings are refused:", *map(_explain, error.errors())])) from None


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"  - {KEY}.{where}: {problem['msg']}, found {problem.get('input')!r}"
    kinds: dict[str, type[BaseModel]] = {"reserve": Reserve, "weights_reserve": ReserveWeight}
    known = kinds.get(problem["loc"][0], EditSettings).model_fields
    name = str(problem["loc"][-1])
    return f"  - {KEY}.{where}: unknown setting.{nearest(name, known) or ' Known: ' + ', '.join(known) + '.'}"
