"""A real request, swap and growth go the ways that plugin/README.md describes, through no other module."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from loadtests.harness.metrics import Scrape
from tests.proofs.parity import random_numbers
from tests.support.bundles import base_of, bundle_of, publish, random_bundle
from tests.support.engine import Serving, serve, wait_until
from vllm_edits.edit_store import Bundle, LowRank
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.host import Host
from vllm_edits.edit_store.authoring.probing import probes_of
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange

pytestmark = pytest.mark.vllm

README = Path(__file__).parents[2] / "plugin" / "README.md"
WALK = Path(__file__).parents[1] / "support" / "walk"
MOST_MODULES, MOST_FORMS = 14, 6
GROW_SECONDS = 600.0
EVERY_SECOND = {"periodic.py", "experiments/guardrails.py"}
"""What runs beside, whatever is asked: guardrails are measured."""


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of plugin/README.md, as cells."""
    section = README.read_text().partition(f"\n### {heading}\n")[2]
    lines = re.search(r"((?:^\|.*\n)+)", section, re.MULTILINE)
    assert lines is not None, heading
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines[1].splitlines()[2:]]


def modules(cell: str) -> list[str]:
    """Modules that a cell names, or folders of which it says that any module may run."""
    return re.findall(r"`([\w/]+(?:\.py|/))`", cell)


class Traced:
    """A server whose processes say which modules of the plugin they ran."""

    def __init__(self, serving: Serving, folder: Path, second: Bundle) -> None:
        """second: a second version, with probes"""
        self.serving = serving
        self.second = second
        self._folder = folder

    def while_(self, act: Callable[[], Any]) -> dict[str, list[str]]:
        """The modules that ran while something was done, of the API process and of the engine's."""
        assert self.serving.server.process is not None
        server = psutil.Process(self.serving.server.process.pid)
        processes = {"API": [server.pid], "engine": [each.pid for each in server.children(recursive=True)]}
        every = [number for numbers in processes.values() for number in numbers]
        for path in self._folder.glob("*.json"):
            path.unlink()
        self._tell(every, 1)
        self._step()  # a process hears a signal when it next has something to do
        act()
        self._tell(every, 2)
        self._step()
        wait_until(lambda: all((self._folder / f"{each}.json").exists() for each in every), "the notes")
        return {
            name: list(
                dict.fromkeys(m for each in numbers for m in json.loads((self._folder / f"{each}.json").read_text()))
            )
            for name, numbers in processes.items()
        }

    def _tell(self, processes: list[int], number: int) -> None:
        for each in processes:
            os.kill(each, signal.SIGRTMIN + number)

    def _step(self) -> None:
        httpx.get(f"{self.serving.url}/version", timeout=30).raise_for_status()


@pytest.fixture(scope="module")
def traced(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder, notes = tmp_path_factory.mktemp("walk"), tmp_path_factory.mktemp("notes")
    path = os.pathsep.join([str(WALK), *filter(None, [os.environ.get("PYTHONPATH")])])
    bundle = random_bundle("polite", base_of(tiny_model), seed=1)
    host = Host.load(tiny_model)
    second = random_bundle("polite", base_of(tiny_model), seed=2)
    second = second.with_probes(probes_of(host, pairs_of(second), ["Hello"], count=2))
    serving = serve(
        tiny_model, folder, [bundle], "--dtype", "float32", "--max-model-len", "256",
        environment={"PYTHONPATH": path, "WALK_FOLDER": str(notes)},
    )  # fmt: skip
    arms = [{"name": name, "serves": f"polite@{bundle.version}", "weight": 0.5} for name in ("control", "same")]
    document, log = Experiment.parse({"name": "walk", "model": "polite", "arms": arms}), Experiments(serving.store)
    log.change(ExperimentChange(experiment="walk", operation="create", document=document))
    log.change(ExperimentChange(experiment="walk", operation="start"))
    serving.sync()
    try:
        yield Traced(serving, notes, second)
    finally:
        serving.server.stop()


def named_by(heading: str) -> dict[str, set[str]]:
    """The modules that a table names, by process."""
    named: dict[str, set[str]] = {"API": set(), "engine": set()}
    for _, main, helpers, process, *_ in table(heading):
        if "weights" not in process:  # this swap is of a variant in a slot
            named["API" if process == "API" else "engine"] |= {*modules(main), *modules(helpers)}
    return named


def holds(heading: str, ran: dict[str, list[str]], *, ends_in: str = "") -> None:
    """What ran is what the table names, each in the process that the table says.

    ends_in: the heading of the walk that its last row names
    """
    named, further = named_by(heading), named_by(ends_in) if ends_in else {}
    for process, found in ran.items():
        known = named[process] | further.get(process, set())
        ran_here = {next((each for each in known if each.endswith("/") and module.startswith(each)), module)
                    for module in found}  # fmt: skip
        unnamed, unseen = ran_here - known - EVERY_SECOND, named[process] - ran_here
        assert not unnamed, f"{heading}, {process}: these ran, and the table does not name them: {sorted(unnamed)}"
        assert not unseen, f"{heading}, {process}: the table names these, and they did not run: {sorted(unseen)}"


def ask(serving: Serving, **options: Any) -> httpx.Response:
    body = {"model": "polite", "prompt": "Hello", "max_tokens": 4, **options}
    answer = httpx.post(f"{serving.url}/v1/completions", json=body, headers={"x-edits-unit": "ann"}, timeout=60)
    answer.raise_for_status()
    return answer


def test_a_request_goes_the_way_that_is_written_down(traced: Traced) -> None:
    """It takes part in an experiment, so that nothing of the way is left out."""
    serving = traced.serving
    ask(serving)  # the first may compile something
    answer = ask(serving)
    assert answer.headers["x-edits-version"] == serving.bundles["polite"].version
    assert answer.headers["x-edits-experiment"].startswith("walk/")
    before = exposures(serving)

    def ask_and_wait() -> None:
        ask(serving)
        wait_until(lambda: exposures(serving) > before, "the exposure, which is recorded after the answer")

    holds("A request", traced.while_(ask_and_wait))


def test_a_swap_goes_the_way_that_is_written_down(traced: Traced) -> None:
    serving = traced.serving
    second = traced.second
    publish(serving.store, second)
    ran = traced.while_(lambda: (serving.sync(), wait_until(lambda: drained(serving), "the old slot")))
    swap = serving.status()["last_swap"]
    assert (swap["to_version"], swap["error"]) == (second.version, "")
    phases = {phase for row in table("A swap") for phase in re.findall(r"\*(\w+)\*", row[0])}
    assert {*swap["seconds"], "drain", "wait"} == phases, "the phases of the table are those of a swap"
    holds("A swap", ran)


@pytest.mark.slow
def test_a_growth_goes_the_way_that_is_written_down(traced: Traced) -> None:
    """The child that compiles is not followed: it runs beside, and calls what its worker calls."""
    serving = traced.serving
    late = LowRank(site="layers.0.attn.out", reads="layers.0.attn.z", rank=4)
    publish(serving.store, bundle_of("late", serving.base, [(late, random_numbers(late, serving.base, seed=3))]))

    def grow() -> None:
        serving.sync()
        wait_until(lambda: "swap committed variant=late" in serving.server.log_text(), "the growth", GROW_SECONDS)

    ran = traced.while_(grow)
    last = serving.status()["reservation"]["last"]
    assert (last["phase"], last["error"]) == ("done", "")
    phases = {phase for row in table("A growth") for phase in re.findall(r"\*(\w+)\*", row[0])}
    assert {*last["seconds"]} == phases, "the phases of the table are those of a growth"
    holds("A growth", ran, ends_in="A swap")


def exposures(serving: Serving) -> float:
    return Scrape.of(serving.url).sum("vllm_edits_exposures_total")


def drained(serving: Serving) -> bool:
    return "drained version=" in serving.server.log_text()  # asking the server would be a walk of its own


def test_the_way_of_a_request_is_as_short_as_it_was_meant_to_be() -> None:
    rows = table("A request")
    assert len(dict.fromkeys(module for row in rows for module in modules(row[1]))) <= MOST_MODULES
    forms = [form for row in rows for form in re.findall(r"\*\*(\w+)\*\*", row[-1])]
    assert len(forms) == len(set(forms)) <= MOST_FORMS
