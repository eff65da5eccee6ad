"""A real Prometheus that scrapes servers of the tests, with the configuration that is shipped."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from loadtests.harness.server import free_port

SHIPPED = Path(__file__).parents[2] / "docker" / "prometheus.yml"
START_SECONDS = 30
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no prometheus here")


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    url: str

    def by(self, expression: str, *labels: str) -> Mapping[tuple[str, ...], float]:
        """What an expression is now, by the values of some labels."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10)
        answer.raise_for_status()
        found = answer.json()["data"]["result"]
        return {tuple(row["metric"].get(label, "") for label in labels): float(row["value"][1]) for row in found}


@contextmanager
def prometheus(servers: Sequence[str], folder: Path) -> Iterator[Prometheus]:
    """Scrape servers, by their URLs, every second."""
    config = yaml.safe_load(SHIPPED.read_text())
    config["global"]["scrape_interval"] = "1s"
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [url.removeprefix("http://") for url in servers]}]
    folder.mkdir(parents=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    where = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={where}", "--log.level=warn",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        running = Prometheus(f"http://{where}")
        began = time.monotonic()
        while not _scrapes(running, len(servers)):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() - began < START_SECONDS, "not every server was scraped"
            time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        process.wait()


def _scrapes(running: Prometheus, servers: int) -> bool:
    with suppress(httpx.HTTPError):
        return sum(running.by("up", "instance").values()) == servers
    return False
