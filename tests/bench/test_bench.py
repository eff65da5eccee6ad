"""The benchmark's arithmetic: what it makes of timings, and that it says so."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from loadtests.bench.command import BATCHES, app
from loadtests.bench.engine import _paced
from loadtests.bench.inputs import Inputs
from loadtests.bench.parts.endurance import EndurancePlan, Footprint, summarise
from loadtests.bench.parts.guesses import GUESSED, KEPT
from loadtests.bench.parts.guesses import summarise as guesses
from loadtests.bench.parts.launches import LaunchPlan
from loadtests.bench.parts.launches import summarise as launches
from loadtests.bench.parts.profile import parts
from loadtests.bench.parts.side_by_side import MAX_MODEL_LEN, Engines, batch, distinct
from loadtests.bench.parts.traffic import ALONE, FIGURES
from loadtests.bench.parts.traffic import summarise as traffic
from loadtests.bench.plot import draw
from loadtests.bench.report import (
    Comparison,
    Figure,
    RequestTimes,
    SwapTiming,
    decode_rate,
    gaps_within,
    prefill_rate,
    rate_of_steps,
    show,
    summarise_rates,
    summarise_swaps,
    verdict,
)
from loadtests.bench.rounds import PREFILLS, Side, Stage, Trial, _in_step, _steps, rates_by_round, turns
from loadtests.bench.sides import Batch, Engine
from loadtests.harness.record import free_path
from tests.support.fakes import BASE, WIDTHS

RATIO = Comparison("edited", ("plain",), "decode", 0.97)


def rounds_of(ratio: float, drift: list[float]) -> list[dict[str, dict[str, float]]]:
    """Rounds on a machine of changing speed, on which one side is slower than the other by a fixed ratio."""
    return [
        {side: {"decode": speed * rate, "prefill": speed * rate} for side, rate in (("plain", 1.0), ("edited", ratio))}
        for speed in drift
    ]


def times(scheduled: float, first: float, last: float, output_tokens: int = 11) -> RequestTimes:
    return RequestTimes(scheduled, first, last, prompt_tokens=100, output_tokens=output_tokens)


def swap(stall: float, calm: float = 0.030, step: float = 0.020) -> SwapTiming:
    return SwapTiming(0.01, 0.1, 0.2, {"install": 0.05}, stall=stall, calm_stall=calm, step=step)


@given(st.lists(st.floats(1, 1000), min_size=3, max_size=20), st.floats(0.5, 2))
def test_a_drifting_machine_does_not_move_the_ratio(drift: list[float], ratio: float) -> None:
    """Sides are compared within a round: a speed that all sides share cancels out."""
    figure = RATIO.of(rounds_of(ratio, drift))
    assert figure.median == pytest.approx(ratio)
    assert figure.low <= figure.median <= figure.high


def test_without_second_engines_sides_are_held_against_the_first() -> None:
    """What compares the second ones is gone with them."""
    engine = Engine("", {}, Path(), [0])
    sides = {name: Side("", engine, [None]) for name in ("plain", "plain again", "idle", "idle again")}
    both = ("plain", "plain again")
    comparisons = [Comparison(over, under, "decode") for over, under in
                   (("plain again", ("plain",)), ("idle", both), ("idle again", both))]  # fmt: skip
    once = Trial("", sides, [Stage("decode", 1, 1)], comparisons).once()
    assert list(once.sides) == ["plain", "idle"]
    assert once.comparisons == [Comparison("idle", ("plain",), "decode")]


def test_a_disturbed_round_does_not_move_the_ratio() -> None:
    """Positive control: the mean of the same ratios is moved."""
    rounds = rounds_of(0.98, [300.0] * 9)
    rounds[4]["edited"]["decode"] /= 10
    assert RATIO.of(rounds).median == pytest.approx(0.98)
    assert np.mean([each["edited"]["decode"] / each["plain"]["decode"] for each in rounds]) < 0.9


def test_what_others_are_held_against_is_the_mean_of_several() -> None:
    """So the luck of one process is halved."""
    rounds = [{side: {"decode": rate} for side, rate in (("plain", 90.0), ("again", 110.0), ("edited", 98.0))}] * 3
    assert Comparison("edited", ("plain", "again"), "decode").of(rounds).median == pytest.approx(0.98)


def test_decode_counts_tokens_after_the_first_and_prefill_the_prompts() -> None:
    requests = [times(0.0, 1.0, 2.0), times(0.5, 1.0, 3.0)]
    assert decode_rate(requests) == 20 / 2.0
    assert prefill_rate(requests) == 200 / 1.0


def test_decode_over_several_prefill_steps_is_refused() -> None:
    """Its seconds would hold some prefill."""
    with pytest.raises(ValueError, match="one step"):
        decode_rate([times(0, 1.0, 2.0), times(0, 1.1, 2.0)])


def test_steps_say_the_same_as_the_stamps_of_requests() -> None:
    """Two requests of 100 tokens in a second, then ten steps in another."""
    prefilled, decoded = [times(0.0, 1.0, 1.0, output_tokens=1)] * 2, [times(0.0, 1.0, 2.0)] * 2
    assert rate_of_steps([1.0], requests=2, prompt_tokens=100, tokens=1) == prefill_rate(prefilled)
    seconds = [1.0, *[0.05, 0.15] * 5]
    assert rate_of_steps(seconds, requests=2, prompt_tokens=100, tokens=11) == pytest.approx(decode_rate(decoded))
    with pytest.raises(ValueError, match="11 steps, one to prefill all 2 requests, found 12"):
        rate_of_steps([*seconds, 0.1], requests=2, prompt_tokens=100, tokens=11)


class EngineThatSays(Engine):
    """Takes steps of its own length, and notes whose turn it was."""

    def __init__(self, label: str, seconds: float, turns: list[str]) -> None:
        super().__init__(label, {}, Path(), [0])
        self.seconds, self.turns = seconds, turns

    def begin(self, batch: Batch) -> None:
        self.taken, self.tokens = list[float](), batch.tokens

    def step(self) -> list[float] | None:
        self.turns.append(self.label)
        self.taken.append(self.seconds)
        return self.taken if len(self.taken) == self.tokens else None


def test_engines_take_a_step_each_in_turns() -> None:
    turns = list[str]()
    engines = {name: EngineThatSays(name, seconds, turns) for name, seconds in (("a", 0.1), ("b", 0.2))}
    assert _steps(engines, dict.fromkeys(engines, Batch([[0]], [None], 3))) == {"a": [0.1] * 3, "b": [0.2] * 3}
    assert turns == ["a", "b", "b", "a", "a", "b"], "each goes first in turns"


class AskedSide(Side):
    """Notes which prompts are asked for, instead of making them."""

    seeds: ClassVar[list[Sequence[int]]] = []

    def batch(self, phase: Stage, inputs: Any, seed: Sequence[int]) -> Batch:
        self.seeds.append(seed)
        return Batch([[0]], [None], phase.tokens)


def test_a_prefill_is_measured_several_times_a_round_with_other_prompts_each_time() -> None:
    """A prompt seen before would come from the prefix cache. Positive control: decoding is measured once."""
    sides = {
        "a": AskedSide("", EngineThatSays("a", 0.5, []), [None]),
        "b": AskedSide("", EngineThatSays("b", 1, []), [None]),
    }
    no_inputs: Any = None
    for tokens, measured, rates in ((1, PREFILLS, {"a": 200, "b": 100}), (3, 1, {"a": 2, "b": 1})):
        AskedSide.seeds.clear()
        found = _in_step(sides, Stage("", requests=1, prompt_tokens=100, tokens=tokens), no_inputs, (7, 0, 0))
        assert found == pytest.approx(rates)
        assert sorted(AskedSide.seeds) == sorted([(7, 0, 0, again) for again in range(measured)] * len(sides))


def test_sides_of_one_engine_work_in_different_heats() -> None:
    """What others are held against is in each of them, and every comparison counts those that hold both its sides."""
    plain, edited, other = (Engine(label, {}, Path(), [0]) for label in ("plain", "edited", "other"))
    sides = {"plain": Side("", plain, [None]), "K=0": Side("", edited, [None]), "K=1": Side("", edited, ["a"]),
             "other": Side("", other, [None])}  # fmt: skip
    compared = [Comparison(side, ("plain",), "decode") for side in ("K=0", "K=1", "other")]
    experiment = Trial("", sides, [Stage("decode", 1, 1)], compared)
    assert experiment.heats() == [["plain", "K=0", "other"], ["plain", "K=1"]]
    rates = [{"plain": {"decode": 10.0}, "K=0": {"decode": 9.0}}, {"plain": {"decode": 20.0}, "K=1": {"decode": 20.0}}]
    assert [each.of(rates).median for each in compared[:2]] == [0.9, 1.0]
    assert summarise_rates("", {"K=1": ""}, [], rates)["tokens_per_second"]["K=1"]["decode"]["median"] == 20
    against_itself = replace(experiment, comparisons=[Comparison("K=1", ("K=0",), "decode")])
    with pytest.raises(ValueError, match="sides of one engine cannot be held against each other: K=0, K=1"):
        against_itself.heats()


class EngineThatStarts(Engine):
    """Starts when all that start with it have begun to, and answers at once."""

    def __init__(self, label: str, begun: Barrier) -> None:
        super().__init__(label, {}, Path(), [0])
        self.begun = begun

    def start(self, waiting: Any = None) -> Engine:
        self.begun.wait(10)
        return self

    def run(self, batch: Batch) -> list[RequestTimes]:
        return [times(0, 1, 2)]


def test_on_a_gpu_engines_start_side_by_side_and_rounds_end_when_their_time_is_up() -> None:
    """A lent GPU is short of time; three rounds there are in any case. Positive control: with time there are all."""
    for seconds, rounds in ((0.0, 3), (60.0, 6)):
        begun = Barrier(3)
        sides: dict[str, Side] = {name: AskedSide("", EngineThatStarts(name, begun), [None]) for name in "abc"}
        experiment = Trial("", sides, [Stage("decode", 1, 1, 11)], [])
        no_inputs: Any = None
        with Progress(disable=True) as progress:
            found = rates_by_round(experiment, 6, no_inputs, progress, in_step=False, seconds=seconds)
        assert len(found) == rounds


def test_engines_are_bound_to_cores_on_a_cpu_and_not_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every thread of every engine would be bound to the first core that is named."""
    monkeypatch.delenv("GOMP_CPU_AFFINITY", raising=False)
    engine = Engine("", {}, Path(), [2, 3])
    for gpu, bound in (("", "2 3"), ("a GPU", None)):
        monkeypatch.setattr("loadtests.bench.sides.gpu", lambda gpu=gpu: gpu)
        assert engine._environment().get("GOMP_CPU_AFFINITY") == bound


class Stepping:
    """An engine whose steps take no time."""

    def step(self) -> str:
        return "outputs"


def test_a_paced_engine_waits_for_a_line_before_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, answers, lines = Stepping(), io.StringIO(), io.StringIO("{}\n" * 3)
    monkeypatch.setattr("sys.stdin", lines)
    with _paced(engine, answers) as seconds:
        assert [engine.step(), engine.step()] == ["outputs"] * 2
        assert answers.getvalue() == '{"waits": true}\n' * 2
        assert lines.read() == "{}\n", "a line for each step"
    assert engine.step() == "outputs", "afterwards it goes on by itself"
    assert len(seconds) == 2


def test_what_reading_alone_costs_is_read_within_the_step_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as were asked for, in every step; without any, nothing is read."""
    read = list[int]()

    class Memory:
        def __init__(self, size: int) -> None:
            self.size = size

        def sum(self) -> None:
            read.append(self.size)
            time.sleep(0.02)

    engine = Stepping()
    monkeypatch.setattr("sys.stdin", io.StringIO("{}\n" * 3))
    monkeypatch.setattr("loadtests.bench.engine._memory", Memory)
    with _paced(engine, io.StringIO(), reads=64) as reading:
        engine.step()
        engine.step()
    with _paced(engine, io.StringIO()) as usual:
        engine.step()
    assert read == [64, 64]
    assert min(reading) > 0.02
    assert len(usual) == 1


def test_beside_distinct_versions_stands_what_reading_them_costs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two versions of rank 4 at three layers, in two bytes a number: the same engine reads as much, for nobody. On a
    GPU, where no step has a time of its own, nothing is read."""
    (tmp_path / "config.json").write_text('{"vocab_size": 128}')
    engines = Engines(Inputs(tmp_path, BASE, [], tmp_path), "bfloat16", [0], [2], [4], False, lambda _: None, {})
    monkeypatch.setattr("loadtests.bench.parts.side_by_side.gpu", lambda: None)
    sides = distinct(engines).sides
    reading, edited = sides["rank 4, reading alone"], sides["rank 4, K=2"]
    assert reading.engine is edited.engine
    asked = reading.batch(Stage("", requests=2, prompt_tokens=1), engines.inputs, [0])
    assert asked.reads == 2 * 3 * 4 * (WIDTHS.mlp + WIDTHS.hidden) * 2
    assert asked.names == [None, None]
    assert edited.reads == 0
    monkeypatch.setattr("loadtests.bench.parts.side_by_side.gpu", lambda: "a GPU")
    assert "rank 4, reading alone" not in distinct(engines).sides


@pytest.mark.parametrize("requests", sorted({*BATCHES[False], *BATCHES[True]}))
def test_every_batch_is_prefilled_in_one_step(requests: int) -> None:
    assert [phase.requests for phase in batch(requests)] == [requests] * 2
    assert all(0 < requests * phase.prompt_tokens <= MAX_MODEL_LEN for phase in batch(requests))


@pytest.mark.parametrize(
    ("low", "median", "high", "word"),
    [
        (0.98, 0.99, 1.0, "met"),
        (0.96, 0.98, 1.0, "met, within noise"),
        (0.94, 0.96, 0.98, "missed, within noise"),
        (0.90, 0.95, 0.96, "missed"),
    ],
)
def test_a_verdict_says_when_the_interval_does_not_carry_it(low: float, median: float, high: float, word: str) -> None:
    assert verdict(Figure(median, low, high, low, high, 9), 0.97) == word


def test_a_figure_without_a_target_has_no_verdict() -> None:
    assert not verdict(Figure.of([1, 2, 3]), None)


def test_gaps_belong_to_the_window_they_end_in() -> None:
    """Also one that began before it; gaps of different streams are not mixed up."""
    assert gaps_within([[0.0, 1.0, 3.0, 4.0], [2.5]], begin=2.0, end=3.5) == [2.0]


@pytest.mark.parametrize(("stall", "word"), [(0.045, "met"), (0.055, "missed")])
def test_a_stall_may_be_one_step_longer_with_a_swap(stall: float, word: str) -> None:
    """0.030 s without a swap, steps of 0.020 s: up to 0.050 s is met."""
    assert summarise_swaps([swap(stall)] * 5)["extra_stall"]["verdict"] == word


@pytest.mark.parametrize("number", range(4))
def test_every_side_has_its_turn_in_every_round(number: int) -> None:
    assert sorted(turns(["a", "b", "c"], number)) == ["a", "b", "c"]


def test_every_side_begins_and_ends_as_often_as_the_others() -> None:
    orders = [turns(["a", "b", "c"], number) for number in range(6)]
    assert sorted(order[0] for order in orders) == sorted(order[-1] for order in orders) == list("aabbcc")


def summary() -> dict[str, Any]:
    return {
        "demo": summarise_rates(
            "two sides",
            {"plain": "without", "edited": "with"},
            [RATIO, replace(RATIO, phase="prefill", target=0.95)],
            rounds_of(0.9, [300.0] * 5),
        ),
        "swaps": summarise_swaps([swap(0.045)] * 5),
    }


def test_the_tables_show_every_target_and_whether_it_was_met() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    show(summary(), console)
    told = console.export_text()
    for line in ("≥ 0.97", "≥ 0.95", "≤ 20.0"):
        assert line in told
    assert told.count("missed") == 2
    assert told.count("met") == 1


def test_a_record_is_drawn_and_always_the_same(tmp_path: Path) -> None:
    """With every comparison in it; a record that has none has no picture."""
    record = {"at": "2026-05-01", "device": {"name": "a machine"}, "summary": summary()}
    drawn = [draw(record, tmp_path / name) for name in ("one.svg", "two.svg")]
    first, second = (path.read_text() for path in drawn if path is not None)
    assert first == second
    assert "edited / plain, decode" in first
    assert "edited / plain, prefill" in first
    assert draw({**record, "summary": {"swaps": summary()["swaps"]}}, tmp_path / "none.svg") is None
    assert not (tmp_path / "none.svg").exists()


def test_no_run_overwrites_another(tmp_path: Path) -> None:
    record = {"at": "2026-05-01T10:00:00+00:00", "device": {"name": "AMD EPYC 2 cores"}}
    first = free_path(tmp_path, record)
    first.touch()
    assert first.name == "2026-05-01-amd-epyc-2-cores.json"
    assert free_path(tmp_path, record).name == "2026-05-01-amd-epyc-2-cores-2.json"
    assert free_path(tmp_path, record, "soak").name == "2026-05-01-soak-amd-epyc-2-cores.json"


@settings(max_examples=15)  # each resamples hundreds of times
@given(st.floats(-1e3, 1e3), st.integers(12, 30))
def test_growth_is_the_slope_and_a_few_wild_looks_do_not_move_it(slope: float, looks: int) -> None:
    swaps = list(range(10, 10 * (looks + 1), 10))
    memory = [1e6 + slope * each for each in swaps]
    memory[-1] += 1e8
    figure = Figure.of_slope(swaps, memory)
    assert figure.median == pytest.approx(slope, abs=1e-3)
    assert figure.low <= figure.median <= figure.high
    assert np.polyfit(swaps, memory, 1)[0] != pytest.approx(slope, abs=1), "positive control: least squares is moved"


def test_what_a_step_calls_is_counted_by_what_it_is() -> None:
    """By torch's own names of what ran where; two steps were counted."""
    calls = {"CPU aten::mm": 6, "CPU aten::copy_": 2, "CPU cudaMemcpyAsync": 2, "CPU cudaGraphLaunch": 2,
             "CPU cudaLaunchKernel": 4, "CUDA Memcpy HtoD (Pinned -> Device)": 2, "CUDA triton_red_fused_3": 10,
             "CUDA aten::mm": 6}  # fmt: skip
    (row,) = launches(LaunchPlan("float32", short=1, long=3), {"plain": "alone"}, {"plain": calls})["launches"].values()
    assert row == {
        "what": "alone", "operators": 4, "copies": 2, "kernel launches": 2, "graph launches": 1, "kernels": 5,
    }  # fmt: skip


def test_what_a_step_takes_is_told_by_part() -> None:
    """Of two runs, what both have once falls out; four steps differ."""
    few = {"CPU _C::onednn_mm": (10, 100.0), "CPU Pregraph bytecode": (4, 8.0), "CPU aten::item": (1, 50.0)}
    many = {"CPU _C::onednn_mm": (20, 300.0), "CPU Pregraph bytecode": (8, 16.0), "CPU aten::item": (1, 50.0),
            "CPU graph_0_cpp_fused_onednn_mm_add_3": (4, 40.0), "CPU vllm::unified_attention": (4, 4.0),
            "CPU ## Call CompiledFxGraph fx ##": (4, 12.0), "CPU vllm_edits::combine_": (4, 8.0)}  # fmt: skip
    assert parts(few, many, 4) == {
        "products": 50, "attention": 1, "compiled loops": 10, "edits in C++": 2, "graph's inputs": 2,
        "graph's Python": 3, "rest": 0,
    }  # fmt: skip


def test_the_share_of_guesses_that_are_kept_is_told_by_strength() -> None:
    counts = {"base": {GUESSED: 90, KEPT: 90}, "variant-00": {GUESSED: 120, KEPT: 30}}
    assert guesses({"base": 0.0, "variant-00": 0.5}, counts)["guesses"] == {
        "base": {"strength": 0.0, "kept": 1.0}, "variant-00": {"strength": 0.5, "kept": 0.25},
    }  # fmt: skip


def test_traffic_is_relative_to_vllm_alone_in_the_same_round() -> None:
    rounds = [{side: dict.fromkeys(FIGURES, rate) for side, rate in ((ALONE, speed), ("polite", speed * 0.9))}
              for speed in (100.0, 50.0, 200.0)]  # fmt: skip
    found = traffic({ALONE: "", "polite": "edited"}, rounds)["traffic"]
    assert found[ALONE]["relative"] == {}
    assert found["polite"]["figures"]["tokens per second"]["median"] == pytest.approx(90)
    for figure in found["polite"]["relative"].values():
        assert figure["low"] == pytest.approx(0.9)
        assert figure["high"] == pytest.approx(0.9)


def test_a_model_that_is_neither_a_shape_nor_a_checkpoint_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--model", str(tmp_path)], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "is neither a shape (llama-1b, llama-8b) nor a folder with a config.json" in result.output


def test_what_steps_leave_behind_is_not_the_swaps() -> None:
    """Memory that grows by 70 bytes a swap and by 50 a step; a swap takes many steps, a round without one a few."""
    plan, looks, steps = EndurancePlan("float32", swaps=100, calm=60, look_every=5), [], 0
    for number in range(5, 165, 5):
        steps += 5 * (40 + number % 7 if number <= plan.swaps else 6)
        memory = {"0 engine": 10**9 + 70 * min(number, plan.swaps) + 50 * steps}
        looks.append(Footprint(number, 0.5, memory, files=9, threads=3, steps=steps))
    found = summarise(plan, looks)["memory"]
    assert found["bytes_per_step"]["median"] == pytest.approx(50)
    assert found["bytes_per_swap"]["median"] == pytest.approx(70)
    assert found["bytes_per_swap_with_its_steps"]["median"] > 2000
