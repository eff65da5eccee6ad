"""Declares every metric of the plugin. A test compares README.md's table with METRICS.

Only the API process exports metrics. Names start with `vllm_edits_`, because vLLM unregisters every metric whose name
starts with `vllm:`.
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
"""Label of variants and versions beyond the label limit."""
UNKNOWN = "unknown"
"""Label of a request whose model name is not served."""

Edges = tuple[float, ...]
_Pair = tuple[str, str]
"""A variant and the first digits of its version."""
_SEVERAL_PROCESSES = "PROMETHEUS_MULTIPROC_DIR"

# The edges of vLLM's own latency histograms, so that panels line up; a test compares them with vLLM's.
REQUEST: Edges = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FIRST_TOKEN: Edges = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
PER_TOKEN: Edges = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
PHASE: Edges = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

GROWTH: Edges = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


@dataclass(frozen=True)
class Metric:
    """The declaration of one metric.

    edges: upper bounds of a histogram's buckets. across_processes: how the gauges of several API processes are joined.
    asked: the value is computed at each scrape by a callback (`Metrics.follow_variants`), so `Metrics` has no attribute
    for it.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram", "summary"]
    help: str
    labels: tuple[str, ...] = ()
    edges: Edges = ()
    across_processes: Literal["mostrecent", "livesum"] = "mostrecent"
    asked: bool = False


METRICS = (
    Metric(
        "requests",
        "counter",
        "Requests by outcome: ok, aborted, error, rejected.",
        ("variant", "version", "outcome"),
    ),
    Metric("tokens", "counter", "Tokens by kind: prompt, generation.", ("variant", "version", "kind")),
    Metric(
        "request_seconds",
        "histogram",
        "Time from the arrival of a request to the last byte of its answer.",
        ("variant",),
        REQUEST,
    ),
    Metric(
        "time_to_first_token_seconds",
        "histogram",
        "Time from the arrival of a request to its first token.",
        ("variant",),
        FIRST_TOKEN,
    ),
    Metric(
        "time_per_output_token_seconds",
        "histogram",
        "Mean time between the output tokens of a request.",
        ("variant",),
        PER_TOKEN,
    ),
    Metric(
        "requests_in_flight", "gauge", "Requests that have not ended yet.", ("variant",), across_processes="livesum"
    ),
    Metric("requests_waiting", "gauge", "Requests and swaps that wait for a slot, because all slots are in use."),
    Metric("slots_total", "gauge", "Number of slots: versions that fit on the device at once."),
    Metric("slots_used", "gauge", "Versions on the device."),
    Metric(
        "version_lookups",
        "counter",
        "Requests by where their version was: device (in a slot), host (ready in the workers' memory), store.",
        ("found",),
    ),
    Metric(
        "page_in_seconds",
        "histogram",
        "Time that a request waited for its version to get a slot, by where the version was: host, store.",
        ("found",),
        PHASE,
    ),
    Metric("installs", "counter", "Installs of a version on all workers, by result: ok, refused, error.", ("result",)),
    Metric(
        "swaps",
        "counter",
        "Promotions, rollbacks and withdrawals that the server followed, by result: ok, refused, error.",
        ("result",),
    ),
    Metric(
        "swap_seconds",
        "histogram",
        "Time of each phase of a swap: fetch, verify, stage, wait (before the weights change), install, switch, drain.",
        ("phase",),
        PHASE,
    ),
    Metric(
        "probes",
        "counter",
        "Versions probed before their first request, by result: passed, weak (too little effect to tell), failed, none "
        "(no probes).",
        ("result",),
    ),
    Metric("probe_seconds", "histogram", "Time that the probes of one version took.", (), PHASE),
    Metric(
        "probe_share",
        "gauge",
        "Part of the change that the author of a version recorded which was there at the last probe; 1 if it is "
        "applied exactly.",
        ("variant", "version"),
    ),
    Metric("reserved_bytes", "gauge", "Device memory of all slots in one worker."),
    Metric("growths", "counter", "Growths of the reservation, by result: ok, error.", ("result",)),
    Metric(
        "growth_phase",
        "gauge",
        "1 for the phase of a growth that runs: planned, compiling, waiting, switching.",
        ("phase",),
    ),
    Metric("growth_seconds", "histogram", "Time of each phase of a growth of the reservation.", ("phase",), GROWTH),
    Metric(
        "growth_longest_pause_seconds",
        "gauge",
        "Longest time that the last growth kept a worker from computing a step.",
    ),
    Metric("store_head_age_seconds", "gauge", "Seconds since the server last read the store's heads."),
    Metric("store_errors", "counter", "Failed reads of the store's heads."),
    Metric(
        "signature_policy", "gauge", "1 for the mode in which signatures are checked: require, warn, off.", ("mode",)
    ),
    Metric(
        "bundles_rejected",
        "counter",
        "Reasons for which a promotion or the history of a tag was refused.",
        ("reason",),
    ),
    Metric(
        "gate_firings",
        "counter",
        "Tokens for which a neuron of a gate was active, by the gate's site.",
        ("variant", "version", "edit"),
    ),
    Metric(
        "gate_tokens",
        "counter",
        "Tokens computed with a version that has gates. Tokens from the prefix cache are not counted.",
        ("variant", "version"),
    ),
    Metric(
        "exposures",
        "counter",
        "Requests of experiments by arm, by how the arm was chosen (hash, forced, fallback), and by the source of the "
        "unit.",
        ("experiment", "arm", "chosen", "source"),
    ),
    Metric(
        "arm_requests",
        "counter",
        "Requests whose arm was chosen by hash, by outcome: ok, aborted, error, rejected.",
        ("experiment", "arm", "outcome"),
    ),
    Metric(
        "arm_time_to_first_token_seconds",
        "histogram",
        "Requests whose arm was chosen by hash: time from arrival to the first token.",
        ("experiment", "arm"),
        FIRST_TOKEN,
    ),
    Metric(
        "arm_time_per_output_token_seconds",
        "histogram",
        "Requests whose arm was chosen by hash: mean time between the output tokens of a request.",
        ("experiment", "arm"),
        PER_TOKEN,
    ),
    Metric("feedback", "summary", "Values that clients sent as feedback, by metric.", ("experiment", "arm", "metric")),
    Metric(
        "guardrail_failures",
        "gauge",
        "Failed measurements of a guardrail since its last passed measurement.",
        ("experiment", "arm", "metric"),
    ),
    Metric(
        "experiment_rollbacks",
        "counter",
        "Withdrawals of an arm by this server, by the guardrail's metric.",
        ("experiment", "arm", "metric"),
    ),
    Metric("exposures_lost", "gauge", "Requests of experiments that could not be written to the exposure log."),
    Metric(
        "variant_info",
        "gauge",
        "1 for the version that a variant serves now, 0 for versions that it served before.",
        ("variant", "version"),
    ),
    Metric(
        "variants_info",
        "gauge",
        "Variants with running and with waiting requests, in the labels of vLLM's lora_requests_info. The value is "
        "the time.",
        ("running_lora_adapters", "waiting_lora_adapters", "max_lora"),
        asked=True,
    ),
    Metric(
        "variant_loaded",
        "gauge",
        "1 for each served name whose version is on the device, in the labels that routers for adapters read.",
        ("adapter_name", "level", "pinned"),
        asked=True,
    ),
    Metric(
        "server_info",
        "gauge",
        "Always 1. Join other metrics with it to add the base model's name.",
        ("model_name", "plugin", "vllm"),
    ),
)


@dataclass(frozen=True)
class VariantsNow:
    """The served names by state, and the number of slots."""

    running: AbstractSet[str]
    waiting: AbstractSet[str]
    """names with a request that waits for a slot, and without a running request"""
    loaded: AbstractSet[str]
    """names whose version is on the device"""
    slots: int


class Metrics:
    """The metrics in one registry. Each is an attribute by its short name."""

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
    probes: Counter
    probe_seconds: Histogram
    probe_share: Gauge
    reserved_bytes: Gauge
    growths: Counter
    growth_phase: Gauge
    growth_seconds: Histogram
    growth_longest_pause_seconds: Gauge
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
        registry.register(_AskedSeries(self._tell_variants))
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
        """The label values of a variant and its version (12 digits; empty for the base), bounded in number.

        A served version always has labels of its own. Other versions share `label_limit` pairs of labels: a new version
        replaces the pair that was used least recently. If every pair is in use, the new version is counted as `other`.
        So a stream of promotions cannot fill a Prometheus.
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
        """Set the variants and versions that are served from now on."""
        self._served = frozenset(_pair(*each) for each in pairs)

    def _make_place(self) -> bool:
        """Remove the series of a pair that is neither served nor in flight. False if there is none."""
        if _SEVERAL_PROCESSES in os.environ:  # a removed series would come back from its file
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
        """Count a request that begins. Its labels stay the same until it has left."""
        pair = _pair(variant, version)
        if not self._in_flight[pair]:
            self._counted_as[pair] = self.labels(variant, version)[0]
        self._in_flight[pair] += 1
        self.requests_in_flight.labels(self._counted_as[pair]).inc()

    def leave(self, variant: str, version: str | None) -> None:
        """Count a request that has ended."""
        pair = _pair(variant, version)
        self.requests_in_flight.labels(self._counted_as[pair]).dec()
        self._in_flight[pair] -= 1
        if not self._in_flight[pair]:
            del self._in_flight[pair], self._counted_as[pair]

    def follow_variants(self, now: Callable[[], VariantsNow]) -> None:
        """Set the callback that each scrape asks for the states of the served names."""
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


class _AskedSeries(Collector):
    """Series that are computed at each scrape, in the thread of the scrape.

    With several API processes another registry is scraped, so this one is never asked.
    """

    def __init__(self, tell: Callable[[], Iterable[PrometheusMetric]]) -> None:
        self._tell = tell

    def describe(self) -> Iterable[PrometheusMetric]:
        return ()

    def collect(self) -> Iterable[PrometheusMetric]:
        return self._tell()


def _pair(variant: str, version: str | None) -> _Pair:
    return variant, (version or "")[:12]
