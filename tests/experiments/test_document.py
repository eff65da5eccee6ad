"""The document of an experiment, and how experiments stand after what was done to them."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.experiments import START, created, document, done
from vllm_edits.edit_store.errors import Conflict, ExperimentRefused, NotFound
from vllm_edits.edit_store.experiments.assignment import bucket, chosen
from vllm_edits.edit_store.experiments.document import Experiment, Holdout, Namespace
from vllm_edits.edit_store.experiments.state import ExperimentChange


def widened(to: float) -> ExperimentChange:
    return ExperimentChange(experiment="tone", operation="widen", coverage=to)


def of_arm(operation: Any, arm: str) -> ExperimentChange:
    return ExperimentChange(experiment="tone", operation=operation, arm=arm)


def test_a_document_is_read_from_yaml_and_from_json(tmp_path: Path) -> None:
    """The same experiment, lengths of time in words or seconds."""
    (tmp_path / "tone.yaml").write_text(
        "name: tone\nmodel: polite\narms:\n- {name: control, serves: base, weight: 0.5}\n"
        "- {name: milder, serves: polite, weight: 0.5}\ncoverage: 0.1\nramp: [{after: 1h, coverage: 1}]\n"
    )
    (tmp_path / "tone.json").write_text(json.dumps(document(coverage=0.1, ramp=[{"after": 3600, "coverage": 1}])))
    assert Experiment.load(tmp_path / "tone.yaml") == Experiment.load(tmp_path / "tone.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": [{"name": "a", "serves": "base", "weight": 0.5}, {"name": "b", "serves": "x", "weight": 0.4}]},
         "expected weights that sum to 1, found 0.9 of 0.5, 0.4"),
        ({"arms": [{"name": "a", "serves": "base", "weight": 0.5}, {"name": "a", "serves": "x", "weight": 0.5}]},
         "arms: a is listed more than once"),
        ({"arms": [{"name": "a", "serves": "base", "weight": 0.5}, {"name": "b", "serves": "X y", "weight": 0.5}]},
         "'X y' is not the name of a variant"),
        ({"coverage": 0.5, "ramp": [{"after": "1h", "coverage": 0.1}]}, "would take units out of their arms"),
        ({"ramp": [{"after": "2h", "coverage": 1}, {"after": "1h", "coverage": 1}]}, "expected steps in order of time"),
        ({"ramp": [{"after": "soon", "coverage": 1}]}, "expected a duration such as 30s, 5m, 1h or 2d"),
        ({"coverage": 0.0001}, "distinguishes only 10000 parts"),
        ({"namespace": {"name": "n", "start": 0.5, "end": 0.5}}, "it would contain no unit"),
        ({"feedback": [{"name": "error"}]}, "error is measured by the server; choose another name"),
        ({"guardrails": [{"metric": "thumbs", "minimum": 0.2}]}, "unknown metric 'thumbs'"),
        ({"guardrails": [{"metric": "error", "minimum": 0.2, "maximum": 1}]}, "found maximum and minimum"),
        ({"shadow": {"arm": "control", "share": 0.1}}, "expected an arm other than the control (milder)"),
        ({"weights": [1]}, "weights: unknown field"),
    ],
)  # fmt: skip
def test_a_wrong_document_is_refused_with_what_was_expected(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ExperimentRefused) as refused:
        Experiment.parse(document(**changes))
    assert said in str(refused.value)


def test_everything_that_is_wrong_between_fields_is_told_at_once() -> None:
    with pytest.raises(ExperimentRefused) as refused:
        Experiment.parse(document(coverage=0.5, ramp=[{"after": "1h", "coverage": 0.1}], feedback=[{"name": "error"}]))
    assert {reason.code for reason in refused.value.reasons} == {"ramp", "names"}


def test_what_is_no_document_says_so(tmp_path: Path) -> None:
    """A file that is not there, one that is too big, one that is no YAML, one that is a list."""
    (tmp_path / "big").write_bytes(b"#" * 40_000)
    (tmp_path / "broken").write_text("name: [")
    (tmp_path / "list").write_text("[1]")
    for name, said in {
        "none": "cannot be read",
        "big": "at most 32768",
        "broken": "neither YAML nor JSON",
        "list": "dict",
    }.items():
        with pytest.raises(ExperimentRefused, match=said):
            Experiment.load(tmp_path / name)


@given(units=st.lists(st.text(min_size=1, max_size=12), max_size=50), cut=st.integers(1, 99))
def test_parts_of_a_namespace_share_nobody(units: list[str], cut: int) -> None:
    """And a holdout with no share holds nobody, with all of it everybody."""
    left, right = Namespace(name="n", start=0, end=cut / 100), Namespace(name="n", start=cut / 100, end=1)
    assert not left.overlaps(right)
    assert left.overlaps(Namespace(name="n", start=0, end=1))
    for unit in units:
        assert left.holds(unit) != right.holds(unit)
        assert not Holdout(name="h", share=0).holds(unit)
        assert Holdout(name="h", share=1).holds(unit)


def test_a_ramp_grows_with_time_stands_still_when_held_and_goes_on() -> None:
    """Held for an hour, it is an hour behind."""
    made = done(
        {},
        created(coverage=0.1, ramp=[{"after": "1h", "coverage": 0.5}, {"after": "2h", "coverage": 1}]),
        ("tone", "start"),
    )
    hour = timedelta(hours=1)
    assert [made["tone"].coverage(START + late) for late in (timedelta(0), hour, 2 * hour)] == [0.1, 0.5, 1]
    half = START + hour / 2
    held = done(made, ("tone", "hold"), at=half)
    assert held["tone"].coverage(START + 9 * hour) == 0.1
    on = done(held, ("tone", "resume"), at=half + hour)
    assert on["tone"].coverage(START + 2 * hour - timedelta(seconds=1)) == 0.1
    assert on["tone"].coverage(START + 2 * hour) == 0.5


@given(moments=st.lists(st.integers(0, 7200), min_size=2, max_size=6), unit=st.text(max_size=12))
def test_within_a_phase_a_unit_never_changes_its_arm(moments: list[int], unit: str) -> None:
    """Through a ramp, a hold, and a widening."""
    standings = done({}, created(coverage=0.1, ramp=[{"after": "1h", "coverage": 0.5}]), ("tone", "start"))
    arms = []
    for number, moment in enumerate(sorted(moments)):
        at = START + timedelta(seconds=moment)
        if number == 1:
            standings = done(standings, ("tone", "hold"), at=at)
        if number == 2:
            standings = done(standings, widened(0.7), at=at)
        standing = standings["tone"]
        arms.append(chosen(standing.document.weights, standing.coverage(at), bucket(standing.seed, unit)))
    seen = [arm for arm in arms if arm is not None]
    assert len(set(seen)) <= 1
    assert arms == [None] * (len(arms) - len(seen)) + seen


def test_a_start_is_a_new_phase() -> None:
    """Another seed, nobody withdrawn, the ramp from its beginning."""
    made = done({}, created(), ("tone", "start"), of_arm("withdraw", "milder"), ("tone", "stop"), ("tone", "start"))
    assert (made["tone"].phase, made["tone"].seed, made["tone"].withdrawn) == (2, "tone/2", frozenset())


@pytest.mark.parametrize(
    ("changes", "last", "said"),
    [
        ([], ("tone", "start"), "there is no experiment 'tone'"),
        ([created(), ("tone", "start")], ("tone", "start"), "runs already, in phase 1 since 2026-11-22 12:00"),
        ([created()], ("tone", "stop"), "is draft: there is nothing to stop"),
        ([created()], ("tone", "hold"), "is draft: there is no ramp to hold"),
        ([created(), ("tone", "start")], ("tone", "resume"), "is not held"),
        ([created(), ("tone", "start"), ("tone", "hold")], ("tone", "hold"), "is held already"),
        ([created(coverage=0.5), ("tone", "start")], widened(0.4), "a coverage above the present 0.5, found 0.4"),
        ([created(), ("tone", "start")], of_arm("withdraw", "other"), "has no arm 'other'; it has control, milder"),
        ([created(), ("tone", "start")], of_arm("withdraw", "control"), "Stop the experiment instead"),
        ([created(), ("tone", "start"), of_arm("withdraw", "milder")], of_arm("withdraw", "milder"), "is withdrawn al"),
        ([created(), ("tone", "start"), of_arm("withdraw", "milder")], of_arm("promote", "milder"), "a new phase"),
        ([created()], of_arm("promote", "milder"), "start it before you promote an arm"),
        ([created(), ("tone", "start"), of_arm("promote", "control")], ("tone", "start"), "serves all units"),
        ([created(), ("tone", "start")], created(unit_header="x-user"), "unit_header: units would change their arms"),
        ([created(coverage=0.5), ("tone", "start")], created(coverage=0.4), "units would leave"),
        ([created(), ("tone", "start"), created(name="two")], ("two", "start"), "'tone' runs already for"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_and_changes_nothing(changes: list[Any], last: Any, said: str) -> None:
    standings = done({}, *changes)
    with pytest.raises((ExperimentRefused, Conflict, NotFound)) as refused:
        done(standings, last)
    assert said in str(refused.value)


def test_two_experiments_for_one_model_need_parts_of_one_namespace() -> None:
    """Side by side is fine; over each other, or in another namespace, is not. A stopped one stands in nobody's way."""
    first, shadow = {"name": "n", "start": 0, "end": 0.5}, {"name": "n", "start": 0.5, "end": 1}
    running = done({}, created(namespace=first), ("tone", "start"))
    done(running, created(name="two", namespace=shadow), ("two", "start"))
    for wrong in ({"name": "n", "start": 0.4, "end": 1}, {"name": "m", "start": 0.5, "end": 1}, None):
        with pytest.raises(ExperimentRefused):
            done(running, created(name="two", namespace=wrong), ("two", "start"))
    with pytest.raises(ExperimentRefused, match="of namespace 'n'"):
        done(running, created(name="two", model="other", namespace=first), ("two", "start"))
    done(done(running, ("tone", "stop")), created(name="two", namespace=first), ("two", "start"))


def test_a_running_experiment_takes_a_document_that_moves_nobody() -> None:
    """Other guardrails, and a ramp that goes further."""
    running = done({}, created(coverage=0.2), ("tone", "start"))
    wider = created(
        coverage=0.2, ramp=[{"after": "1h", "coverage": 1}], guardrails=[{"metric": "error", "maximum": 0.1}]
    )
    changed = done(running, wider)["tone"]
    assert (changed.phase, changed.status, len(changed.document.guardrails)) == (1, "running", 1)


def test_who_is_promoted_serves_everybody_or_becomes_the_variants_version() -> None:
    """The treatment serves the variant that clients ask for: its tag will say so. The control, the base, does not."""
    running = done({}, created(), ("tone", "start"))
    assert (done(running, of_arm("promote", "milder"))["tone"].status) == "stopped"
    promoted = done(running, of_arm("promote", "control"))["tone"]
    assert (promoted.status, promoted.promoted_arm) == ("promoted", "control")
    assert done({"tone": promoted}, ("tone", "stop"))["tone"].promoted_arm is None
