"""One swap: an attempt to follow a tag, by its phases. Code, log, status and metric name them alike.

    fetch    the bundle is read out of the store
    verify   it is held against every rule and the base model
    stage    every worker reads, checks and converts it; of a variant in the weights, computes the new weights
    wait     of a variant in the weights: running requests end first
    install  it is written into a slot, or the weights, of every worker, and their digests are compared
    switch   the name means it from now on: one reference is replaced
    drain    the slot of the version before is cleared, when its last request has ended

What fails before `switch` leaves the old version serving.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, get_args

from vllm_edits.plugin.metrics import Metrics

Phase = Literal["fetch", "verify", "stage", "wait", "install", "switch", "drain"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass
class Swap:
    """One attempt to follow a tag. Seconds by phase; `error` is empty when the name was switched.

    A version of None is none: before a tag's first promotion, and after a withdrawal.
    """

    variant: str
    tag: str
    from_version: str | None
    to_version: str | None
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    seconds: dict[Phase, float] = field(default_factory=dict)
    error: str = ""
    failed_in: Phase | None = None
    """the phase that the error ended, None for one before the first"""

    @contextmanager
    def phase(self, name: Phase, metrics: Metrics) -> Iterator[None]:
        """Time what goes on inside. A phase that fails is named, and not counted in the metric."""
        start = time.monotonic()
        try:
            yield
        except BaseException:
            self.failed_in = name
            raise
        self.seconds[name] = round(time.monotonic() - start, 6)
        metrics.swap_seconds.labels(name).observe(self.seconds[name])
