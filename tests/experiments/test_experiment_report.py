"""`vllm-edits experiment report`, as typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vllm_edits.plugin.cli  # noqa: F401  adds the report
from tests.support.bundles import random_bundle
from tests.support.experiment_store import two_arms
from tests.support.fakes import BASE
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange
from vllm_edits.plugin.experiments.analysis.replay import AnswerPair, Replayed, bodies, summary
from vllm_edits.plugin.experiments.exposure_log import ExposureLog
from vllm_edits.plugin.experiments.records import Exposure

Run = Callable[..., Any]


def exposure(number: int, arm: str, phase: int = 1, *, failed: bool = False) -> Exposure:
    return Exposure(
        at=datetime.now(UTC), request=f"{arm}-{number}", experiment="tone", phase=phase, arm=arm, version="base",
        unit=f"{arm}-{number}", source="user", chosen="hash", outcome="error" if failed else "ok", prompt_tokens=4,
        output_tokens=8, seconds=0.1, first_token_seconds=0.05 + number % 7 / 100, seconds_per_token=0.01, empty=False,
        looping=False, corrupted=False,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The experiment of two arms has run for a phase; of the second arm every fifth request failed."""
    store = EditStore(str(tmp_path / "store"), create=True)
    store.promote(f"polite@{store.publish(random_bundle('polite', BASE, 1))}")
    Experiments(store).create(two_arms("base", "polite"))
    Experiments(store).change(ExperimentChange(experiment="tone", operation="start"))
    log = ExposureLog(tmp_path / "exposures", 1 << 20)
    for number in range(600):
        log.write(exposure(number, "control"))
        log.write(exposure(number, "milder", failed=number % 5 == 0))
    monkeypatch.setenv("VLLM_EDITS_STORE", store.url)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["experiment", "report", *words])


def test_a_table_a_page_a_picture_and_data_say_the_same(run: Run, tmp_path: Path) -> None:
    told = run("tone", "exposures", "--html", "tone.html", "--picture", "tone.png")
    assert told.exit_code == 0, told.stderr
    assert "tone, phase 1" in told.stdout
    (error,) = [line for line in told.stdout.splitlines() if line.split()[:2] == ["error", "milder"]]
    assert error.split()[-1] == "worse"
    (first_token,) = [
        line for line in told.stdout.splitlines() if line.split()[:2] == ["first_token_seconds", "milder"]
    ]
    assert first_token.rstrip().endswith("no difference seen yet")
    assert "worse" in (tmp_path / "tone.html").read_text()
    assert (tmp_path / "tone.png").read_bytes().startswith(b"\x89PNG")
    lines = json.loads(run("tone", "exposures", "--json").stdout)["lines"]
    verdicts = {(line["metric"], line["arm"]): line["verdict"] for line in lines}
    assert verdicts["error", "milder"] == "worse"
    assert verdicts["first_token_seconds", "milder"] == "no difference seen yet"


def test_what_cannot_be_reported_says_why(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, said in {
        ("tone", "nowhere"): "there is no exposure log at nowhere",
        ("tone", "empty"): "expected exposure logs in empty",
        ("tune", "exposures"): "Did you mean 'tone'",
        ("tone", "exposures", "--phase", "2"): "so phase 2 has no evidence",
    }.items():
        result = run(*words)
        assert result.exit_code == 1
        assert said in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "contains no prompt"),
        ("One\n{'prompt': 1}\n", "line 2: expected JSON"),
        ('{"text": "x"}\n', "expected a field `prompt` or `messages`, found text"),
        (None, "cannot be read"),
        ("One two\n", "Check that the server runs, or name its address with --url"),
    ],
)
def test_what_cannot_be_replayed_says_why(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "prompts").write_text(text)
    words = ["experiment", "replay", str(tmp_path / "prompts"), "a", "b", "--url", "http://127.0.0.1:9"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert said in result.stderr


def test_prompts_are_read_as_text_and_as_requests(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text('One two\n\n{"messages": [], "max_tokens": 3}\n')
    assert bodies(tmp_path / "prompts") == [{"prompt": "One two"}, {"messages": [], "max_tokens": 3}]


def test_a_summary_of_where_answers_part() -> None:
    one, other = Replayed([1, 2, 3], [-0.1, -0.2, -0.3], "x"), Replayed([1, 9], [-0.1, -0.9], "y")
    pair = AnswerPair.of("p", one, other)
    assert (pair.differs_at, pair.logprobs) == (1, (-0.2, -0.9))
    same = AnswerPair.of("p", one, one)
    assert (same.differs_at, same.logprobs) == (None, (None, None))
    longer = AnswerPair.of("p", one, Replayed([1, 2], [-0.1, -0.2], "y"))
    assert (longer.differs_at, longer.logprobs) == (2, (-0.3, None))
    assert summary([pair, same, longer]) == {"prompts": 3, "differ": 2, "share": 2 / 3, "median_token": 1.5}
