"""How often gates fire, as a counter that only grows, from totals that begin anew with every install. No IO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vllm_edits.plugin.metrics import Metrics


class FiringTotals:
    """What has been counted of each version on the device."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seen: dict[tuple[str, int], Counter[str]] = {}
        """by version and worker: its tokens under '', firings under the name of an edit"""

    def count(self, name: str, version: str, worker: int, tokens: int, firings: Mapping[str, int]) -> tuple[int, int]:
        """Add what is new of a bundle's version on a worker, whose totals since it was installed are given.

        Returns how many tokens are new, and how many firings in them.
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
        """A version left the device: when it comes back it counts from zero."""
        self._seen = {key: total for key, total in self._seen.items() if key[0] != version}
