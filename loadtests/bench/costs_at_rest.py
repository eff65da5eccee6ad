"""Costs of the reservation profiles at rest, as the server's package has them, from records of the benchmark.

    python -m loadtests.bench.costs_at_rest RECORD... > server_config/profile_costs.json

The speed of a profile is the median of its ratios to vLLM alone, over all engines with it and all batch sizes of a
record. The part `profiles` measures a profile with nothing promoted. The part `idle` does it for `promoted`, with
versions of all kinds promoted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from vllm_edits.server_config.profile_costs import ProfileCost
from vllm_edits.server_config.settings import PROFILES, Profile

AGAIN, IDLE = " again", ", no edited request"
"""Endings of the name of a side that is there a second time, and of what a side at rest is."""


def costs_of(record: Mapping[str, Any], file: str) -> Iterator[ProfileCost]:
    """The cost of each profile that a record of the benchmark measured; file: its name."""
    for part, sides in _SIDES.items():
        found = record["summary"].get(part)
        for side, profile in sides.items():
            if found is not None and side in found["sides"]:
                yield ProfileCost(
                    profile=profile, device=record["device"]["name"], shape=record["model"],
                    reserved=found["sides"][side].removesuffix(IDLE), decode=_speed(found, side, "decode"),
                    prefill=_speed(found, side, "prefill"), date=record["at"][:10], record=file,
                )  # fmt: skip


_SIDES: Mapping[str, Mapping[str, Profile]] = {
    "profiles": {profile: profile for profile in PROFILES},
    "idle": {"idle": "promoted"},
}
"""By part of the benchmark: the sides that measure a profile."""


def _speed(part: Mapping[str, Any], side: str, phase: str) -> float | None:
    ratios = [row["median"] for row in part["ratios"]
              if row["over"] in (side, side + AGAIN) and row["phase"].startswith(f"{phase} ")]  # fmt: skip
    return round(median(ratios), 3) if ratios else None


def main(files: Annotated[list[Path], typer.Argument(help="Records in loadtests/results/.", exists=True)]) -> None:
    """Print profile_costs.json of these records."""
    costs = [cost for file in files for cost in costs_of(json.loads(file.read_text()), file.name)]
    if not costs:
        raise typer.BadParameter("none of these records has a part idle or profiles")
    json.dump([cost.model_dump(mode="json") for cost in costs], sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    typer.run(main)
