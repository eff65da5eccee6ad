"""Lets a flag system decide who gets which arm: a function of the operator's, asked in OpenFeature's words.

    def resolve(flag_key: str, default_value: str, evaluation_context: dict[str, str]) -> str

`flag_key` is `edit.<model>`, `default_value` the arm that the hash gives ('' for a unit outside), and the context has
OpenFeature's `targetingKey` (the unit), `source` (what the unit was made of), `experiment` and `phase`. Any client of
OpenFeature fits: `lambda *asked: client.get_string_value(*asked[:2], EvaluationContext(...))`. What it returns is an
arm's name, or the default. It is called for every request of an experiment, so it must answer from memory, as
providers of OpenFeature do.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

from vllm_edits.edit_store.errors import SettingsError

logger = logging.getLogger("vllm.edits")

Resolve = Callable[[str, str, dict[str, str]], str]


def load(where: str | None) -> Resolve | None:
    """The function at `package.module:name`; SettingsError when there is none."""
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
    """Asks the function, and goes on with the hash when it fails or names no arm. Says so once for each reason."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._told: set[str] = set()

    @classmethod
    def of(cls, where: str | None) -> Resolver | None:
        """The one that a setting names, if it names one."""
        resolve = load(where)
        return None if resolve is None else cls(resolve)

    def arm(self, model: str, default: str, arms: list[str], context: dict[str, str]) -> str:
        """The arm to give, or ''  to leave it to the hash."""
        try:
            found = self._resolve(f"edit.{model}", default, context)
        except Exception as error:  # noqa: BLE001  a flag system that is down decides nothing
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
