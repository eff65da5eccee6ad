"""What an experiment costs a request in the server's process, without an engine: `python -m loadtests.micro.deciding`.

Which arm it gets is decided, and when it has ended that is written down, counted and held against the guardrails.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from vllm_edits.edit_store.experiments.document import BUILT_IN, Experiment
from vllm_edits.edit_store.experiments.state import ExperimentChange, Standing, after
from vllm_edits.plugin.experiments.exposure_log import ExposureLog
from vllm_edits.plugin.experiments.feedback_token import FeedbackTokens
from vllm_edits.plugin.experiments.live_experiments import LiveExperiments
from vllm_edits.plugin.experiments.records import Exposure
from vllm_edits.plugin.experiments.routing import Assignment
from vllm_edits.plugin.metrics import Metrics
from vllm_edits.plugin.request import Request
from vllm_edits.plugin.serving import exposures
from vllm_edits.plugin.version_info import NO_INFO

REQUESTS, REPEATS = 500, 9
app = typer.Typer(add_completion=False)


@app.command()
def main(
    experiments: Annotated[
        list[int] | None, typer.Option(help="Number of experiments that run.", show_default="1, 10, 100")
    ] = None,
) -> None:
    """Measure the time that experiments add to a request: choosing its arm, and
    recording its outcome.

    Every experiment is about a model name of its own. It starts no engine.
    """
    table = Table("experiments", "deciding", "noting", title="µs a request, a rule for each metric")
    with tempfile.TemporaryDirectory() as folder:
        for number in experiments or (1, 10, 100):
            deciding, noting = asyncio.run(_measured(number, Path(folder)))
            table.add_row(str(number), f"{deciding:.0f}", f"{noting:.0f}")
    Console().print(table)


async def _measured(number: int, folder: Path) -> tuple[float, float]:
    metrics = Metrics(CollectorRegistry())
    served = LiveExperiments(
        metrics, ExposureLog(folder, 64 << 20), FeedbackTokens(b"k" * 32),
        prepare=_nothing, append=print, info=lambda _: NO_INFO,
    )  # fmt: skip
    served.follow({f"experiment-{each}": _started(f"experiment-{each}") for each in range(number)})
    requests = [Request("model-0", headers={"x-edits-unit": f"user-{unit}"}, id="request") for unit in range(REQUESTS)]
    deciding, noting = [], []
    for _ in range(REPEATS):
        began = time.perf_counter()
        routes = [served.route(request) for request in requests]
        decided = time.perf_counter()
        for route in routes:
            if route.assignment is not None:
                exposure = _exposure(route.assignment, route.feedback_token)
                exposures.count(exposure, metrics)
                served.record(exposure)
        noted = time.perf_counter()
        deciding.append(decided - began)
        noting.append(noted - decided)
    return statistics.median(deciding) / REQUESTS * 1e6, statistics.median(noting) / REQUESTS * 1e6


async def _nothing(name: str, version: str) -> None:
    """Every version is ready."""


def _started(name: str) -> Standing:
    rules = [{"metric": metric, "maximum": 1000} for metric in BUILT_IN]
    arms = [{"name": arm, "serves": "base", "weight": 0.5} for arm in ("control", "treatment")]
    document = Experiment.parse(
        {"name": name, "model": name.replace("experiment", "model"), "arms": arms, "guardrails": rules}
    )
    now = datetime.now(UTC)
    made = after({}, ExperimentChange(experiment=name, operation="create", document=document), now, "")
    return after({name: made}, ExperimentChange(experiment=name, operation="start"), now, "")


def _exposure(given: Assignment, handle: str) -> Exposure:
    return Exposure(
        at=datetime.now(UTC), request=handle, experiment=given.experiment, phase=given.phase, arm=given.arm,
        version="base", unit=given.unit, source=given.source, chosen=given.how, outcome="ok", prompt_tokens=100,
        output_tokens=100, seconds=2.0, first_token_seconds=0.1, seconds_per_token=0.02, empty=False, looping=False,
        corrupted=False,
    )  # fmt: skip


if __name__ == "__main__":
    app()
