"""Measured costs of the reservation profiles at rest, read from profile_costs.json.

`python -m loadtests.bench.costs_at_rest` writes that file from records of the benchmark. A test compares both.
"""

from __future__ import annotations

import functools
from datetime import date
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from vllm_edits.server_config.settings import PROFILES, Profile

FILE = Path(__file__).with_suffix(".json")
LEAST = 0.99
"""The part of vLLM's own speed that the default profile must keep at rest."""


class ProfileCost(BaseModel):
    """Speed of a server that holds a profile and answers no edited request, divided by that of vLLM alone.

    decode and prefill: ratios of tokens per second; 1.0 is no cost, None is not measured
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: Profile
    device: str = Field(min_length=1)
    shape: str = Field(min_length=1, description="The model.")
    reserved: str = Field(min_length=1, description="What was reserved, in words.")
    decode: float | None = Field(default=None, gt=0)
    prefill: float | None = Field(default=None, gt=0)
    date: date
    record: str = Field(pattern=r"^[\w.-]+\.json$", description="File under loadtests/results.")

    @property
    def low(self) -> bool:
        """True if decode and prefill were measured and neither lost more than LEAST allows."""
        return all(speed is not None and speed >= LEAST for speed in (self.decode, self.prefill))


_COSTS = TypeAdapter(tuple[ProfileCost, ...])


@functools.cache
def read_costs(file: Path = FILE) -> tuple[ProfileCost, ...]:
    """Every measured cost. ValidationError if the file does not have the form."""
    return _COSTS.validate_json(file.read_bytes())


def profile_costs(profile: Profile) -> list[ProfileCost]:
    """Measured costs of one profile; empty if it was not measured."""
    return [cost for cost in read_costs() if cost.profile == profile]


def largest_at_low_cost(costs: tuple[ProfileCost, ...]) -> Profile:
    """The default profile by its rule: the largest that was measured, and at low cost each time.

    Without one it is `promoted`, which reserves least.
    """
    for profile in reversed(PROFILES):
        measured = [cost for cost in costs if cost.profile == profile]
        if measured and all(cost.low for cost in measured):
            return profile
    return "promoted"
