"""What is exported: declared once, bounded in labels, and with vLLM's own bucket edges."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from tests.support.fakes import cheaply
from vllm_edits.plugin.metrics import FIRST_TOKEN, METRICS, OTHER, PER_TOKEN, PREFIX, REQUEST, Metrics, VariantsNow
from vllm_edits.plugin.serving.lease import Usage
from vllm_edits.plugin.vllm_host.engine_gate import _Watch
from vllm_edits.plugin.vllm_host.outputs import OutputReader

V1, V2 = "1" * 64, "2" * 64


def test_every_declared_metric_is_exported_under_its_name_with_its_help() -> None:
    registry = CollectorRegistry()
    made = Metrics(registry)
    exported = {metric.name: metric for metric in registry.collect()}
    assert {name.removeprefix(PREFIX) for name in exported} == {metric.name for metric in METRICS}
    for metric in METRICS:
        found = exported[PREFIX + metric.name]
        assert (found.type, found.documentation) == (metric.kind, metric.help)
        assert metric.asked or getattr(made, metric.name)._labelnames == metric.labels


def test_no_name_starts_as_vllms_do() -> None:
    """vLLM unregisters everything that starts with `vllm:` when its engine starts."""
    registry = CollectorRegistry()
    Metrics(registry).slots_total.set(3)
    text = generate_latest(registry).decode()
    assert "vllm_edits_slots_total 3.0" in text
    assert "vllm:" not in text


def test_two_registries_do_not_share_numbers() -> None:
    """Nothing is module-global: a test, or a second engine in one process, starts from zero."""
    first, second = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    first.store_errors.inc()
    assert second.store_errors._value.get() == 0


def test_labels_are_the_variant_and_twelve_digits_of_the_version() -> None:
    metrics = Metrics(CollectorRegistry())
    assert metrics.labels("polite", V1) == ("polite", "1" * 12)
    assert metrics.labels("base", None) == ("base", "")


@cheaply
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([None, V1, V2])), max_size=40), st.integers(1, 6))
def test_no_stream_of_promotions_can_fill_a_prometheus(pairs: list[tuple[str, str | None]], limit: int) -> None:
    """At most `limit` pairs have series at a time, those used last; the base keeps what it has."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, label_limit=limit)
    for variant, version in pairs:
        labels = metrics.labels(variant, version)
        assert labels in {(variant, (version or "")[:12]), (OTHER, OTHER)}
        metrics.tokens.labels(*labels, "prompt").inc()
        named = {labels for labels in series(registry, "tokens") if labels != (OTHER, OTHER)}
        assert len(named) <= limit
        assert labels in named or all(not digits for _, digits in named), "only the base's may keep all places"


def series(registry: CollectorRegistry, name: str) -> set[tuple[str, str]]:
    """Variant and version of each series of a metric."""
    return {
        (sample.labels["variant"], sample.labels["version"])
        for metric in registry.collect()
        if metric.name == PREFIX + name
        for sample in metric.samples
    }


def answered(metrics: Metrics, variant: str, version: str, *, leaves: bool = True) -> None:
    """One request is counted as the middleware does."""
    metrics.enter(variant, version)
    labels = metrics.labels(variant, version)
    metrics.tokens.labels(*labels, "prompt").inc()
    metrics.request_seconds.labels(labels[0]).observe(1)
    if leaves:
        metrics.leave(variant, version)


def test_what_is_served_has_series_of_its_own_and_what_has_gone_gives_its_place_back() -> None:
    """Four hundred variants of one request each; then the store promotes others, and one request goes on meanwhile."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, label_limit=256)
    first = [(f"old-{number}", V1) for number in range(400)]
    metrics.serves(first)
    for pair in first:
        answered(metrics, *pair, leaves=pair != first[0])
    assert series(registry, "tokens") == {(name, version[:12]) for name, version in first}
    second = [(f"new-{number}", V2) for number in range(400)]
    metrics.serves(second)
    for pair in second:
        answered(metrics, *pair)
    assert series(registry, "tokens") == {(name, version[:12]) for name, version in [first[0], *second]}
    metrics.leave(*first[0])
    in_flight = {sample.labels["variant"]: sample.value for metric in registry.collect()
                 if metric.name == PREFIX + "requests_in_flight" for sample in metric.samples}  # fmt: skip
    assert set(in_flight.values()) == {0}
    assert in_flight.keys() == {name for name, _ in [first[0], *second]}
    assert registry.get_sample_value(PREFIX + "request_seconds_count", {"variant": "old-7"}) is None
    assert registry.get_sample_value(PREFIX + "request_seconds_count", {"variant": "new-7"}) == 1


def test_with_several_processes_a_place_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a series that is removed comes back from its file: what is not served is `other` then."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/none")
    metrics = Metrics.__new__(Metrics)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PROMETHEUS_MULTIPROC_DIR")
        metrics.__init__(CollectorRegistry(), label_limit=1)  # type: ignore[misc]
    metrics.serves([("served", V1)])
    assert metrics.labels("polite", V1) == ("polite", "1" * 12)
    assert metrics.labels("strict", V1) == (OTHER, OTHER)
    assert metrics.labels("served", V1) == ("served", "1" * 12)


def test_a_router_sees_which_variants_run_and_wait() -> None:
    """One series at a time, in the labels by which endpoint pickers know adapters."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    assert not told(registry, "variants_info")
    for running, waiting, loaded in (({"b", "a"}, set(), {"a", "b"}), (set(), {"c"}, {"a"}), (set(), set(), set())):
        metrics.follow_variants(lambda: VariantsNow(running, waiting, loaded, 4))  # noqa: B023
        (labels,) = told(registry, "variants_info")
        assert labels == {"running_lora_adapters": ",".join(sorted(running)), "max_lora": "4",
                          "waiting_lora_adapters": ",".join(waiting)}  # fmt: skip
        assert told(registry, "variant_loaded") == [
            {"adapter_name": name, "level": "gpu", "pinned": "false"} for name in sorted(loaded)
        ]


def told(registry: CollectorRegistry, name: str) -> list[dict[str, str]]:
    """The labels of a metric's series."""
    return [sample.labels for metric in registry.collect() if metric.name == PREFIX + name for sample in metric.samples]


@pytest.mark.parametrize(
    ("edges", "family"),
    [
        (REQUEST, "REQUEST_LATENCY_BUCKETS"),
        (FIRST_TOKEN, "TIME_TO_FIRST_TOKEN_BUCKETS"),
        (PER_TOKEN, "INTER_TOKEN_LATENCY_BUCKETS"),
    ],
)
def test_bucket_edges_are_vllms_own(edges: tuple[float, ...], family: str) -> None:
    """So that panels line up. vLLM's file is run alone: importing vLLM takes seconds."""
    vllm = importlib.util.find_spec("vllm")
    folders = vllm.submodule_search_locations if vllm is not None else None
    path = Path(folders[0]) / "v1/metrics/buckets.py" if folders else None
    if path is None or not path.is_file():
        pytest.skip("this vLLM keeps its bucket edges elsewhere")
    assert edges == runpy.run_path(str(path))[family]


def test_edges_rise() -> None:
    for metric in METRICS:
        assert list(metric.edges) == sorted(set(metric.edges))
        assert bool(metric.edges) == (metric.kind == "histogram")


# -- what the engine says about a request ------------------------------------------------------------------------------


def watch_of(usage: Usage, kind: str, *, keeps_tail: bool = False) -> _Watch:
    """What counts a request whose outputs hold what is new (DELTA) or all so far."""
    sampling = SimpleNamespace(output_kind=SimpleNamespace(name=kind))
    return _Watch(usage, OutputReader(sampling), keeps_tail=keeps_tail)


def output(lengths: dict[int, int], finish: str | None = None, **stamps: float) -> Any:
    """One of the engine's outputs: so many token ids for each of a request's answers."""
    answers = [
        SimpleNamespace(index=index, token_ids=[0] * length, text=" word" * length, finish_reason=finish, logprobs=None)
        for index, length in lengths.items()
    ]
    return SimpleNamespace(
        prompt_token_ids=[0] * 5,
        outputs=answers,
        metrics=SimpleNamespace(is_corrupted=False, **stamps) if stamps else None,
    )


@cheaply
@given(st.lists(st.dictionaries(st.integers(0, 2), st.integers(0, 3), min_size=1), min_size=1, max_size=6))
def test_tokens_are_counted_once_however_the_engine_reports_them(steps: list[dict[int, int]]) -> None:
    """Deltas, running totals and one final output of n answers come to the same sum."""
    totals = {index: sum(step.get(index, 0) for step in steps) for index in range(3)}
    running: dict[int, int] = {}
    usages = [Usage(), Usage(), Usage()]
    deltas, cumulative, final = (
        watch_of(usage, "FINAL_ONLY" if number else "DELTA") for number, usage in enumerate(usages)
    )
    for step in steps:
        deltas.see(output(step))
        running = {index: running.get(index, 0) + step.get(index, 0) for index in running.keys() | step.keys()}
        cumulative.see(output(running))
    final.see(output(totals))
    assert {usage.output_tokens for usage in usages} == {sum(totals.values())}
    assert {usage.prompt_tokens for usage in usages} == {5}


def test_the_engines_own_times_are_used_where_it_gives_them() -> None:
    """A whole answer arrives at once here, but its first token was long before."""
    usage = Usage()
    watch_of(usage, "FINAL_ONLY").see(output({0: 4}, "length", first_token_ts=10.0, last_token_ts=13.0))
    assert (usage.first_token, usage.last_token) == (10.0, 13.0)
    without = Usage()
    watch_of(without, "FINAL_ONLY").see(output({0: 4}, "length"))
    assert without.first_token is not None
    assert without.first_token >= without.started


def test_several_engine_requests_of_one_http_request_add_up() -> None:
    """A list of prompts, or beam search: one request to the client."""
    usage = Usage()
    for stamp in (12.0, 11.0):
        watch_of(usage, "DELTA").see(output({0: 2}, first_token_ts=stamp, last_token_ts=stamp + 1))
    assert (usage.engine_requests, usage.prompt_tokens, usage.output_tokens) == (2, 10, 4)
    assert usage.first_token == 11.0


@pytest.mark.parametrize(("reason", "aborted"), [("abort", True), ("stop", False), ("length", False), (None, False)])
def test_an_abort_of_the_engine_is_seen(reason: str | None, aborted: bool) -> None:
    usage = Usage()
    watch_of(usage, "DELTA").see(output({0: 1}, reason))
    assert usage.aborted == aborted


def test_whether_anything_was_written_and_the_last_tokens() -> None:
    """Spaces are nothing; the tail is of the first answer, and only kept where it is asked for."""
    usage = Usage()
    watch = watch_of(usage, "DELTA", keeps_tail=True)
    blank = output({0: 1, 1: 2})
    blank.outputs[0].text, blank.outputs[1].text = " ", "\n"
    watch.see(blank)
    assert not usage.wrote
    for _ in range(100):
        watch.see(output({0: 2, 1: 3}))
    assert usage.wrote
    assert usage.tail == [0] * 128
    without, cumulative = Usage(), Usage()
    watch_of(without, "DELTA").see(output({0: 2}))
    totals = watch_of(cumulative, "FINAL_ONLY", keeps_tail=True)
    for length in (1, 3, 4):
        totals.see(output({0: length}))
    assert (without.tail, cumulative.tail) == ([], [0] * 4)
