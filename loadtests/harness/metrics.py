"""What a server exports to Prometheus, read by Prometheus' own parser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(frozen=True)
class Scrape:
    """One look at a server's metrics."""

    text: str

    @classmethod
    def of(cls, url: str | httpx.URL) -> Scrape:
        """What the server at `url` exports now."""
        return cls(httpx.get(httpx.URL(url).join("/metrics"), timeout=60).raise_for_status().text)

    def sum(self, name: str, **labels: str) -> float:
        """Of all samples of that name that carry these labels; 0 when there are none."""
        return sum(sample.value for sample in self._samples(name) if labels.items() <= sample.labels.items())

    def by(self, name: str, *labels: str) -> Mapping[tuple[str, ...], float]:
        """The same sums, by the values of some labels."""
        found: dict[tuple[str, ...], float] = {}
        for sample in self._samples(name):
            key = tuple(sample.labels[label] for label in labels)
            found[key] = found.get(key, 0) + sample.value
        return found

    def _samples(self, name: str) -> Iterator[Sample]:
        for family in text_string_to_metric_families(self.text):
            yield from (sample for sample in family.samples if sample.name == name)
