"""Every metric the plugin exports, declared once. The README's table is checked against METRICS.

Only the API process exports. Names start with `vllm_edits_`: vLLM unregisters everything that starts with `vllm:`.
"""

from __future__ import annotations

import os
import time
from collections import Counter as Counted
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Summary
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as PrometheusMetric
from prometheus_client.registry import Collector

PREFIX = "vllm_edits_"
OTHER = "other"
"""Variant and version beyond the label limit."""
UNKNOWN = "unknown"
"""Variant of a request that named none that is served."""

Seconds = tuple[float, ...]
_Pair = tuple[str, str]
"""A variant and the first digits of its version."""
_SEVERAL_PROCESSES = "PROMETHEUS_MULTIPROC_DIR"

# The edges of vLLM's own latency histograms, so that panels line up; a test compares them with vLLM's.
REQUEST: Seconds = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FIRST_TOKEN: Seconds = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
PER_TOKEN: Seconds = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
PHASE: Seconds = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass(frozen=True)
class Metric:
    """One series: `edges` are a histogram's buckets; `across_processes` joins the gauges of several.

    One that is `asked` is no attribute of Metrics: whoever has it is asked for it at each scrape.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram", "summary"]
    help: str
    labels: tuple[str, ...] = ()
    edges: Seconds = ()
    across_processes: Literal["mostrecent", "livesum"] = "mostrecent"
    asked: bool = False


METRICS = (
    Metric(
        "requests",
        "counter",
        "Requests by how they ended: ok, aborted, error, rejected.",
        ("variant", "version", "outcome"),
    ),
    Metric("tokens", "counter", "Tokens by kind: prompt, generation.", ("variant", "version", "kind")),
    Metric("request_seconds", "histogram", "Whole request, from its arrival to its last byte.", ("variant",), REQUEST),
    Metric("time_to_first_token_seconds", "histogram", "From arrival to the first token.", ("variant",), FIRST_TOKEN),
    Metric(
        "time_per_output_token_seconds",
        "histogram",
        "Mean time between output tokens of a request.",
        ("variant",),
        PER_TOKEN,
    ),
    Metric("requests_in_flight", "gauge", "Requests being answered.", ("variant",), across_processes="livesum"),
    Metric(
        "requests_waiting", "gauge", "Requests and swaps that wait for a slot: more versions are asked for than fit."
    ),
    Metric("slots_total", "gauge", "Versions that fit on the device at once."),
    Metric("slots_used", "gauge", "Versions on the device."),
    Metric(
        "version_lookups",
        "counter",
        "Requests for a version by where it was found: device, host (ready in the workers' memory), store.",
        ("found",),
    ),
    Metric(
        "page_in_seconds",
        "histogram",
        "Wait of a request for a version that was not on the device, by where it was found.",
        ("found",),
        PHASE,
    ),
    Metric("installs", "counter", "Versions installed on every worker: ok, refused, error.", ("result",)),
    Metric("swaps", "counter", "Promotions, rollbacks and withdrawals followed: ok, refused, error.", ("result",)),
    Metric(
        "swap_seconds",
        "histogram",
        "Swap time by phase: fetch, verify, stage, wait (before the weights change), install, drain.",
        ("phase",),
        PHASE,
    ),
    Metric("store_head_age_seconds", "gauge", "Time since the store's heads were last read."),
    Metric("store_errors", "counter", "Looks at the store that failed."),
    Metric("signature_policy", "gauge", "1 for what is done about signatures: require, warn, off.", ("mode",)),
    Metric("bundles_rejected", "counter", "Reasons bundles were refused for.", ("reason",)),
    Metric(
        "gate_firings",
        "counter",
        "Tokens for which a neuron of a gate gave something, by the gate's site.",
        ("variant", "version", "edit"),
    ),
    Metric(
        "gate_tokens",
        "counter",
        "Tokens computed with a version that has gates, of which its firings are; cached prefixes are not computed.",
        ("variant", "version"),
    ),
    Metric(
        "exposures",
        "counter",
        "Requests of experiments by arm; chosen by `hash`, `forced`, or `fallback` (the control); and by unit source.",
        ("experiment", "arm", "chosen", "source"),
    ),
    Metric(
        "arm_requests",
        "counter",
        "Requests that were assigned by hash, by how they ended.",
        ("experiment", "arm", "outcome"),
    ),
    Metric(
        "arm_time_to_first_token_seconds",
        "histogram",
        "The same: from arrival to the first token.",
        ("experiment", "arm"),
        FIRST_TOKEN,
    ),
    Metric(
        "arm_time_per_output_token_seconds",
        "histogram",
        "The same: mean time between output tokens of a request.",
        ("experiment", "arm"),
        PER_TOKEN,
    ),
    Metric("feedback", "summary", "Values that clients reported, by metric.", ("experiment", "arm", "metric")),
    Metric(
        "guardrail_failures", "gauge", "Failed measurements since the last success.", ("experiment", "arm", "metric")
    ),
    Metric("experiment_rollbacks", "counter", "Arms that this server withdrew.", ("experiment", "arm", "metric")),
    Metric("exposures_lost", "gauge", "Requests of experiments that could not be written down."),
    Metric(
        "variant_info",
        "gauge",
        "1 for the version a variant serves, 0 for one it served before.",
        ("variant", "version"),
    ),
    Metric(
        "variants_info",
        "gauge",
        "Variants with running and with waiting requests, in the labels of vLLM's lora_requests_info; the time.",
        ("running_lora_adapters", "waiting_lora_adapters", "max_lora"),
        asked=True,
    ),
    Metric(
        "variant_loaded",
        "gauge",
        "1 for each name under which a version on the device is served, in the labels of routers for adapters.",
        ("adapter_name", "level", "pinned"),
        asked=True,
    ),
    Metric(
        "server_info",
        "gauge",
        "1; what every series here can be joined with to name the base model.",
        ("model_name", "plugin", "vllm"),
    ),
)


@dataclass(frozen=True)
class VariantsNow:
    """Names of variants, as clients know them, and how many versions fit on the device."""

    running: AbstractSet[str]
    waiting: AbstractSet[str]
    """have requests that wait for a slot, and none that runs"""
    loaded: AbstractSet[str]
    """their versions are on the device"""
    slots: int


class Metrics:
    """The metrics, as attributes of their short names, in one registry."""

    requests: Counter
    tokens: Counter
    request_seconds: Histogram
    time_to_first_token_seconds: Histogram
    time_per_output_token_seconds: Histogram
    requests_in_flight: Gauge
    requests_waiting: Gauge
    slots_total: Gauge
    slots_used: Gauge
    version_lookups: Counter
    page_in_seconds: Histogram
    installs: Counter
    swaps: Counter
    swap_seconds: Histogram
    store_head_age_seconds: Gauge
    store_errors: Counter
    signature_policy: Gauge
    bundles_rejected: Counter
    gate_firings: Counter
    gate_tokens: Counter
    exposures: Counter
    arm_requests: Counter
    arm_time_to_first_token_seconds: Histogram
    arm_time_per_output_token_seconds: Histogram
    feedback: Summary
    guardrail_failures: Gauge
    experiment_rollbacks: Counter
    exposures_lost: Gauge
    variant_info: Gauge
    server_info: Gauge

    def __init__(self, registry: CollectorRegistry = REGISTRY, *, label_limit: int = 256) -> None:
        self._label_limit = label_limit
        self._pairs: OrderedDict[_Pair, None] = OrderedDict()  # least recently used first
        self._served: AbstractSet[_Pair] = frozenset()
        self._in_flight: Counted[_Pair] = Counted()
        self._counted_as: dict[_Pair, str] = {}
        self._variants: Callable[[], VariantsNow] | None = None
        registry.register(_Asked(self._tell_variants))
        for metric in METRICS:
            if metric.asked:
                continue
            name = PREFIX + metric.name
            made: Counter | Gauge | Histogram | Summary
            if metric.kind == "counter":
                made = Counter(name, metric.help, metric.labels, registry=registry)
            elif metric.kind == "gauge":
                made = Gauge(
                    name, metric.help, metric.labels, registry=registry, multiprocess_mode=metric.across_processes
                )
            elif metric.kind == "summary":
                made = Summary(name, metric.help, metric.labels, registry=registry)
            else:
                made = Histogram(name, metric.help, metric.labels, registry=registry, buckets=metric.edges)
            setattr(self, metric.name, made)

    def labels(self, variant: str, version: str | None) -> tuple[str, str]:
        """Label values for a variant and its version (12 digits; empty for the base), bounded in number.

        What is served has labels of its own. Others have them up to `label_limit` pairs: a new one takes the place of
        the pair that was used least recently, and is `other` where none can go, so that no stream of promotions fills a
        Prometheus.
        """
        pair = _pair(variant, version)
        if pair in self._pairs:
            self._pairs.move_to_end(pair)
            return pair
        while len(self._pairs) >= self._label_limit and self._make_place():
            pass
        if len(self._pairs) < self._label_limit or pair in self._served:
            self._pairs[pair] = None
            return pair
        return OTHER, OTHER

    def serves(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Say which versions of which variants are served from now on."""
        self._served = frozenset(_pair(*each) for each in pairs)

    def _make_place(self) -> bool:
        """Forget the series of a pair that is neither served nor in flight; whether there was one."""
        if _SEVERAL_PROCESSES in os.environ:  # there a series that is removed comes back from its file
            return False
        kept = self._served | self._in_flight.keys()
        gone = next((pair for pair in self._pairs if pair not in kept and pair[1]), None)
        if gone is None:
            return False
        del self._pairs[gone]
        last = all(variant != gone[0] for variant, _ in self._pairs)
        for metric in METRICS:
            if metric.labels[:2] == ("variant", "version"):
                getattr(self, metric.name).remove_by_labels({"variant": gone[0], "version": gone[1]})
            elif last and metric.labels == ("variant",):
                getattr(self, metric.name).remove_by_labels({"variant": gone[0]})
        return True

    def enter(self, variant: str, version: str | None) -> None:
        """Count a request in. Its labels stay what they are until it has left."""
        pair = _pair(variant, version)
        if not self._in_flight[pair]:
            self._counted_as[pair] = self.labels(variant, version)[0]
        self._in_flight[pair] += 1
        self.requests_in_flight.labels(self._counted_as[pair]).inc()

    def leave(self, variant: str, version: str | None) -> None:
        """Count a request out."""
        pair = _pair(variant, version)
        self.requests_in_flight.labels(self._counted_as[pair]).dec()
        self._in_flight[pair] -= 1
        if not self._in_flight[pair]:
            del self._in_flight[pair], self._counted_as[pair]

    def follow_variants(self, now: Callable[[], VariantsNow]) -> None:
        """Ask at every scrape which variants run, wait and are on the device."""
        self._variants = now

    def _tell_variants(self) -> Iterable[PrometheusMetric]:
        info, loaded = (GaugeMetricFamily(PREFIX + metric.name, metric.help, labels=metric.labels)
                        for metric in METRICS if metric.asked)  # fmt: skip
        if self._variants is not None:
            now = self._variants()
            names = (",".join(sorted(some)) for some in (now.running, now.waiting))
            info.add_metric([*names, str(now.slots)], time.time())
            for name in sorted(now.loaded):
                loaded.add_metric([name, "gpu", "false"], 1)
        return info, loaded


class _Asked(Collector):
    """Series that are made when a scrape asks for them, in whichever thread it does.

    A server of several processes is scraped by another registry, and so never asked.
    """

    def __init__(self, tell: Callable[[], Iterable[PrometheusMetric]]) -> None:
        self._tell = tell

    def describe(self) -> Iterable[PrometheusMetric]:
        return ()

    def collect(self) -> Iterable[PrometheusMetric]:
        return self._tell()


def _pair(variant: str, version: str | None) -> _Pair:
    return variant, (version or "")[:12]
