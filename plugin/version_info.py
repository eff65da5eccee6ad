"""Facts about a version that a server needs before it serves a request: allowed strengths and shared cache. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from vllm_edits.edit_store.bundle import Manifest, Strength
from vllm_edits.edit_store.errors import RequestRefused
from vllm_edits.edit_store.scope import shared_prefix
from vllm_edits.plugin.request import STRENGTH_ARGUMENT


@dataclass(frozen=True)
class VersionInfo:
    """Facts about one version. The defaults are those of the base model."""

    strength: Strength | None = None
    bound_to_prompt: bool = False
    """True if edits of a token depend on the length of the prompt, so that cache blocks depend on it too"""
    tail: int | None = None
    """edits begin this many tokens before the end of the prompt; earlier tokens are the base model's. None: anywhere"""
    name: str = ""
    """name of the bundle"""
    fires: bool = False
    """True if it has edits whose firings are counted"""
    authored_firings: float | None = None
    """firings of its gates per token, if its author has measured them"""

    @classmethod
    def of(cls, manifest: Manifest) -> VersionInfo:
        """The facts in a manifest."""
        scopes = {edit.scope for edit in manifest.edits}
        # Far into a long prompt, where each scope begins tells its distance from the prompt's end, if it has one.
        long = 1 << 40
        begins = shared_prefix(scopes, long)
        return cls(
            manifest.strength, any(scope.bound_to_prompt for scope in scopes), long - begins if begins > 0 else None,
            manifest.name, any(edit.fires for edit in manifest.edits),
            manifest.gate_firings,
        )  # fmt: skip

    def strength_of(self, asked: float | None, model: str, *, fixed: bool = False) -> float:
        """The strength of a request. fixed: the default is in the weights. RequestRefused if it is out of bounds."""
        if asked is None:
            return 1.0 if self.strength is None else self.strength.default
        if fixed and self.strength is not None and asked != self.strength.default:
            raise RequestRefused(
                f"{model!r} is in the engine's weights with the strength {self.strength.default:g}, but the request "
                f"asks for {asked:g}. Leave out {STRENGTH_ARGUMENT}"
            )
        if self.strength is None:
            raise RequestRefused(
                f"{model!r} accepts no strength, because its author set no bounds, but the request asks for {asked:g}. "
                f"Leave out {STRENGTH_ARGUMENT}"
            )
        if not (math.isfinite(asked) and self.strength.minimum <= asked <= self.strength.maximum):
            raise RequestRefused(f"{model!r}: expected a strength of {self.strength}, found {asked:g}")
        return asked


NO_INFO = VersionInfo()

InfoOf = Callable[[str], VersionInfo]
"""Returns the facts about a version."""
