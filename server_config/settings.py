"""Declares every setting of the server: name, type, default and help. A test compares README.md's table with it.

Settings are passed as `--additional-config '{"edits": {...}}'`. So every process of the engine sees the same settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from vllm_edits.edit_store.edits import MAX_RANK
from vllm_edits.edit_store.errors import SettingsError, nearest
from vllm_edits.edit_store.kinds import feature_names, served_per_request
from vllm_edits.edit_store.reading.cache import DEFAULT_LIMIT_BYTES
from vllm_edits.edit_store.refs import DEFAULT_TAG, is_bundle_name, is_name, is_version_prefix
from vllm_edits.edit_store.trust import Enforcement

KEY = "edits"
Grow = Literal["auto", "ask", "never"]
ProbePolicy = Literal["run", "require", "off"]
Profile = Literal["promoted", "standard", "all"]
"""Name of a reservation. Their contents are in profiles.py."""
PROFILES: tuple[Profile, ...] = get_args(Profile)
"""From the smallest to the largest."""
_NO_PROFILE = "no_profile"


def _one_of(known: Callable[[], Sequence[str]]) -> PlainValidator:
    """Of names that are known when a setting is read: packages may register kinds of edit of their own."""

    def validated(value: object) -> object:
        if value not in known():
            *others, last = map(repr, known())
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
        return value

    return PlainValidator(validated)


class Reserve(BaseModel):
    """A reservation for one kind of edit, at all sites that match a pattern."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Annotated[str, _one_of(served_per_request)] = Field(description="Kind of edit.")
    site: str = Field(description="Site or pattern of sites, e.g. layers.*.mlp.out or layers.3.resid.")
    rank: int = Field(default=1, ge=1, le=MAX_RANK, description="Largest rank of an edit at the site.")
    reads: str | None = Field(
        default=None, description="Point that the edit reads. Default: the input of the module at the site."
    )
    index: int = Field(
        default=0, ge=0, description="Number of this edit among the edits at the site that must be computed separately."
    )
    features: tuple[Annotated[str, _one_of(feature_names)], ...] = Field(
        default=(),
        description="Further features of edits at the site. The error for a refused version names missing ones.",
    )


def _reserve_item(value: object) -> object:
    if not isinstance(value, str):
        return Reserve.model_validate(value)
    if value not in PROFILES:
        raise PydanticCustomError(
            _NO_PROFILE,
            "unknown profile {found}.{nearest} Profiles: {known}. Give several profiles, or entries, as a list",
            {"found": repr(value), "nearest": nearest(value, PROFILES), "known": ", ".join(PROFILES)},
        )
    return value


def _listed(value: object) -> object:
    """One name is a list of one name, and null is the default."""
    return ("promoted",) if value is None else (value,) if isinstance(value, str) else value


ReserveItem = Annotated[Profile | Reserve, PlainValidator(_reserve_item)]
_RESERVE = TypeAdapter(list[ReserveItem])


class ReserveWeight(BaseModel):
    """A projection that the version in the weights may change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str = Field(description="Site of the projection's output, or a pattern, e.g. layers.*.mlp.out.")
    bias: bool = Field(
        default=False,
        description="Add a bias of zeros to a projection without a bias, so that versions can add constants.",
    )


def _variant(text: str) -> str:
    name, at, tag = text.partition("@")
    if not is_bundle_name(name) or (at and (not is_name(tag) or is_version_prefix(tag))):
        raise ValueError(
            "expected one variant, as name or name@tag. To serve several variants together, compose them first: "
            "vllm-edits compose a b"
        )
    return text


def _tag(text: str) -> str:
    if not is_name(text) or is_version_prefix(text):
        raise ValueError("expected a lower-case name that does not look like a version (six or more hex digits)")
    return text


class EditSettings(BaseModel):
    """The settings of a server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str = Field(min_length=1, description="The edit store: a folder, or the URL of a supported backend.")
    slots: int = Field(
        default=16,
        ge=1,
        le=4096,
        description="Number of versions on the device at once. Other versions are paged in on demand.",
    )
    reserve: Annotated[tuple[ReserveItem, ...], BeforeValidator(_listed)] = Field(
        default=("promoted",),
        description="Memory to reserve: a profile (`promoted`, `standard` or `all`), or a list of profiles and of "
        "entries with kind, site and rank.",
    )
    reserve_headroom: float = Field(
        default=1.0,
        ge=1,
        le=16,
        description="Factor by which reserved ranks exceed what promoted versions need, at the start and after a "
        "growth.",
    )
    scopes: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Largest number of scopes in one version. Default: the largest number in a version promoted at "
        "start, or in a profile in `reserve`; 0 if `reserve` has entries only.",
    )
    grow: Grow = Field(
        default="auto",
        description="What happens to a promoted version that does not fit: `auto` makes the reservation grow while the "
        "server runs, `ask` only on `vllm-edits reserve grow`, `never` refuses it.",
    )
    grow_bytes: int | None = Field(
        default=None,
        ge=1 << 20,
        description="Device memory that all slots may take after a growth, in each worker. Default: what is free.",
    )
    probes: ProbePolicy = Field(
        default="run",
        description="Probes of a version before its first request: `run` refuses a version that fails them, `require` "
        "also one without any, `off` runs none.",
    )
    default_tag: Annotated[str, AfterValidator(_tag)] = Field(
        default=DEFAULT_TAG, description="Tag that a variant name without a tag refers to."
    )
    poll_seconds: float = Field(
        default=2.0, ge=0.05, le=3600, description="Seconds between two reads of the store's promotions."
    )
    admin_token_file: str | None = Field(
        default=None,
        description="File with the token that each change over HTTP must send. Without it, the server refuses such "
        "changes.",
    )
    trust_file: str | None = Field(
        default=None, description="Trust file: the keys whose signatures count, and how many signatures are needed."
    )
    signatures: Enforcement | None = Field(
        default=None,
        description="Checks of signatures: `require`, `warn` or `off`. Default: `require` if the trust file holds a "
        "key, else `off`.",
    )
    signing_key_file: str | None = Field(
        default=None, description="Private key with which the server signs changes made over HTTP, as their promoter."
    )
    cache_folder: str | None = Field(
        default=None,
        description="Folder for copies of remote versions and for the promotions that this node has seen. Default: a "
        "folder in the user's cache folder.",
    )
    cache_bytes: int = Field(
        default=DEFAULT_LIMIT_BYTES,
        ge=1 << 20,
        description="Size limit of the copies in `cache_folder`. The least recently used copies are deleted first.",
    )
    host_cache_bytes: int = Field(
        default=1 << 30,
        ge=0,
        description="Memory in each worker for versions that are ready to be paged in. The least recently used "
        "versions are dropped first.",
    )
    exposure_folder: str | None = Field(
        default=None,
        description="Folder of the exposure log: one JSON line for each request of an experiment. Without it, no log.",
    )
    exposure_bytes: int = Field(
        default=1 << 28, ge=1 << 12, description="File size at which the exposure log continues in a new file."
    )
    feedback_key_file: str | None = Field(
        default=None,
        description="File with a secret that several servers share. With it, clients can send feedback to any of these "
        "servers, and after a restart. Default: each server makes its own secret at start.",
    )
    arm_resolver: str | None = Field(
        default=None,
        description="`package.module:function` that can choose the arm for a request of an experiment.",
    )
    any_vllm: bool = Field(
        default=False,
        description="Start on vLLM versions outside the supported range too. What vLLM lacks is logged.",
    )
    inner_load_format: str = Field(default="auto", description="vLLM load format that reads the base model's weights.")
    weights: Annotated[str, AfterValidator(_variant)] | None = Field(
        default=None,
        description="Variant (`name` or `name@tag`) to serve from the engine's weights. While it is promoted, nothing "
        "else is served.",
    )
    weights_reserve: tuple[ReserveWeight, ...] | None = Field(
        default=None,
        description="Projections that the variant in the weights may change. Default: those changed by the version "
        "promoted at start.",
    )
    weights_running: Literal["finish", "abort", "keep"] = Field(
        default="finish",
        description="Requests that run when the weights are to change: `finish` waits for them, `abort` ends them, "
        "`keep` lets them continue on the new weights.",
    )
    weights_patience_seconds: float = Field(
        default=60.0, ge=0, le=3600, description="Seconds that a change of the weights waits for requests to finish."
    )

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Profiles that `reserve` names. With one, what is promoted is reserved too."""
        return tuple(item for item in self.reserve if not isinstance(item, Reserve))

    @property
    def entries(self) -> tuple[Reserve, ...]:
        """Entries of `reserve`. Without a profile beside them, exactly these are reserved."""
        return tuple(item for item in self.reserve if isinstance(item, Reserve))


NOT_COMPILED = frozenset((
    "store", "reserve_headroom", "grow", "grow_bytes", "default_tag", "poll_seconds", "admin_token_file", "trust_file",
    "signatures", "signing_key_file", "cache_folder", "cache_bytes", "host_cache_bytes", "exposure_folder",
    "exposure_bytes", "feedback_key_file", "arm_resolver", "any_vllm", "weights", "weights_running",
    "weights_patience_seconds", "probes",
))  # fmt: skip
"""Settings that compiled code does not depend on. One that is not named here is part of the compile cache's key."""


class CompiledSettings(dict[str, Any]):
    """The settings that compiled code depends on, in place of all settings in vLLM's additional config.

    vLLM's compile cache has the additional config in its key. So a server that starts with another store, token or poll
    interval finds the code of an earlier start.
    """

    def __init__(self, given: Mapping[str, Any], **more: Any) -> None:
        """given: all settings, which `read_settings` reads. more: settings that take the place of those given."""
        self.given: Mapping[str, Any] = given.given if isinstance(given, CompiledSettings) else given
        super().__init__({name: value for name, value in self.given.items() if name not in NOT_COMPILED} | more)


def read_settings(additional_config: object) -> EditSettings:
    """Read the settings in vLLM's additional config. SettingsError lists every unknown or invalid setting."""
    if not isinstance(additional_config, Mapping) or not isinstance(additional_config.get(KEY), Mapping):
        raise SettingsError(
            f"expected settings under {KEY!r} in --additional-config, found {additional_config!r}. "
            """Start with: --additional-config '{"edits": {"store": "/path/to/store"}}'"""
        )
    given = additional_config[KEY]
    try:
        return EditSettings.model_validate(given.given if isinstance(given, CompiledSettings) else given)
    except ValidationError as error:
        raise SettingsError("\n".join(["invalid settings:", *map(_explain, error.errors())])) from None


def read_reserve(items: Iterable[object]) -> list[Profile | Reserve]:
    """Read profiles and entries of the setting `reserve`. SettingsError lists every unknown or invalid value."""
    try:
        return _RESERVE.validate_python(list(items))
    except ValidationError as error:
        problems = [{**problem, "loc": ("reserve", *problem["loc"])} for problem in error.errors()]
        raise SettingsError("\n".join(["invalid reservation:", *map(_explain, problems)])) from None


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == _NO_PROFILE:
        return f"  - {KEY}.{where}: {problem['msg']}"
    if problem["type"] != "extra_forbidden":
        return f"  - {KEY}.{where}: {problem['msg']}, found {problem.get('input')!r}"
    kinds: dict[str, type[BaseModel]] = {"reserve": Reserve, "weights_reserve": ReserveWeight}
    known = kinds.get(problem["loc"][0], EditSettings).model_fields
    name = str(problem["loc"][-1])
    return f"  - {KEY}.{where}: unknown setting.{nearest(name, known) or ' Known: ' + ', '.join(known) + '.'}"
