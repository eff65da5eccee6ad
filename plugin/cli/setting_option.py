"""The option `--set` of commands that start or plan a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from vllm_edits.edit_store.errors import SettingsError

SettingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A setting, as name=value; the value may be JSON. Can be repeated, e.g. --set slots=32."
    ),
]


def assigned(store: str, assignments: Sequence[str] | None) -> dict[str, Any]:
    """Settings of the store and of all `--set` options."""
    return {"store": store, **dict(_assignment(text) for text in assignments or [])}


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"--set {text}: expected name=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
