"""The claim and the fork of a request, which travel with it into the engine. Pure.

The engine gate writes both into the request's extra arguments and overwrites values from the caller. Every worker
checks the claim against the content of its slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SCHEDULER = "vllm_edits.EditsScheduler"
"""The plugin's scheduler, for `--scheduler-cls`. It supports forks."""
_TOO_LARGE = 2**31
"""Bound that no slot and no strength reaches. Far larger numbers could not even be written in a message."""


class FalseClaim(RuntimeError):
    """The claim of a request does not match the engine's content, or has a form that the engine gate never writes."""


class Claim(NamedTuple):
    """The claim of a request on the version in a slot. Requests for the base model have none."""

    slot: int
    version: str
    strength: float

    @classmethod
    def of(cls, values: Any) -> Claim:
        """Parse a claim. FalseClaim if its form or its numbers are invalid."""
        match values:
            case [int() as slot, str() as version, int() | float() as strength] if (
                abs(slot) < _TOO_LARGE and abs(strength) < _TOO_LARGE
            ):
                return cls(slot, version, strength)
        raise FalseClaim(f"expected a claim of [slot, version, strength], found {values!r:.80}")


class Fork(NamedTuple):
    """The point up to which a request's cache blocks are the base model's: `tail` tokens before its prompt ends."""

    salt: str
    tail: int

    @classmethod
    def of(cls, values: Any) -> Fork:
        """Parse a fork. FalseClaim if its form is invalid."""
        match values:
            case [str() as salt, int() as tail] if tail >= 0:
                return cls(salt, tail)
        raise FalseClaim(f"expected a fork of [salt, tail], found {values!r:.80}")


CLAIM = "vllm_edits_claim"
"""Key of a `Claim` in a request's extra arguments."""
FORK = "vllm_edits_fork"
"""Key of a `Fork`."""
