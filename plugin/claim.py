"""What travels with a request into the engine, and what every worker holds it against. Pure.

The engine gate writes both into the request's extra arguments, and whatever a caller put there is overwritten.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SCHEDULER = "vllm_edits.EditsScheduler"
"""The scheduler that knows how to fork, for `--scheduler-cls`."""
_TOO_LARGE = 2**31


class FalseClaim(RuntimeError):
    """A request claims what the engine does not hold, or claims it in a form that the engine gate never writes."""


class Claim(NamedTuple):
    """That a request is to be computed with what a slot holds. Absent for the base model."""

    slot: int
    version: str
    strength: float

    @classmethod
    def of(cls, told: Any) -> Claim:
        """The claim that arrived. FalseClaim unless it has the form of one, with numbers that can be such."""
        match told:
            case [int() as slot, str() as version, int() | float() as strength] if (
                abs(slot) < _TOO_LARGE and abs(strength) < _TOO_LARGE
            ):
                return cls(slot, version, strength)
        raise FalseClaim(f"expected a claim of [slot, version, strength], found {told!r:.80}")


class Fork(NamedTuple):
    """That the cache blocks of a request are the base's up to `tail` tokens before its prompt ends."""

    salt: str
    tail: int

    @classmethod
    def of(cls, told: Any) -> Fork:
        """The fork that arrived. FalseClaim unless it has the form of one."""
        match told:
            case [str() as salt, int() as tail] if tail >= 0:
                return cls(salt, tail)
        raise FalseClaim(f"expected a fork of [salt, tail], found {told!r:.80}")


CLAIM = "vllm_edits_claim"
"""Key of a `Claim` in a request's extra arguments."""
FORK = "vllm_edits_fork"
"""Key of a `Fork`."""
