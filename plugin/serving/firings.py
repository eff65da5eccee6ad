"""Counters of gate firings that only grow, computed from totals that restart with every install. No IO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vllm_edits.plugin.metrics import Metrics


class FiringTotals:
    """The totals that were counted for each version on the device."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seen: dict[tuple[str, int], Counter[str]] = {}
        """by version and worker: tokens under '', firings under the name of an edit"""

    def count(self, name: str, version: str, worker: int, tokens: int, firings: Mapping[str, int]) -> tuple[int, int]:
        """Count the growth of a version's totals on a worker since the last call.

        tokens, firings: totals since the version was installed. Returns the new tokens, and the new firings.
        """
        total = Counter({"": tokens, **firings})
        new = total - self._seen.get((version, worker), Counter())
        self._seen[version, worker] = total
        labels = self._metrics.labels(name, version)
        self._metrics.gate_tokens.labels(*labels).inc(new[""])
        for edit in firings:
            self._metrics.gate_firings.labels(*labels, edit).inc(new[edit])
        return new[""], sum(new[edit] for edit in firings)

    def forget(self, version: str) -> None:
        """Forget a version that left the device. When it returns, its totals restart from zero."""
        self._seen = {key: total for key, total in self._seen.items() if key[0] != version}
