"""Lets a flag system choose the arms: calls a function of the operator, with the terms of OpenFeature.

    def resolve(flag_key: str, default_value: str, evaluation_context: dict[str, str]) -> str

`flag_key` is `edit.<model>`. `default_value` is the arm by hash ('' for a unit outside the experiment). The context has
OpenFeature's `targetingKey` (the unit), `source` (the source of the unit), `experiment` and `phase`. Any OpenFeature
client works: `lambda *asked: client.get_string_value(*asked[:2], EvaluationContext(...))`. The function returns the
name of an arm, or the default. It is called for every request of an experiment, so it must answer from memory, as
OpenFeature providers do.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

from vllm_edits.edit_store.errors import SettingsError

logger = logging.getLogger("vllm.edits")

Resolve = Callable[[str, str, dict[str, str]], str]


def load(where: str | None) -> Resolve | None:
    """Import the function at `package.module:name`. SettingsError if that fails."""
    if where is None:
        return None
    module, colon, name = where.partition(":")
    if not colon or not name:
        raise SettingsError(f"edits.arm_resolver: expected package.module:function, found {where!r}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"edits.arm_resolver: {where} cannot be imported: {error}") from error
    if not callable(found):
        raise SettingsError(f"edits.arm_resolver: expected a function at {where}, found a {type(found).__name__}")
    resolve: Resolve = found
    return resolve


class Resolver:
    """Calls the operator's function. If it fails or returns no arm, the hash chooses; each reason is logged once."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._told: set[str] = set()

    @classmethod
    def of(cls, where: str | None) -> Resolver | None:
        """The resolver in the settings, or None."""
        resolve = load(where)
        return None if resolve is None else cls(resolve)

    def arm(self, model: str, default: str, arms: list[str], context: dict[str, str]) -> str:
        """The arm to use, or '' if the hash chooses."""
        try:
            found = self._resolve(f"edit.{model}", default, context)
        except Exception as error:  # noqa: BLE001  the operator's function may raise anything
            return self._default(f"the arm resolver failed: {error!r}")
        if found == default:
            return ""
        if found not in arms:
            return self._default(
                f"the arm resolver returned {found!r} for {model!r}, expected one of {', '.join(arms)}"
            )
        return found

    def _default(self, why: str) -> str:
        if why not in self._told:
            self._told.add(why)
            logger.error("%s; the hash chooses the arm", why)
        return ""
