"""Experiments on a real server, with slots that are too few: arms, evidence, feedback, a guardrail, a report."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import vllm_edits.plugin.cli  # noqa: F401  adds the report
from loadtests.harness.client import complete
from tests.engine.prometheus import needs_prometheus, prometheus
from tests.support.engine import Serving, wait_until
from vllm_edits import edit_store
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.experiments.assignment import bucket, chosen
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange
from vllm_edits.plugin.experiments.analysis.evidence import Logs, gather
from vllm_edits.plugin.experiments.records import ShadowRecord

pytestmark = pytest.mark.vllm

DOCUMENTATION = Path(edit_store.__file__).with_name("EXPERIMENTS.md")
UNITS = [f"user-{number}" for number in range(40)]
PROMPT = "One two three"


@pytest.fixture
def trial(small_server: Serving) -> Iterator[Serving]:
    """`variant-0`, shared by the base, and two versions that clients could also name; stopped afterwards."""
    yield small_server
    standing = Experiments(small_server.store).standings()[0].get("tone")
    if standing is not None and standing.serving:
        do(small_server, "stop")


def do(serving: Serving, operation: Any, **fields: Any) -> None:
    Experiments(serving.store).change(ExperimentChange(experiment="tone", operation=operation, **fields))
    serving.sync()


def begin(serving: Serving, **fields: Any) -> int:
    """Start a new phase; returns its number."""
    serves = ["base", *(f"{name}@{serving.store.resolve(name)}" for name in ("variant-1", "variant-2"))]
    arms = [{"name": name, "serves": each, "weight": weight}
            for name, each, weight in zip(("control", "one", "two"), serves, (0.4, 0.3, 0.3), strict=True)]  # fmt: skip
    log = Experiments(serving.store)
    log.create(Experiment.parse({"name": "tone", "model": "variant-0", "arms": arms, **fields}))
    do(serving, "start")
    return log.standings()[0]["tone"].phase


def arm(unit: str, phase: int, coverage: float = 1.0) -> str | None:
    number = chosen((0.4, 0.3, 0.3), coverage, bucket(f"tone/{phase}", unit))
    return None if number is None else ("control", "one", "two")[number]


def ask(serving: Serving, unit: str, **options: Any) -> dict[str, Any]:
    return complete(serving.url, "variant-0", PROMPT, 8, ignore_eos=True, user=unit, **options)


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def test_units_get_what_their_arms_say_and_all_of_it_is_written_down(trial: Serving) -> None:
    """Under load, through two slots; what a unit is answered equals what its version answers when it is named."""
    solo = {"control": text(complete(trial.url, "base", PROMPT, 8, ignore_eos=True))}
    for name, variant in (("one", "variant-1"), ("two", "variant-2")):
        solo[name] = text(complete(trial.url, variant, PROMPT, 8, ignore_eos=True))
    assert len(set(solo.values())) == 3, "positive control: arms differ"
    before = trial.metric("vllm_edits_arm_requests_total")
    phase = begin(trial)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda unit: ask(trial, unit), UNITS * 2))
    for unit, answer in zip(UNITS * 2, answers, strict=True):
        assert answer["headers"]["x-edits-experiment"] == f"tone/{arm(unit, phase)}"
        assert text(answer) == solo[arm(unit, phase) or "control"]
        assert answer["model"] == "variant-0"
    assert trial.metric("vllm_edits_arm_requests_total") - before == len(answers)
    evidence = gather([trial.exposures], "tone", phase)
    assert evidence.units == Counter(arm(unit, phase) for unit in UNITS)
    assert sum(evidence.metrics["error"]["one"].counts) == 2 * evidence.units["one"]
    assert not any(value for arms in evidence.metrics["error"].values() for value in arms.sums)


def test_feedback_by_the_id_of_an_answer_and_a_report(trial: Serving) -> None:
    """Whichever process answers. The planted effect is told by the command, and its negative control is not."""
    phase = begin(trial, feedback=[{"name": "thumbs"}, {"name": "stars", "maximum": 5}])
    ids = {}
    with ThreadPoolExecutor(12) as pool:
        units = [f"reader-{number}" for number in range(400)]
        for unit, answer in zip(units, pool.map(lambda unit: ask(trial, unit), units), strict=True):
            ids[unit] = answer["id"]
    with httpx.Client(base_url=trial.url) as client:
        for number, (unit, request) in enumerate(ids.items()):
            likes = float(arm(unit, phase) == "two" or number % 4 == 0)
            for metric, value in (("thumbs", likes), ("stars", float(number % 5))):
                told = {"request_id": request, "metric": metric, "value": value}
                assert client.post("/v1/edits/feedback", json=told).status_code == 200
        again = client.post("/v1/edits/feedback", json={"request_id": request, "metric": "thumbs", "value": 1 - likes})
        assert again.status_code == 422
        unknown = client.post("/v1/edits/feedback", json={"request_id": "cmpl-x", "metric": "thumbs", "value": 1})
        assert unknown.status_code == 404
    words = ["experiment", "report", "tone", str(trial.exposures), "--store", trial.store.url, "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    lines = {(line["metric"], line["arm"]): line for line in json.loads(result.stdout)["lines"]}
    assert lines["thumbs", "two"]["verdict"] == "better"
    assert lines["stars", "two"]["verdict"] == "no difference seen yet"
    assert lines["thumbs", "control"]["requests"] == sum(arm(unit, phase) == "control" for unit in ids)


@needs_prometheus
def test_a_real_prometheus_reads_what_its_clients_counted(trial: Serving, tmp_path: Path) -> None:
    """Of every arm, whichever processes answered; and each expression of the documentation has an answer."""
    phase = begin(trial, feedback=[{"name": "thumbs"}])
    tone = '{experiment="tone"}'
    with prometheus([trial.url], tmp_path / "prometheus") as reads:

        def counted(metric: str) -> Counter[tuple[str, ...]]:
            return Counter(dict(reads.by(f"sum by (arm) (vllm_edits_{metric}{tone})", "arm")))  # type: ignore[arg-type]

        series = ("arm_requests_total", "arm_time_to_first_token_seconds_count", "feedback_count")
        before = {metric: counted(metric) for metric in series}
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda unit: ask(trial, unit), UNITS * 2))
        for answer in answers:
            told = {"request_id": answer["id"], "metric": "thumbs", "value": 1}
            httpx.post(f"{trial.url}/v1/edits/feedback", json=told, timeout=60).raise_for_status()
        sent = Counter((str(arm(unit, phase)),) for unit in UNITS * 2)
        wait_until(lambda: counted("feedback_count") - before["feedback_count"] == sent, "the last scrape", 20)
        assert {metric: counted(metric) - before[metric] for metric in series} == dict.fromkeys(series, sent)
        documented = DOCUMENTATION.read_text().split("```promql\n")[1].split("```")[0].replace("milder", "tone")
        for expression in [line for line in documented.splitlines() if not line.startswith("#")]:
            assert set(reads.by(expression, "arm")) == set(sent), expression


def test_a_guardrail_withdraws_an_arm_while_requests_run_and_none_fails(trial: Serving) -> None:
    """Clients dislike one arm: it is withdrawn within its window, the others stay, and the store says why."""
    rule = {"metric": "thumbs", "minimum": 0.5, "interval": "5s", "minimum_requests": 3}
    phase = begin(trial, feedback=[{"name": "thumbs"}], guardrails=[rule])
    disliked, told = "tone/one", 0
    deadline = time.monotonic() + 120
    with httpx.Client(base_url=trial.url) as client, ThreadPoolExecutor(8) as pool:
        while not Experiments(trial.store).standings()[0]["tone"].withdrawn:
            assert time.monotonic() < deadline, "the guardrail did not trip"
            for answer in pool.map(lambda unit: ask(trial, unit), UNITS[:24]):
                value = float(answer["headers"]["x-edits-experiment"] != disliked)
                request = {"request_id": answer["id"], "metric": "thumbs", "value": value}
                assert client.post("/v1/edits/feedback", json=request).status_code == 200
                told += 1
    standing = Experiments(trial.store).standings()[0]["tone"]
    assert standing.withdrawn == {"one"}, f"after {told} answers"
    assert "thumbs was 0 over" in standing.reason
    unit = next(unit for unit in UNITS if arm(unit, phase) == "one")
    assert ask(trial, unit)["headers"]["x-edits-version"] == "base"
    other = next(unit for unit in UNITS if arm(unit, phase) == "two")
    assert ask(trial, other)["headers"]["x-edits-version"] == trial.store.resolve("variant-2")


def test_two_answers_to_one_request_part_where_two_solo_runs_do(trial: Serving, tmp_path: Path) -> None:
    """The client's answer is its version's own; the record's token and both likelihoods are those of the solo runs, and
    so is what the command says that asks a file of prompts."""
    one, two = (f"{name}@{trial.store.resolve(name)}" for name in ("variant-3", "variant-4"))
    prompts = ["One two three", "The sea and the hills", "A long road"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    words = ["replay", str(tmp_path / "prompts.txt"), one, two, "--url", trial.url, "--max-tokens", "12", "--json"]
    replayed = CliRunner().invoke(app, ["experiment", *words])
    assert replayed.exit_code == 0, replayed.stderr
    pairs = json.loads(replayed.stdout)["pairs"]
    places = []
    for prompt, told in zip(prompts, pairs, strict=True):
        options = {"ignore_eos": False, "logprobs": 0, "return_token_ids": True}
        left, right = (complete(trial.url, model, prompt, 12, **options)["choices"][0] for model in (one, two))
        tokens = zip(left["token_ids"], right["token_ids"], strict=False)
        place = next((at for at, (ours, theirs) in enumerate(tokens) if ours != theirs), None)
        known = len(pairs_of(trial))
        headers = {"x-edits-shadow": f"{one},{two}"}
        body = {"model": "base", "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{trial.url}/v1/completions", json=body, headers=headers, timeout=60).json()
        assert answer["choices"][0]["token_ids"] == left["token_ids"]
        assert answer["choices"][0]["logprobs"] is None, "the client did not ask for them"
        deadline = time.monotonic() + 30
        while len(pairs_of(trial)) == known:
            assert time.monotonic() < deadline, "the pair was not written down"
            time.sleep(0.05)
        found = pairs_of(trial)[-1]
        assert found.versions == (trial.store.resolve("variant-3"), trial.store.resolve("variant-4"))
        assert found.differs_at == told["differs_at"] == place
        if place is not None:
            for said, solo in zip(found.said, (left, right), strict=True):
                assert said is not None
                assert said.token == solo["token_ids"][place]
                assert said.logprob == pytest.approx(solo["logprobs"]["token_logprobs"][place], abs=1e-3)
        places.append(place)
    assert any(place is not None for place in places), "positive control: some part"


def pairs_of(serving: Serving) -> list[ShadowRecord]:
    if not list(serving.exposures.glob("exposures-*")):
        return []
    return [record for record in Logs([serving.exposures]) if isinstance(record, ShadowRecord)]
