"""The tables in the documents say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from fastapi.routing import APIRoute

from tests.proofs.parity import every_edit
from tests.support.fakes import BASE
from vllm_edits.edit_store import KINDS, WeightDelta
from vllm_edits.edit_store.architectures import ARCHITECTURES
from vllm_edits.edit_store.kinds.gate import ACTIVATIONS
from vllm_edits.edit_store.sites import POINTS
from vllm_edits.plugin.http.routes import router
from vllm_edits.plugin.metrics import FIRST_TOKEN, METRICS, PER_TOKEN, PREFIX, REQUEST
from vllm_edits.server_config import EditSettings, read_settings
from vllm_edits.server_config.profile_costs import LEAST, read_costs
from vllm_edits.server_config.profiles import SCOPES, STANDARD, entries
from vllm_edits.server_config.settings import PROFILES

ROOT = Path(__file__).parents[2]
FRONT_PAGE_BYTES = 12 << 10


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head."""
    text = (ROOT / page).read_text().split(f"\n{heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert table is not None
    lines = table[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_front_page_is_one_page() -> None:
    assert (ROOT / "README.md").stat().st_size <= FRONT_PAGE_BYTES


def test_the_settings_table_is_the_settings() -> None:
    """Every setting with its default and its own line of help, in order."""
    told = {
        row[0].strip("`"): (row[1].strip("`"), row[2]) for row in rows("server_config/README.md", "## Every setting")
    }
    declared = {}
    for name, field in EditSettings.model_fields.items():
        told_default = ", ".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        default = "required" if field.is_required() else "none" if field.default is None else told_default
        declared[name] = (default, field.description)
    assert told == declared


def test_the_profiles_table_is_the_profiles() -> None:
    """Their names, smallest first, their scopes, and the largest rank."""
    told = rows("server_config/README.md", "## Profiles")
    scopes = {name: str(number or "theirs") for name, number in SCOPES.items()}
    assert [(row[0], row[2]) for row in told] == [(f"`{name}`", scopes[name]) for name in PROFILES]
    (rank,) = {entry.rank for entry in entries("all") if "rank" in KINDS[entry.kind].model_fields}
    assert f"rank {rank}" in told[-1][1]


def test_the_table_of_the_standard_profile_is_its_entries() -> None:
    """Every entry, in order, with the methods that need it."""
    declared = []
    for entry, methods in STANDARD:
        point = entry.site.removeprefix("layers.*.")
        reads = "" if entry.reads in (None, point) else f"`{entry.reads}`"
        rank = str(entry.rank) if "rank" in KINDS[entry.kind].model_fields else ""
        declared.append([f"`{entry.kind}`", f"`{point}`", reads, rank, " ".join(entry.features), methods])
    assert rows("server_config/README.md", "### The profile `standard`") == declared


def test_the_table_of_costs_at_rest_is_what_was_measured() -> None:
    """Every measurement that ships, with its record, and no other. The page has the rule and its result."""
    declared = [
        [f"`{cost.profile}`", cost.device, cost.shape, cost.reserved, speed(cost.decode), speed(cost.prefill),
         f"[{cost.date}](../loadtests/results/{cost.record})"]
        for cost in read_costs()
    ]  # fmt: skip
    heading = "### What a profile costs at rest"
    assert rows("server_config/README.md", heading) == declared
    said = " ".join((ROOT / "server_config/README.md").read_text().split(heading)[1].split("\n## ")[0].split())
    assert f"keeps {LEAST} of vLLM alone" in said
    (default,) = EditSettings(store="/none").profiles
    assert f"the default is `{default}`" in said
    measured = {cost.profile for cost in read_costs()}
    missing = [f"`{name}`" for name in PROFILES if name not in measured]
    assert not missing or f"{' and '.join(missing)} {'were' if len(missing) > 1 else 'was'} not" in said


def speed(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.3f}"


def test_the_metrics_table_is_the_metrics() -> None:
    """Every metric with its kind, labels and help, as Prometheus sees its name."""
    told = [
        (row[0].strip("`"), row[1], row[2].replace("`", ""), row[3]) for row in rows("plugin/README.md", "## Metrics")
    ]
    declared = [
        (
            PREFIX + metric.name + ("_total" if metric.kind == "counter" else ""),
            metric.kind,
            ", ".join(metric.labels),
            metric.help,
        )
        for metric in METRICS
    ]
    assert told == declared


def test_the_endpoints_table_is_the_routes() -> None:
    told = {row[0].strip("`") for row in rows("plugin/README.md", "## Endpoints")}
    routes = router(lambda: None, lambda: None, lambda: None).routes  # type: ignore[arg-type, return-value]
    assert told == {
        f"{method} {route.path}" for route in routes if isinstance(route, APIRoute) for method in route.methods
    }


def test_the_kinds_table_is_the_kinds() -> None:
    told = {row[0].strip("`"): row for row in rows("edit_store/EDITS.md", "## Kinds")}
    assert list(told) == list(KINDS)
    for _, (edit, _) in every_edit(BASE):
        assert all(f"`{field} [" in told[edit.kind][3] for field in edit.shapes(BASE.widths)), edit
    delta = WeightDelta(site="layers.0.mlp.out", reads="layers.0.mlp.h", layout="sparse", count=1)
    assert all(f"`{field} [" in told[delta.kind][3] for field in delta.shapes(BASE.widths))


def test_the_page_on_edits_names_every_site_kind_and_architecture() -> None:
    page = (ROOT / "edit_store" / "EDITS.md").read_text()
    for name in (*POINTS, *KINDS, *ARCHITECTURES, *ACTIVATIONS):
        assert f"`{name}`" in page, name


@pytest.mark.parametrize(
    "path", sorted((ROOT / "server_config" / "examples").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_example_configuration_is_valid(path: Path) -> None:
    example = yaml.safe_load(path.read_text())
    assert example["load-format"] == "edits"
    assert read_settings(example["additional-config"]).store


def test_histogram_edges_are_vllms_own() -> None:
    """Panels that lay our latencies over vLLM's need the same buckets."""
    buckets = pytest.importorskip("vllm.v1.metrics.buckets")
    assert list(REQUEST) == list(buckets.REQUEST_LATENCY_BUCKETS)
    assert list(FIRST_TOKEN) == list(buckets.TIME_TO_FIRST_TOKEN_BUCKETS)
    assert list(PER_TOKEN) == list(buckets.INTER_TOKEN_LATENCY_BUCKETS)


def test_every_invariant_is_held_by_tests_that_are_there() -> None:
    """The table of tests/README.md names files, and tests in them."""
    named = [
        found
        for row in rows("tests/README.md", "## Invariants")
        for found in re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", row[2])
    ]
    assert len(rows("tests/README.md", "## Invariants")) == 12
    for path, test in named:
        text = (ROOT / "tests" / path).read_text()
        assert f"def {test}(" in text if test else text, (path, test)
