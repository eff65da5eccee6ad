"""A store with an experiment of two arms."""

from __future__ import annotations

from typing import Any

from tests.support.experiments import document
from vllm_edits.edit_store.experiments.document import Experiment


def two_arms(control: str, treatment: str, **changes: Any) -> Experiment:
    arms = [
        {"name": "control", "serves": control, "weight": 0.5},
        {"name": "milder", "serves": treatment, "weight": 0.5},
    ]
    return Experiment.parse(document(arms=arms, **changes))
