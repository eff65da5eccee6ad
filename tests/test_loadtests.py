"""What the load tests are made of, held against what they read."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from loadtests.metrics import Metrics


def test_metrics_are_added_up_by_name_and_labels() -> None:
    """A name is not a beginning of another, and a label's value may hold anything."""
    registry = CollectorRegistry()
    requests = Counter("requests", "how many", ["variant", "outcome"], registry=registry)
    Counter("requests_refused", "others", registry=registry).inc(100)
    Histogram("seconds", "how long", registry=registry).observe(2.5)
    for variant, outcome, count in (("a", "ok", 2), ("a", "error", 1), ('b", outcome="ok', "ok", 4)):
        requests.labels(variant, outcome).inc(count)
    metrics = Metrics(generate_latest(registry).decode())
    assert metrics.sum("requests_total") == 7
    assert metrics.sum("requests_total", outcome="ok") == 6
    assert metrics.sum("requests_total", outcome="ok", variant="a") == 2
    assert metrics.sum("seconds_sum") == 2.5
    assert metrics.sum("requests") == metrics.sum("requests_total", variant="none") == 0
    assert metrics.by("requests_total", "variant") == {("a",): 3, ('b", outcome="ok',): 4}
