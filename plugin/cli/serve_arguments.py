"""Builds the command of `vllm-edits serve`: `vllm serve` with the plugin's flags and all of the operator's flags.

vLLM uses the last of equal flags, and prefers a flag to the file of --config. So it could silently override the
plugin's settings or the operator's. Here both are merged, or the conflict is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from vllm_edits.edit_store.errors import SettingsError
from vllm_edits.plugin.claim import SCHEDULER
from vllm_edits.server_config.settings import KEY

PLUGIN, VARIABLE = "edits", "VLLM_PLUGINS"
_LOADED_WITHOUT_BEING_NAMED = (
    "vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins"
)  # fmt: skip
"""Groups of vLLM plugins that vLLM loads completely if the variable is not set."""
OURS = {"--load-format": PLUGIN, "--scheduler-cls": SCHEDULER}


class Flags:
    """The flags that are passed to vLLM, and the file of --config."""

    def __init__(self, words: Sequence[str]) -> None:
        self._parts = list(_parts(words))
        self._given = {name: value for name, value, _ in self._parts}
        named = self._given.get("--config")
        self.file: Mapping[str, Any] = {} if named is None else _yaml(named)

    def get(self, flag: str) -> Any:
        """The value that vLLM will use, or None."""
        if flag in self._given:
            return self._given[flag]
        plain = flag.removeprefix("--")
        return next((self.file[key] for key in (plain, plain.replace("-", "_")) if key in self.file), None)

    def besides(self, flag: str) -> list[str]:
        """Flags that vLLM would read as this flag, or as a part of its value: abbreviated, or with a dot."""
        given = [*self._given, *(f"--{key}".replace("_", "-") for key in self.file)]
        heads = ((name, name.partition(".")[0]) for name in given if len(name) > len("--"))
        return [name for name, head in heads if name != flag and flag.startswith(head)]

    def without(self, flag: str) -> list[str]:
        """All words except a flag and its value."""
        return [word for name, _, spelled in self._parts if name != flag for word in spelled]


def _parts(words: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """The name, first value and words of each flag. vLLM accepts underscores for dashes, and `=` for a space."""
    spelled: list[str] = []
    for word in [*words, "--"]:
        if word.startswith("--") and spelled:
            name, equals, value = spelled[0].partition("=")
            following = spelled[1] if len(spelled) > 1 else ""
            yield name.replace("_", "-"), value if equals else following, spelled
            spelled = []
        spelled.append(word)


def _yaml(path: str) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(found or {}, Mapping):
        raise SettingsError(
            f"--config {path}: expected a mapping of vLLM's flags to values, found {type(found).__name__}"
        )
    return found or {}


def arguments(model: str, settings: Mapping[str, Any], flags: Flags) -> list[str]:
    """The words after `vllm`. SettingsError lists every flag that would override a flag of the plugin."""
    wrong = [
        f"{flag} is {flags.get(flag)!r}, but edits need {needed!r}: leave it out{_instead(flag)}"
        for flag, needed in OURS.items()
        if flags.get(flag) not in (None, needed)
    ]
    more, why = _additional(flags.get("--additional-config"))
    wrong += [f"--additional-config: {reason}" for reason in why]
    wrong += [f"{each}: write the flag in full, as {flag}" for flag in OURS for each in flags.besides(flag)]
    wrong += [f"{each}: give --additional-config as one JSON object" for each in flags.besides("--additional-config")]
    if flags.get("--grpc") not in (None, False):
        wrong.append("--grpc: vLLM does not load the plugin in its gRPC server; serve over HTTP")
    if wrong:
        raise SettingsError("; ".join(wrong))
    config = json.dumps({**more, KEY: dict(settings)})
    ours = [word for pair in {**OURS, "--additional-config": config}.items() for word in pair]
    return ["serve", model, *ours, *flags.without("--additional-config")]


def _instead(flag: str) -> str:
    return ", and set inner_load_format with --set" if flag == "--load-format" else ""


def _additional(given: Any) -> tuple[dict[str, Any], list[str]]:
    """The operator's own additional config, and its errors."""
    if given is None:
        return {}, []
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return {}, [f"expected JSON, found {given!r}"]
    if not isinstance(found, Mapping):
        return {}, [f"expected an object, found {given!r}"]
    if KEY in found:
        return {}, [f"it contains settings under {KEY!r}: give them with --set, or start `vllm serve` instead"]
    return dict(found), []


@dataclass(frozen=True)
class Plugins:
    """The enabled plugins of vLLM."""

    names: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    """remarks for the operator"""


def plugins(named: str | None) -> Plugins:
    """The value for VLLM_PLUGINS: its present value and `edits`. Unset, it enables all plugins, so all are named."""
    installed = {each.name for group in _LOADED_WITHOUT_BEING_NAMED for each in entry_points(group=group)}
    if named is None:
        return Plugins(tuple(sorted({*installed, PLUGIN})), tuple(_turned_on(installed - {PLUGIN})))
    asked = [name.strip() for name in named.split(",") if name.strip()]
    known = {name.lower(): name for name in (*installed, PLUGIN)}
    remarks = [
        f"{VARIABLE} names {name!r}, which is not installed"
        + (f": did you mean {known[name.lower()]!r}" if name.lower() in known else "")
        for name in asked
        if name not in known.values()
    ]
    return Plugins(tuple(dict.fromkeys([*asked, PLUGIN])), tuple(remarks))


def _turned_on(others: Iterable[str]) -> Iterator[str]:
    if names := ", ".join(sorted(others)):
        yield f"{VARIABLE} was not set, so all installed plugins stay enabled: {PLUGIN}, {names}"
