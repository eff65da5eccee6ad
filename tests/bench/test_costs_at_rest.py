"""What the reservation profiles cost at rest: how it is measured, and that the package tells what records show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from loadtests.bench.command import app
from loadtests.bench.costs_at_rest import costs_of, main
from loadtests.bench.inputs import Inputs
from loadtests.bench.parts.side_by_side import EXPERIMENTS, IDLE, PLAIN, Engines, idle, profiles
from loadtests.bench.report import Rates, summarise_rates
from loadtests.bench.rounds import Trial
from loadtests.bench.run import Run
from loadtests.harness.record import RESULTS
from tests.support.fakes import BASE
from vllm_edits.edit_store import EditStore
from vllm_edits.server_config import read_settings
from vllm_edits.server_config.profile_costs import LEAST, ProfileCost, largest_at_low_cost, profile_costs, read_costs
from vllm_edits.server_config.settings import PROFILES, EditSettings


@pytest.fixture
def engines(tmp_path: Path) -> Engines:
    (tmp_path / "config.json").write_text('{"vocab_size": 128}')
    inputs = Inputs(tmp_path, BASE, [], tmp_path)
    return Engines(inputs, "bfloat16", [0], [1, 8], [], True, lambda _: None, {}, ["promoted", "standard"])


def summary(trial: Trial, speeds: Mapping[str, float]) -> dict[str, Any]:
    """What is told of rounds in which each side has that speed; prefill is ten times as fast."""
    rates: Rates = {
        side: {phase.name: speeds.get(side, 1.0) * (10 if phase.tokens == 1 else 1) for phase in trial.phases}
        for side in trial.sides
    }
    what = {side: found.what for side, found in trial.sides.items()}
    return summarise_rates(trial.what, what, trial.comparisons, [rates] * 3)


def record(**parts: Any) -> dict[str, Any]:
    return {"at": "2026-11-28T01:02:03+00:00", "device": {"name": "abacus"}, "model": "tiny", "summary": parts}


# -- measured ----------------------------------------------------------------------------------------------------------


def test_a_profile_is_measured_as_the_idle_plugin_is(engines: Engines) -> None:
    """Beside two engines without the plugin, twice, in the same phases, against the same target."""
    trial, like = profiles(engines), idle(engines)
    assert list(trial.sides) == [*PLAIN, "promoted", "promoted again", "standard", "standard again"]
    assert trial.phases == like.phases
    assert len({id(side.engine) for side in trial.sides.values()}) == len(trial.sides)
    for side in list(trial.sides)[2:]:
        told = [(each.under, each.phase, each.target) for each in trial.comparisons if each.over == side]
        assert told == [(each.under, each.phase, each.target) for each in like.comparisons if each.over == "idle"]
        assert {target for _, _, target in told} == {IDLE}
    assert len(trial.heats()) == 1, "all take turns step by step"
    assert list(trial.once().sides) == ["plain", "promoted", "standard"]
    assert EXPERIMENTS["profiles"] is profiles


def test_its_server_reserves_the_profile_and_promotes_nothing(engines: Engines) -> None:
    """Positive control: the idle part promotes versions, and says nothing of a profile."""
    trial = profiles(engines)
    for side in ("standard", "standard again", "promoted"):
        found = trial.sides[side]
        settings = read_settings(found.engine.arguments["additional_config"])
        assert settings.reserve == (side.removesuffix(" again"),)
        assert EditStore(settings.store).names() == []
        assert settings.slots == 16
        assert (found.names, found.engine.plugins) == ([None], "edits")
        assert found.engine.arguments["load_format"] == "edits"
    assert "additional_config" not in trial.sides["plain"].engine.arguments
    settings = read_settings(idle(engines).sides["idle"].engine.arguments["additional_config"])
    assert len(EditStore(settings.store).names()) == 16
    assert settings.reserve == ("promoted",)


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], ["standard"]), (["--reserve", "all"], ["all"]),
     (["--reserve", "all", "--reserve", "promoted", "--reserve", "all"], ["promoted", "all"])],
)  # fmt: skip
def test_profiles_are_chosen_on_the_command_line(
    options: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = list[Run]()

    class Stop(Exception):
        pass

    def measured(run: Run) -> Any:
        runs.append(run)
        raise Stop

    monkeypatch.setattr("loadtests.bench.command._checkpoint", lambda _: tmp_path)
    monkeypatch.setattr("loadtests.bench.command.WORK", tmp_path)
    monkeypatch.setattr(Inputs, "prepare", lambda *_: Inputs(tmp_path, BASE, [], tmp_path))
    monkeypatch.setattr("loadtests.bench.command.PARTS", {"profiles": measured})
    result = CliRunner().invoke(app, ["--only", "profiles", "--quick", *options])
    assert isinstance(result.exception, Stop), result.output
    assert [run.reserve for run in runs] == [expected]
    assert Engines.of(runs[0], lambda _: None).reserve == expected


def test_an_unknown_profile_is_refused_with_the_nearest() -> None:
    result = CliRunner().invoke(app, ["--only", "profiles", "--reserve", "standart"], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "'standart' is no profile. Did you mean 'standard'? There are promoted, standard, all" in result.output


# -- told --------------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_profile_is_the_median_of_its_ratios(engines: Engines) -> None:
    """Over both engines and all batch sizes, decode and prefill apart; rounded."""
    trial = profiles(engines)
    found = record(profiles=summary(trial, {"standard": 0.9, "standard again": 0.987654, "promoted again": 1.1}))
    for row in found["summary"]["profiles"]["ratios"]:
        if (row["over"], row["phase"]) == ("standard", "decode x8"):
            row["median"] = 0.5
    promoted, standard = costs_of(found, "r.json")
    assert promoted.profile == "promoted"
    assert (promoted.decode, promoted.prefill) == (1.05, 1.05)
    assert standard == ProfileCost.model_validate(
        {"profile": "standard", "device": "abacus", "shape": "tiny", "decode": 0.944, "prefill": 0.944,
         "reserved": "profile standard reserved, nothing promoted", "date": "2026-11-28", "record": "r.json"}
    )  # fmt: skip


def test_the_idle_part_is_the_profile_promoted_with_all_kinds(engines: Engines) -> None:
    """A record of both parts tells both; one of neither tells nothing."""
    found = record(idle=summary(idle(engines), {"idle": 0.9, "idle again": 0.9}))
    (cost,) = costs_of(found, "r.json")
    assert (cost.profile, cost.decode, cost.reserved) == ("promoted", 0.9, "all kinds reserved at every layer")
    assert list(costs_of(record(swaps={}), "r.json")) == []


def test_a_phase_that_was_not_measured_has_no_figure(engines: Engines) -> None:
    part = summary(profiles(engines), {})
    part["ratios"] = [row for row in part["ratios"] if row["phase"].startswith("decode")]
    assert {(cost.decode, cost.prefill) for cost in costs_of(record(profiles=part), "r.json")} == {(1.0, None)}


def test_the_package_tells_what_the_records_show() -> None:
    """Every figure that ships is computed again from the committed record that it names."""
    told = read_costs()
    assert told
    for cost in told:
        found = json.loads((RESULTS / cost.record).read_text())
        assert cost in list(costs_of(found, cost.record)), cost.record
    assert len({(cost.profile, cost.record) for cost in told}) == len(told)
    for profile in PROFILES:
        assert profile_costs(profile) == [cost for cost in told if cost.profile == profile]
    invented = told[0].model_copy(update={"decode": 1.0})
    assert invented not in list(costs_of(json.loads((RESULTS / invented.record).read_text()), invented.record))


def test_the_file_is_written_by_a_command() -> None:
    """As it lies there, of the records that it names, which make up its lines in their order."""
    import typer

    command = typer.Typer()
    command.command()(main)
    names = [str(RESULTS / cost.record) for cost in read_costs()]
    written = CliRunner().invoke(command, names)
    assert written.exit_code == 0, written.output
    file = Path(__file__).parents[2] / "server_config/profile_costs.json"
    assert written.stdout == file.read_text()
    nothing = CliRunner().invoke(command, [str(RESULTS / "2026-11-22-amd-epyc-2-cores-3.json")])
    assert "none of these records has a part idle or profiles" in nothing.output


GOOD: dict[str, Any] = {
    "profile": "all", "device": "abacus", "shape": "tiny", "reserved": "all", "decode": 1.0, "prefill": 0.99,
    "date": "2026-11-28", "record": "r.json",
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"profile": "most"},
        {"decode": 0},
        {"decode": "fast"},
        {"date": "soon"},
        {"record": "../r.json"},
        {"device": ""},
        {"x": 1},
    ],
)
def test_a_file_of_another_form_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps([GOOD, {**GOOD, "decode": None}]))
    bad.write_text(json.dumps([GOOD, {**GOOD, **wrong}]))
    assert [cost.decode for cost in read_costs(good)] == [1.0, None]
    with pytest.raises(ValidationError):
        read_costs(bad)


# -- the default -------------------------------------------------------------------------------------------------------


def cost(profile: str, decode: float | None, prefill: float | None) -> ProfileCost:
    return ProfileCost.model_validate({**GOOD, "profile": profile, "decode": decode, "prefill": prefill})


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([], "promoted"),
        ([("promoted", 0.9, 0.9)], "promoted"),
        ([("standard", 0.99, 0.99)], "standard"),
        ([("standard", 0.989, 1.0)], "promoted"),
        ([("standard", 1.0, 0.989)], "promoted"),
        ([("standard", 1.0, None)], "promoted"),
        ([("standard", 1.0, 1.0), ("standard", 0.9, 1.0)], "promoted"),
        ([("standard", 1.0, 1.0), ("all", 0.98, 1.0)], "standard"),
        ([("standard", 0.9, 1.0), ("all", 1.0, 1.0)], "all"),
    ],
)
def test_the_rule_of_the_default_is_the_largest_profile_at_low_cost_each_time(costs: list[Any], expected: str) -> None:
    assert largest_at_low_cost(tuple(cost(*each) for each in costs)) == expected


def test_the_default_is_by_its_rule() -> None:
    """With other measurements than today's it may have to be another one."""
    assert EditSettings(store="/none").profiles == (largest_at_low_cost(read_costs()),)
    assert LEAST == IDLE, "the benchmark's own target"
