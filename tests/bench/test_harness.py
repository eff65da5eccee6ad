"""What the load tests are made of, held against what they read."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from loadtests.harness.metrics import Scrape
from loadtests.harness.model import made_whole


def test_metrics_are_added_up_by_name_and_labels() -> None:
    """A name is not a beginning of another, and a label's value may hold anything."""
    registry = CollectorRegistry()
    requests = Counter("requests", "how many", ["variant", "outcome"], registry=registry)
    Counter("requests_refused", "others", registry=registry).inc(100)
    Histogram("seconds", "how long", registry=registry).observe(2.5)
    for variant, outcome, count in (("a", "ok", 2), ("a", "error", 1), ('b", outcome="ok', "ok", 4)):
        requests.labels(variant, outcome).inc(count)
    metrics = Scrape(generate_latest(registry).decode())
    assert metrics.sum("requests_total") == 7
    assert metrics.sum("requests_total", outcome="ok") == 6
    assert metrics.sum("requests_total", outcome="ok", variant="a") == 2
    assert metrics.sum("seconds_sum") == 2.5
    assert metrics.sum("requests") == metrics.sum("requests_total", variant="none") == 0
    assert metrics.by("requests_total", "variant") == {("a",): 3, ('b", outcome="ok',): 4}


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """Of two that make it at once the quicker one's stays; what was not ended leaves nothing."""
    folder = tmp_path / "models" / "tiny"
    with suppress(KeyboardInterrupt), made_whole(folder) as made:
        made.mkdir()
        raise KeyboardInterrupt
    assert not list(folder.parent.iterdir())
    with made_whole(folder) as slower:
        slower.mkdir()
        with made_whole(folder) as quicker:
            quicker.mkdir()
            (quicker / "weights").touch()
    assert [file.name for file in folder.iterdir()] == ["weights"]
    assert list(folder.parent.iterdir()) == [folder]
