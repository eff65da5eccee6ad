"""What filling a step costs the runner, without an engine: `python -m loadtests.micro.step`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from vllm_edits.edit_store import Scope
from vllm_edits.plugin.graph.step import Step
from vllm_edits.plugin.graph.step_filler import Extents, StepBatch, StepFiller

SLOTS, STEPS, REPEATS = 64, 100, 9
SCOPES = (Scope(segment="generated"),)
app = typer.Typer(add_completion=False)


@app.command()
def main(requests: Annotated[int, typer.Option(min=1, help="Requests that decode together.")] = 256) -> None:
    """Measure the time to fill a step of decoding requests: base, edited, and
    edited with a scope.

    It starts no engine. Each kind is measured with the same requests in every
    step, and with one new request per step.
    """
    table = Table("requests", "the same each step", "one exchanged each step", title=f"{requests} requests, µs a step")
    for kind in ("base", "edited", "scoped"):
        table.add_row(kind, *(f"{_microseconds(kind, requests, exchanged=each):.0f}" for each in (False, True)))
    Console().print(table)


def _microseconds(kind: str, count: int, *, exchanged: bool) -> float:
    def request(number: int) -> Any:
        return SimpleNamespace(claim=None if kind == "base" else [1 + number % SLOTS, "v", 1.0])

    scopes = dict.fromkeys(range(1, SLOTS + 1), SCOPES if kind == "scoped" else ())
    step = Step(max(8192, count), 1 + len(SCOPES), torch.device("cpu"))
    filler = StepFiller(step, lambda claim: 0 if claim is None else int(claim[0]), scopes, slots=SLOTS)
    running = [request(number) for number in range(count)]
    tokens, starts, prompts = np.ones(count, dtype=np.int64), np.full(count, 100), np.full(count, 50)

    ids = torch.zeros(count, dtype=torch.int64)

    def fill() -> None:
        if exchanged:
            running[0] = request(0)
        extents = Extents(tokens, starts, lambda: prompts, ids)
        filler.fill(StepBatch(list(running), lambda each: each.claim, lambda _: None, lambda: extents))

    return statistics.median(_timed(fill) for _ in range(REPEATS))


def _timed(act: Callable[[], None]) -> float:
    begin = time.perf_counter()
    for _ in range(STEPS):
        act()
    return (time.perf_counter() - begin) / STEPS * 1e6


if __name__ == "__main__":
    app()
