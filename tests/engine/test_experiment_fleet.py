"""Two servers on one store: one table of arms, feedback to either, one report; and one of them is killed in between."""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import vllm_edits.plugin.cli  # noqa: F401  adds the report
from loadtests.harness.client import complete
from loadtests.harness.server import Server
from tests.engine.prometheus import needs_prometheus, prometheus
from tests.proofs.parity import cores_apart
from tests.support.bundles import base_of, random_bundle
from tests.support.engine import SLOW_ON_TWO, Serving, serve
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange

pytestmark = [pytest.mark.vllm, *SLOW_ON_TWO]

FLAGS = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager",
         "--num-gpu-blocks-override", "64")  # fmt: skip
POLL = 1.0
UNITS = [f"user-{number}" for number in range(60)]


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Serving]]:
    """Two servers with a store, and a key for feedback, in common; each writes exposures of its own."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "feedback.key").write_text(secrets.token_hex(32))
    cores = cores_apart(2).split("|")
    shared = {"poll_seconds": POLL, "feedback_key_file": str(folder / "feedback.key")}
    bundles = [random_bundle(f"variant-{seed}", base_of(tiny_model), seed) for seed in range(2)]
    first = serve(tiny_model, folder, bundles, *FLAGS, settings=shared,
                  environment={"VLLM_CPU_OMP_THREADS_BIND": cores[0]})  # fmt: skip
    settings = {
        **shared, "trust_file": str(folder / "trust.json"), "signing_key_file": str(folder / "server.key"),
        "cache_folder": str(folder / "node-2"), "exposure_folder": str(folder / "exposures-2"),
    }  # fmt: skip
    second = Server.with_edits(
        tiny_model, folder / "store", folder / "second.log", *FLAGS, settings=settings,
        environment={"VLLM_CPU_OMP_THREADS_BIND": cores[-1]},
    )  # fmt: skip
    both = [first, replace(first, server=second.start(), exposures=folder / "exposures-2")]
    yield both
    for serving in both:
        serving.server.stop()


def do(serving: Serving, operation: Any, **fields: Any) -> None:
    Experiments(serving.store).change(ExperimentChange(experiment="tone", operation=operation, **fields))


def ask(serving: Serving, unit: str) -> dict[str, Any]:
    return complete(serving.url, "variant-0", "One two three", 6, ignore_eos=True, user=unit)


def arms(serving: Serving) -> dict[str, str]:
    """Which arm and version each unit gets there."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda unit: ask(serving, unit), UNITS))
    told = [
        f"{answer['headers'].get('x-edits-experiment')} {answer['headers']['x-edits-version']}" for answer in answers
    ]
    return dict(zip(UNITS, told, strict=True))


def seconds_until(serving: Serving, stands: Callable[[dict[str, Any]], bool]) -> float:
    """How long until a server says so of the experiment."""
    began = time.monotonic()
    while True:
        found = httpx.get(f"{serving.url}/v1/edits/experiments", timeout=10).json()
        if found and stands(found[0]):
            return time.monotonic() - began
        assert time.monotonic() - began < 30, found
        time.sleep(0.05)


@needs_prometheus
def test_servers_agree_and_a_restart_moves_nobody(fleet: list[Serving], tmp_path: Path) -> None:
    """Started, widened, withdrawn: both follow within a poll interval and a look; Prometheus adds them up. A server
    that is killed (-9) in the middle of it gives every unit its arm again; feedback on its answers goes to the other
    one meanwhile; one report."""
    first, second = fleet
    version = first.store.resolve("variant-1")
    named = (("control", "base", 0.5), ("milder", f"variant-1@{version}", 0.5))
    made = [{"name": name, "serves": serves, "weight": weight} for name, serves, weight in named]
    document = {"name": "tone", "model": "variant-0", "arms": made, "coverage": 0.5, "feedback": [{"name": "thumbs"}]}
    Experiments(first.store).create(Experiment.parse(document))
    do(first, "start")
    late = [seconds_until(serving, lambda found: found["status"] == "running") for serving in fleet]
    assert max(late) < POLL + 1.5
    before = arms(first)
    assert arms(second) == before
    sent = Counter((arm.split()[0].removeprefix("tone/"),) for arm in before.values() if "tone/" in arm)
    requests = 'sum by (arm) (vllm_edits_arm_requests_total{experiment="tone"})'
    with prometheus([serving.url for serving in fleet], tmp_path / "prometheus") as reads:
        assert reads.by(requests, "arm") == {arm: 2 * units for arm, units in sent.items()}
    assert len(set(before.values())) == 3, "control, milder, and those that take no part"

    unit, told = next((unit, arm) for unit, arm in before.items() if "milder" in arm)
    liked = ask(first, unit)
    assert first.server.process is not None
    os.killpg(first.server.process.pid, signal.SIGKILL)
    first.server.process.wait()
    thumbs = {"request_id": liked["id"], "metric": "thumbs", "value": 1}
    said = httpx.post(f"{second.url}/v1/edits/feedback", json=thumbs, timeout=10)
    assert (said.status_code, said.json()["counted"]) == (200, True), said.text
    assert arms(second) == before
    first.server.start()
    assert arms(first) == before
    assert ask(first, unit)["headers"]["x-edits-experiment"] == told.split()[0]

    do(first, "widen", coverage=1.0)
    for serving in fleet:
        assert seconds_until(serving, lambda found: found["coverage"] == 1.0) < POLL + 1.5
        wider = arms(serving)
        assert all(wider[unit] == arm for unit, arm in before.items() if "tone/" in arm), "nobody moves"
        assert all("tone/" in arm for arm in wider.values())
    do(second, "withdraw", arm="milder")
    for serving in fleet:
        assert seconds_until(serving, lambda found: found["arms"][1]["by_control"] == "withdrawn") < POLL + 1.5
        assert {arm.split()[1] for arm in arms(serving).values()} == {"base"}

    words = ["report", "tone", str(first.exposures), str(second.exposures), "--store", first.store.url, "--json"]
    result = CliRunner().invoke(app, ["experiment", *words])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert sum(report["units"].values()) == len(UNITS)
    assert report["caveats"]["units_in_two_arms"] == 0
    thumbs_of = {line["arm"]: line["requests"] for line in report["lines"] if line["metric"] == "thumbs"}
    assert thumbs_of == {"control": 0, "milder": 1}
