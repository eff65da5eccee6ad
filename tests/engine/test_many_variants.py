"""Four hundred variants on one server, asked once each over HTTP, and then every series looked at."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtests.harness.client import complete
from loadtests.harness.metrics import Scrape
from loadtests.harness.server import Server
from tests.proofs.parity import random_numbers
from tests.support.bundles import base_of, bundle_of, publish
from vllm_edits.edit_store import EditStore, Offset
from vllm_edits.plugin.metrics import METRICS, OTHER, PREFIX

pytestmark = pytest.mark.vllm

VARIANTS, MORE, SLOTS, LIMIT = 400, 40, 8, 256
FLAGS = ("--dtype", "float32", "--max-model-len", "256")
REQUESTS = "vllm_edits_requests_total"


def test_every_variant_that_is_served_has_series_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    """Also beyond the limit on label pairs, which is for what has gone; that gives its place to what comes."""
    base, store = base_of(tiny_model), EditStore(str(tmp_path / "store"), create=True)
    edit = Offset(site="layers.1.resid")
    names = [f"variant-{number:03}" for number in range(VARIANTS + MORE)]
    bundles = {name: bundle_of(name, base, [(edit, random_numbers(edit, base, seed))])
               for seed, name in enumerate(names)}  # fmt: skip
    now, later = names[:VARIANTS], names[VARIANTS:]
    versions = {name: publish(store, bundles[name]) for name in now}

    settings = {"slots": SLOTS, "poll_seconds": 3600, "cache_folder": str(tmp_path / "node")}
    with Server.with_edits(tiny_model, store.url, tmp_path / "log", *FLAGS, settings=settings) as server:

        def ask(name: str) -> str:
            version: str = complete(server.url, name, "One two three", 2)["headers"]["x-edits-version"]
            return version

        def counted() -> dict[tuple[str, ...], float]:
            return dict(Scrape.of(server.url).by(REQUESTS, "variant", "version"))

        with ThreadPoolExecutor(SLOTS) as pool:
            assert list(pool.map(ask, now)) == list(versions.values())
        assert counted() == {(name, version[:12]): 1.0 for name, version in versions.items()}
        _look_at_every_series(server.url, variants=set(now))

        gone, kept = now[MORE:], now[:MORE]
        for name in gone:
            store.withdraw(name)
        versions = {name: publish(store, bundles[name]) for name in later} | {name: versions[name] for name in kept}
        httpx.post(f"{server.url}/v1/edits/sync", timeout=120).raise_for_status()
        assert [ask(name) for name in later] == [versions[name] for name in later]
        found = counted()
        assert {pair: found[pair] for pair in found if pair[0] in versions} == {
            (name, version[:12]): 1.0 for name, version in versions.items()
        }
        assert OTHER not in {variant for variant, _ in found}
        assert len(found) == max(LIMIT, len(versions)), "what has gone keeps its series up to the limit, and no further"
        _look_at_every_series(server.url, variants={variant for variant, _ in found})


def _look_at_every_series(url: str, variants: set[str]) -> None:
    """Each is known, is there once, and names a variant that there is, or the base model; routers see the slots."""
    metrics = Scrape.of(url)
    labels = {PREFIX + metric.name: set(metric.labels) for metric in METRICS}
    ours = {family.name: family for family in text_string_to_metric_families(metrics.text) if family.name in labels}
    assert ours.keys() == labels.keys()
    for name, family in ours.items():
        times = Counter((sample.name, *sorted(sample.labels.items())) for sample in family.samples)
        assert set(times.values()) <= {1}, f"{name} tells something twice"
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == labels[name]
            assert sample.labels.get("variant", "base") in {*variants, "base"}
    loaded = {sample.labels["adapter_name"] for sample in ours["vllm_edits_variant_loaded"].samples}
    assert len(loaded) == metrics.sum("vllm_edits_slots_used") == SLOTS
    assert loaded <= variants
    (info,) = ours["vllm_edits_variants_info"].samples
    assert (info.labels["running_lora_adapters"], info.labels["max_lora"]) == ("", str(SLOTS))
