"""A swap: one attempt to follow a tag, with its phases. Code, log, status and metrics use the same names.

    fetch    the bundle is read from the store
    verify   it is checked against every rule and the base model
    stage    every worker reads, checks and converts it; for a variant in the weights, it computes the new weights
    wait     for a variant in the weights: running requests finish first
    install  it is written into a slot, or into the weights, of every worker, and the workers' digests are compared
    switch   the name refers to the new version: one reference is replaced
    drain    the slot of the old version is cleared, when its last request has ended

After a failure before `switch`, the old version keeps serving. If no slot becomes free for `install` within a second,
the name is switched without it, and the first request installs the version, which every worker has ready.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from vllm_edits.plugin.metrics import Metrics

Phase = Literal["fetch", "verify", "stage", "wait", "install", "switch", "drain"]


@dataclass
class Swap:
    """One attempt to follow a tag, with the seconds of each phase. `error` is empty if the name was switched.

    A version is None before a tag's first promotion, and after a withdrawal.
    """

    variant: str
    tag: str
    from_version: str | None
    to_version: str | None
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    seconds: dict[Phase, float] = field(default_factory=dict)
    error: str = ""
    failed_in: Phase | None = None
    """the phase that failed, or None if the error came before the first phase"""
    awaits_capacity: bool = False
    """True if the reservation is growing for the version: the swap is attempted again when it has grown"""

    @contextmanager
    def phase(self, name: Phase, metrics: Metrics) -> Iterator[None]:
        """Time a phase. A failed phase is recorded in `failed_in`, and not counted in the metric."""
        start = time.monotonic()
        try:
            yield
        except BaseException:
            self.failed_in = name
            raise
        self.seconds[name] = round(time.monotonic() - start, 6)
        metrics.swap_seconds.labels(name).observe(self.seconds[name])
