"""Experiments in a real store: the log, what needs versions to be kept, and the commands as typed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.bundles import random_bundle, whose_gates_fire
from tests.support.experiment_store import two_arms
from tests.support.fakes import BASE
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.canonical import canonical_json
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.errors import Conflict, EditsError, ExperimentRefused, NotFound
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange
from vllm_edits.edit_store.upkeep.audit import audit
from vllm_edits.edit_store.upkeep.collect import collect

Run = Callable[..., Any]


@pytest.fixture
def store(tmp_path: Path) -> EditStore:
    return EditStore(str(tmp_path / "store"), create=True)


@pytest.fixture
def versions(store: EditStore) -> list[str]:
    """Two versions; the first is promoted, the second only published."""
    found = [store.publish(random_bundle("polite", BASE, seed)) for seed in (1, 2)]
    store.promote(f"polite@{found[0]}")
    return found


def start(name: str = "tone") -> ExperimentChange:
    return ExperimentChange(experiment=name, operation="start")


def test_an_arm_that_names_a_version_is_pinned_to_all_of_its_digits(store: EditStore, versions: list[str]) -> None:
    """A tag stays a tag; the beginning of a version becomes the version."""
    made = Experiments(store).create(two_arms("polite@prod", f"polite@{versions[1][:8]}"))
    assert [arm.serves for arm in made.document.arms] == ["polite@prod", f"polite@{versions[1]}"]
    standings, without_effect = Experiments(store).standings()
    assert standings == {"tone": made}
    assert not without_effect


@pytest.mark.usefixtures("versions")
def test_arms_that_cannot_be_served_are_refused_all_at_once(store: EditStore) -> None:
    """A tag that promotes nothing, a name that is not there, an edit of another model; nothing is written."""
    other = BASE.model_copy(update={"name": "other", "files": {"model.safetensors": "b" * 64}})
    foreign = store.publish(random_bundle("foreign", other, 3))
    for arms, said in {
        ("polite@staging", "rude"): ["'control' cannot be served",  "nothing is published under 'rude'"],
        ("polite", f"foreign@{foreign}"): ["edits other, but arm 'control' edits tiny"],
    }.items():  # fmt: skip
        with pytest.raises(ExperimentRefused) as refused:
            Experiments(store).create(two_arms(*arms))
        assert all(word in str(refused.value) for word in said)
    assert Experiments(store).history() == []


def test_a_rule_about_what_an_author_measured_needs_that_measurement(store: EditStore, versions: list[str]) -> None:
    """Of every arm but the control, and of no other rule; the base has no gates that fire."""
    rules = [{"metric": "gate_firings", "maximum_authored_ratio": 2}]
    measured = store.publish(whose_gates_fire(random_bundle("polite", BASE, 3), 0.1))
    with pytest.raises(ExperimentRefused, match="the version of arm 'milder' has no measurement gate_firings"):
        Experiments(store).create(two_arms("base", f"polite@{versions[1]}", guardrails=rules))
    assert Experiments(store).history() == []
    Experiments(store).create(two_arms(f"polite@{versions[1]}", f"polite@{measured}", guardrails=rules))
    unruled = [{"metric": "gate_firings", "maximum": 2}]
    Experiments(store).create(two_arms("base", f"polite@{versions[1]}", guardrails=unruled))


@pytest.mark.usefixtures("versions")
def test_an_arm_that_went_away_before_the_start_is_told_then(store: EditStore) -> None:
    Experiments(store).create(two_arms("base", "polite"))
    store.withdraw("polite")
    with pytest.raises(ExperimentRefused, match="was withdrawn"):
        Experiments(store).change(start())


@pytest.mark.usefixtures("versions")
def test_of_two_starts_that_would_overlap_one_is_refused(store: EditStore) -> None:
    """Both decide on the same log, and create-if-absent lets one through. Ten races, each won by exactly one."""
    for number in range(10):
        names = [f"a{number}", f"b{number}"]
        for name in names:
            Experiments(store).create(two_arms("base", "polite", name=name, model=f"m{number}"))

        def tried(name: str) -> str:
            try:
                return Experiments(store).change(start(name)).status
            except (Conflict, ExperimentRefused):
                return "refused"

        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(tried, names)) == ["refused", "running"]


def test_promoting_an_arm_of_the_variant_moves_its_tag(store: EditStore, versions: list[str]) -> None:
    """And the experiment ends. Given again it says so."""
    experiments = Experiments(store)
    experiments.create(two_arms("polite", f"polite@{versions[1]}"))
    experiments.change(start())
    assert experiments.promote("tone", "milder", reason="better").status == "stopped"
    head = store.head("polite")
    assert head is not None
    assert (head.version, head.operation, head.reason) == (versions[1], "promote", "better")


@pytest.mark.usefixtures("versions")
def test_promoting_the_base_leaves_the_tag_alone(store: EditStore) -> None:
    """Clients that ask for the variant get the base because the experiment goes on saying so."""
    experiments = Experiments(store)
    experiments.create(two_arms("base", "polite"))
    experiments.change(start())
    assert experiments.promote("tone", "control").promoted_arm == "control"
    assert len(store.history("polite")) == 1


def test_a_collection_keeps_what_an_arm_names(store: EditStore, versions: list[str], tmp_path: Path) -> None:
    """Long after the grace time; the version that no arm and no tag names goes."""
    dead = store.publish(random_bundle("polite", BASE, 4))
    Experiments(store).create(two_arms("polite", f"polite@{versions[1]}"))
    old = time.time() - 90 * 86400
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (old, old))
    assert collect(store).versions == (dead,)
    assert audit(store).clean
    store.bundle(versions[1])


@pytest.mark.usefixtures("versions")
def test_an_entry_that_does_not_fit_is_passed_over_and_told(store: EditStore) -> None:
    """Somebody wrote a second start past the rules: servers keep what stands, the audit finds it."""
    experiments = Experiments(store)
    experiments.create(two_arms("base", "polite"))
    experiments.change(start())
    last = experiments.history()[-1]
    wrong = last.model_copy(update={"sequence": last.sequence + 1, "previous_sha256": last.digest, "nonce": "0" * 16})
    store.backend.create(f"experiments/{wrong.sequence:020d}.json", wrong.to_bytes())
    standings, without_effect = experiments.standings()
    assert standings["tone"].phase == 1
    assert "entry 3 of the experiments has no effect" in without_effect[0]
    (finding,) = audit(store).findings
    assert "runs already" in finding.problem


@pytest.mark.usefixtures("versions")
def test_a_broken_log_is_an_error_not_an_empty_one(store: EditStore) -> None:
    experiments = Experiments(store)
    experiments.create(two_arms("base", "polite"))
    experiments.change(start())
    store.backend.delete("experiments/" + f"{1:020d}.json")
    with pytest.raises(EditsError, match="entry 1 is missing"):
        experiments.standings()
    assert "entry 1 is missing" in audit(store).findings[0].problem


@pytest.fixture
def run(tmp_path: Path, store: EditStore, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("VLLM_EDITS_STORE", store.url)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["experiment", *words])


def test_an_experiment_from_the_command_line(run: Run, versions: list[str], tmp_path: Path, store: EditStore) -> None:
    """create, start, show, widen, hold, resume, withdraw, stop, list, history: what each says."""
    two = two_arms("polite", f"polite@{versions[1][:8]}", coverage=0.02, ramp=[{"after": "1d", "coverage": 1}],
                   guardrails=[{"metric": "error", "maximum": 0.05}])  # fmt: skip
    (tmp_path / "tone.json").write_bytes(canonical_json(two.model_dump(mode="json")))
    assert run("create", "tone.json").stdout == "tone is draft\n"
    assert run("start", "tone").stdout == "tone is running, phase 1; of all units control 1.00%, milder 1.00%\n"
    shown = run("show", "tone").stdout
    assert "coverage 0.02 0s after the start  <- now" in shown
    assert "guardrail: error maximum 0.05, every 30s, 0 failures tolerated" in shown
    assert (
        run("widen", "tone", "0.5").stdout == "tone is running, phase 1; of all units control 25.00%, milder 25.00%\n"
    )
    assert run("hold", "tone").exit_code == 0
    assert "the ramp is held" in run("show", "tone").stdout
    assert run("resume", "tone").exit_code == 0
    assert run("withdraw", "tone", "milder", "--reason", "rude").exit_code == 0
    listed = json.loads(run("list", "--json").stdout)
    assert [(row["name"], row["status"], row["reason"]) for row in listed] == [("tone", "running", "rude")]
    assert json.loads(run("stop", "tone", "--json").stdout)[0]["status"] == "stopped"
    history = [row.split()[2] for row in run("history", "tone").stdout.splitlines()[1:]]
    assert history == ["create", "start", "widen", "hold", "resume", "withdraw", "stop"]
    assert store.head("polite").version == versions[0]  # type: ignore[union-attr]


@pytest.mark.usefixtures("versions")
def test_a_refusal_is_a_message_and_an_exit_code(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tone.yaml").write_text("name: tone\n")
    for words, said in {
        ("create", "tone.yaml"): "model: Field required",
        ("start", "tone"): "there is no experiment 'tone'",
        ("show", "tone"): "See: vllm-edits experiment list",
    }.items():
        result = run(*words)
        assert result.exit_code == 1
        assert said in result.stderr
    with pytest.raises(NotFound):
        Experiments(EditStore(str(tmp_path / "store"))).history("tone")
