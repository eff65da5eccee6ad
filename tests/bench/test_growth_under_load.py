"""The part `growth` of the benchmark: it measures a server around fakes, and makes figures, a record and a table."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadtests.bench.parts.growth import (
    CACHED,
    COMPILING,
    GrowthPlan,
    GrowthTiming,
    Promotion,
    RestartTiming,
    TokenCount,
    summarise,
)
from loadtests.bench.plot import draw
from loadtests.bench.report import show
from loadtests.bench.run import NotMeasured
from tests.support.fakes import Server, version_of
from tests.support.listening import compiles_under_load, listening
from vllm_edits.edit_store import LowRank

LAST = {
    "phase": "done", "error": "", "longest_pause_seconds": 0.25,
    "seconds": {"planned": 0.1, "compiling": 60.0, "waiting": 0.2, "switching": 0.3},
}  # fmt: skip
COUNTS = [TokenCount(10, 100), TokenCount(20, 500), TokenCount(80, 1700)]
"""40 tokens per second for ten seconds before the promotion, and 20 for a minute until the first answer."""
RESTART = RestartTiming(stopped=2.0, started=20.0, first_answer=21.0)


def timing(token_times: list[list[float]] | None = None, **changed: Any) -> GrowthTiming:
    times = token_times or [[10.0, 10.5, 19.0, 19.2, 79.0], [80.1, 80.3]]
    seen = {"answered": 79.5, "ended": 82.0, "last": LAST, "compiled": 1, **changed}
    return GrowthTiming.of(times, COUNTS, **seen)


def test_gaps_are_of_one_stream_and_belong_to_before_or_during_the_growth() -> None:
    """An answer that ends and the next one that begins are no gap; what comes long after the answer does not count."""
    found = timing([[9.0, 10.5, 19.5, 21.0], [19.9, 20.0], [40.0, 43.0], [60.0, 81.0], [82.0, 99.0]])
    assert found.calm_gap == 9.0
    assert found.gap == 21.0, "it began before the answer, and ended shortly after it"
    assert found.gap_at == 40.0
    assert timing([[10.5, 11.0], [40.0, 43.0], [82.0, 99.0]]).gap == 3.0


def test_throughput_is_relative_to_the_load_before() -> None:
    """By the server's count of tokens, whatever the lengths of the two windows."""
    found = timing()
    assert (found.calm_rate, found.rate) == (40, 20)
    assert found.throughput == 0.5
    assert found.first_answer == 59.5


def test_the_servers_account_of_the_growth_is_kept() -> None:
    found = timing()
    assert found.longest_pause == 0.25
    assert list(found.phases) == ["planned", "compiling", "waiting", "switching"]
    assert found.phases == LAST["seconds"]


def summary(plan: GrowthPlan, **cached: Any) -> dict[str, Any]:
    quick = replace(timing(), gap=0.3, compiled=0)
    return summarise(plan, {COMPILING: timing(), CACHED: replace(quick, **cached)}, RESTART)


@pytest.mark.parametrize(
    ("cached", "missed"),
    [
        ({}, set()),
        ({"longest_pause": 1.5, "gap": 1.6}, {"longest_pause", "gap"}),
        ({"gap": 1.6}, {"gap"}),
        ({"compiled": 1}, {"compiled"}),
    ],
)
def test_a_pause_is_held_against_its_target_where_the_code_is_cached(cached: dict[str, Any], missed: set[str]) -> None:
    """And that nothing was compiled there. The growth that compiles has longer gaps, which are no matter."""
    targets = summary(GrowthPlan("float32"), **cached)["targets"]
    assert {name for name, held in targets.items() if held["verdict"] == "missed"} == missed
    assert {held["verdict"] for held in targets.values()} <= {"met", "missed"}


def test_throughput_is_held_against_its_target_where_the_code_is_compiled() -> None:
    slow = [*COUNTS[:2], TokenCount(80, 1600)]
    times = [[15.0, 16.0, 79.0]]
    half, less = (
        GrowthTiming.of(times, counts, answered=79.5, ended=82.0, last=LAST, compiled=1) for counts in (COUNTS, slow)
    )
    for compiling, word in ((half, "met"), (less, "missed")):
        found = summarise(GrowthPlan("float32"), {COMPILING: compiling, CACHED: half}, RESTART)
        assert found["targets"]["throughput"]["verdict"] == word


def test_a_gpu_has_no_targets_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Except that cached code is not compiled."""
    run: Any = type("", (), {"dtype": "bfloat16", "quick": True})
    monkeypatch.setattr("loadtests.bench.parts.growth.gpu", lambda: "a GPU")
    found = summary(GrowthPlan.of(run), longest_pause=5.0, gap=5.0)["targets"]
    assert {name for name, held in found.items() if held["verdict"]} == {"compiled"}
    monkeypatch.setattr("loadtests.bench.parts.growth.gpu", lambda: "")
    assert GrowthPlan.of(run).target_pause == 1.0


def test_the_record_is_json_and_its_table_tells_every_figure() -> None:
    """It has no picture."""
    plan = GrowthPlan("float32")
    found = summary(plan)
    record = {"at": "2026-05-01", "device": {"name": "a machine"}, "parameters": {"growth": asdict(plan)},
              "summary": {"growth": found}}  # fmt: skip
    read = json.loads(json.dumps(record))["summary"]["growth"]
    assert read["growths"][COMPILING]["throughput"] == 0.5
    assert read["restart"] == asdict(RESTART)
    console = Console(width=160, record=True, file=io.StringIO())
    show({"growth": read}, console)
    told = console.export_text()
    for words in (
        COMPILING, CACHED, "a restart instead", "59.5", "21.0", "60.00", "0.250", "code cached: ≤ 1",
        "compiling: ≥ 0.5", "0.50", "code cached: ≤ 0",
    ):  # fmt: skip
        assert words in told, words
    assert told.count("met") == 4
    assert draw(record, None) is None  # type: ignore[arg-type]  # nothing is written


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtests.bench.parts.growth.BASE", "tiny")
    monkeypatch.setattr("vllm_edits.plugin.serving.growth.MOST_POLL_SECONDS", 0.1)


@pytest.mark.anyio
@pytest.mark.long
@pytest.mark.usefixtures("quickly")
async def test_a_server_is_measured_while_it_grows(tmp_path: Path) -> None:
    """Everything but vLLM is real: store, HTTP, streams, metrics. A version that fits already is no measurement."""
    server, phases = Server(f"memory://{tmp_path}", grow="auto"), list[str]()
    code = tmp_path / "torch_compile_cache/torch_aot_compile/key/rank_0_0/model"
    compiles = compiles_under_load(server, 1)

    def compiled(number: int, act: Any) -> Any:
        code.parent.mkdir(parents=True, exist_ok=True)
        code.touch()
        return compiles(number, act)

    server.workers.overrides["edits_grow_poll"] = compiled
    plan = GrowthPlan("float32", stream_tokens=(20, 30), settled_seconds=0.2, calm_seconds=0.3)
    edit = LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=2)
    version = server.store.publish(version_of("grown", edit=edit))
    async with listening(server) as url:
        found = await Promotion(server.store, version, tmp_path, phases.append).under_load(url, plan)
        assert await Promotion(server.store, version, tmp_path, phases.append).first_answer(url) > 0
        fits = server.store.publish(version_of("grown"))
        with pytest.raises(ExceptionGroup) as refused:
            await Promotion(server.store, fits, tmp_path, phases.append).under_load(url, plan)
    assert phases == ["planned", "compiling", "waiting", "switching"]
    assert list(found.phases) == phases
    assert found.first_answer > found.phases["compiling"] > 0
    assert min(found.calm_gap, found.gap, found.calm_rate, found.throughput) > 0
    assert found.compiled == 1
    assert refused.group_contains(NotMeasured, match="fitted without a growth")
    await server.core.slots.wait_drained()
    server.check()
