"""How often gates fire, as a counter that only grows, from totals that begin anew with every install. No IO."""

from __future__ import annotations

from plugin.metrics import Metrics


class Firings:
    """What has been counted of each version on the device."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seen: dict[tuple[str, str, int], int] = {}

    def count(self, name: str, version: str, edit: str, worker: int, total: int) -> int:
        """Add what is new in how often an edit of a bundle's version has fired on a worker since it was installed.

        Returns what is new.
        """
        new = total - self._seen.get((version, edit, worker), 0)
        self._seen[version, edit, worker] = total
        self._metrics.gate_firings.labels(*self._metrics.labels(name, version), edit).inc(new)
        return new

    def forget(self, version: str) -> None:
        """A version left the device: when it comes back it counts from zero."""
        self._seen = {key: total for key, total in self._seen.items() if key[0] != version}
