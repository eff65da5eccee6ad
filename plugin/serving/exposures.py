"""The exposure of a request of an experiment: its record, and the metrics of its arm."""

from __future__ import annotations

from datetime import UTC, datetime

from vllm_edits.plugin.experiments.records import Exposure, Outcome
from vllm_edits.plugin.experiments.repeats import loops
from vllm_edits.plugin.experiments.routing import Assignment
from vllm_edits.plugin.metrics import Metrics
from vllm_edits.plugin.serving.lease import Usage
from vllm_edits.plugin.serving.variants import BASE, Choice


def exposure_of(choice: Choice, assignment: Assignment, usage: Usage, outcome: Outcome) -> Exposure:
    """Make the record of a request that has just ended."""
    return Exposure(
        at=datetime.now(UTC),
        request=choice.feedback_token,
        experiment=assignment.experiment,
        phase=assignment.phase,
        arm=assignment.arm,
        version=choice.version or BASE,
        unit=assignment.unit,
        source=assignment.source,
        chosen=assignment.how,
        outcome=outcome,
        prompt_tokens=usage.prompt_tokens,
        output_tokens=usage.output_tokens,
        seconds=usage.seconds,
        first_token_seconds=usage.first_token_seconds,
        seconds_per_token=usage.seconds_per_token,
        empty=bool(usage.engine_requests) and not usage.wrote,
        looping=loops(usage.tail),
        corrupted=usage.corrupted,
    )


def count(exposure: Exposure, metrics: Metrics) -> None:
    """Count a request in its arm's metrics. Times and outcomes count only if the hash chose the arm."""
    arm = exposure.experiment, exposure.arm
    metrics.exposures.labels(*arm, exposure.chosen, exposure.source).inc()
    if exposure.chosen != "hash":
        return
    metrics.arm_requests.labels(*arm, exposure.outcome).inc()
    if exposure.first_token_seconds is not None:
        metrics.arm_time_to_first_token_seconds.labels(*arm).observe(exposure.first_token_seconds)
    if exposure.seconds_per_token is not None:
        metrics.arm_time_per_output_token_seconds.labels(*arm).observe(exposure.seconds_per_token)
