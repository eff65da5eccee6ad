"""Documents of experiments, and what was done to them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.state import ExperimentChange, Standing, after

START = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def document(**changes: Any) -> dict[str, Any]:
    """A plain document, with some fields otherwise."""
    arms = [{"name": "control", "serves": "base", "weight": 0.5}, {"name": "milder", "serves": "polite", "weight": 0.5}]
    return {"name": "tone", "model": "polite", "arms": arms, **changes}


def done(
    standings: Mapping[str, Standing], *changes: ExperimentChange | tuple[str, str], at: datetime = START
) -> dict[str, Standing]:
    """Standings after changes; a pair is (experiment, operation)."""
    found = dict(standings)
    for each in changes:
        change = each if isinstance(each, ExperimentChange) else ExperimentChange(experiment=each[0], operation=each[1])  # type: ignore[arg-type]
        found[change.experiment] = after(found, change, at)
    return found


def created(**changes: Any) -> ExperimentChange:
    made = Experiment.parse(document(**changes))
    return ExperimentChange(experiment=made.name, operation="create", document=made)
