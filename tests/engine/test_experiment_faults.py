"""What ends an arm, on a real server on a bucket: NaN among its logits, gates that fire more than their author
measured, answers that begin too late. And a ramp whose bucket goes away in the middle."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from loadtests.harness.client import complete
from loadtests.harness.metrics import Scrape
from loadtests.harness.object_servers import BUCKET, moto
from loadtests.harness.server import Server
from tests.engine.network import Line
from tests.support.bundles import Pairs, base_of, bundle_of, publish, random_pairs, whose_gates_fire
from tests.support.engine import wait_until
from vllm_edits.edit_store import BaseModelRef, Bundle, EditStore, Gate
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange, Standing

pytestmark = pytest.mark.vllm

POLL_SECONDS = 1.0
FLAGS = ("--dtype", "float32", "--max-model-len", "2048", "--max-num-batched-tokens", "64", "--max-num-seqs", "16")
UNITS = [f"user-{number}" for number in range(24)]
OVERFLOWS = 1e30
"""Times itself it is more than a float32 holds; of infinity the norm behind it makes NaN."""


@dataclass
class Guarded:
    """A running server, its bucket, and the line between them."""

    server: Server
    store: EditStore
    base: BaseModelRef
    line: Line

    def begin(self, *serves: str, **fields: Any) -> None:
        """Start anew: the first arm is the control."""
        arms = [
            {"name": name, "serves": each, "weight": 0.4 if name == "control" else 0.3}
            for name, each in zip(("control", "sound", "unsound"), serves, strict=True)
        ]
        log = Experiments(self.store)
        log.create(Experiment.parse({"name": "tone", "model": "polite", "arms": arms, **fields}))
        log.change(ExperimentChange(experiment="tone", operation="start"))
        phase = self.standing().phase
        wait_until(lambda: self.serves_every_arm(phase), "the start")

    def serves_every_arm(self, phase: int) -> bool:
        """Whether the server follows the phase and has made ready what its arms name."""
        return any(
            found["phase"] == phase and not any(arm["by_control"] for arm in found["arms"]) for found in self.status()
        )

    def version(self, name: str, numbers: Pairs, gate_firings: float = 0.0) -> str:
        """Publish one that no tag promotes; how an arm names it."""
        return f"{name}@{self.store.publish(whose_gates_fire(bundle_of(name, self.base, numbers), gate_firings))}"

    def moved(self, name: str, seed: int) -> str:
        """The same with random offsets."""
        return self.version(name, random_pairs("offset", 1, self.base.widths, seed, strength=1.0))

    def standing(self) -> Standing:
        return Experiments(self.store).standings()[0]["tone"]

    def status(self) -> list[dict[str, Any]]:
        return list(httpx.get(f"{self.server.url}/v1/edits/experiments", timeout=10).json())

    def ask(self, unit: str, prompt: str | list[int] = "One two three", model: str = "polite") -> dict[str, Any]:
        return complete(self.server.url, model, prompt, 8, ignore_eos=True, user=unit)

    def ask_all(self, units: Sequence[str] = UNITS) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.ask, units))


def arm_of(answer: Mapping[str, Any]) -> str:
    return str(answer["headers"].get("x-edits-experiment", "")).removeprefix("tone/")


def text(answer: Mapping[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def gate_that_fires(base: BaseModelRef, *, fires: bool) -> Pairs:
    """For every token, or for none."""
    edit = Gate(site="layers.1.mlp.out", reads="layers.1.mlp.in", rank=1)
    numbers = {name: np.zeros(shape) for name, shape in edit.shapes(base.widths).items()}
    return [(edit, {**numbers, "bias": np.array([1.0 if fires else -1.0]), "write": numbers["write"] + 0.01})]


def everything(base: BaseModelRef) -> Bundle:
    """Edits at every place where those of any arm here are."""
    low_rank, offset = random_pairs("low_rank", 0, base.widths, 1), random_pairs("offset", 1, base.widths, 1, 1.0)
    return bundle_of("polite", base, [*low_rank, *offset, *gate_that_fires(base, fires=False)])


@pytest.fixture(scope="module")
def running(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """`polite` is promoted; the versions of arms are only published."""
    folder = tmp_path_factory.mktemp("guarded")
    with pytest.MonkeyPatch.context() as patch, moto(folder) as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        url, base, line = f"s3://{BUCKET}/guarded", base_of(tiny_model), Line(environment["AWS_ENDPOINT_URL"])
        store = EditStore(url, create=True)
        publish(store, everything(base))
        settings = {
            "poll_seconds": POLL_SECONDS,
            "cache_folder": folder / "node",
            "exposure_folder": folder / "exposures",
        }
        server = Server.with_edits(
            tiny_model, url, folder / "server.log", *FLAGS, settings=settings,
            environment={"AWS_ENDPOINT_URL": line.url, "VLLM_COMPUTE_NANS_IN_LOGITS": "1"},
        )  # fmt: skip
        with server:
            yield Guarded(server, store, base, line)


@pytest.fixture
def guarded(running: Guarded) -> Iterator[Guarded]:
    """Stopped afterwards."""
    yield running
    Experiments(running.store).change(ExperimentChange(experiment="tone", operation="stop"))
    wait_until(lambda: not any(found["status"] == "running" for found in running.status()), "the stop")


def test_an_arm_whose_logits_are_not_numbers_is_withdrawn_and_harms_nobody(guarded: Guarded) -> None:
    """In the same batches, and in the same blocks of the cache afterwards, all others are answered as ever."""
    sound = guarded.moved("sound", 2)
    unsound = guarded.version("unsound", random_pairs("low_rank", 0, guarded.base.widths, 3, strength=OVERFLOWS))
    solo = {name: text(guarded.ask("", model=name)) for name in ("base", "polite")}
    guarded.begin("polite", sound, unsound, guardrails=[
        {"metric": "corrupted", "maximum": 0, "interval": "3s", "minimum_requests": 3},
    ])  # fmt: skip
    solo |= {"control": solo["polite"], "sound": text(guarded.ask("", model=sound))}
    assert len({solo["base"], solo["control"], solo["sound"]}) == 3, "positive control: edits change what is said"

    def is_withdrawn() -> bool:
        for answer in guarded.ask_all():
            if arm_of(answer) != "unsound":
                assert text(answer) == solo[arm_of(answer)]
        assert text(guarded.ask("", model="base")) == solo["base"]
        return bool(guarded.standing().withdrawn)

    wait_until(is_withdrawn, "the withdrawal")
    assert guarded.standing().withdrawn == {"unsound"}
    assert "corrupted was 1 over" in guarded.standing().reason
    assert {arm_of(answer): text(answer) for answer in guarded.ask_all()} == {
        "control": solo["control"], "sound": solo["sound"], "unsound": solo["control"],
    }  # fmt: skip
    assert Scrape.of(guarded.server.url).sum("vllm_edits_requests_total", outcome="error") == 0


def test_gates_that_fire_more_than_their_author_measured_withdraw_an_arm(guarded: Guarded) -> None:
    """Two versions whose gates fire for every token. The author of one says so, that of the other says half of it."""
    fires = gate_that_fires(guarded.base, fires=True)
    honest, flattering = (guarded.version(name, fires, rate) for name, rate in (("honest", 1.0), ("flattering", 0.5)))
    guarded.begin("polite", honest, flattering, guardrails=[
        {"metric": "gate_firings", "maximum_authored_ratio": 1.5, "interval": "3s", "minimum_requests": 3},
    ])  # fmt: skip
    wait_until(lambda: bool(guarded.ask_all()) and bool(guarded.standing().withdrawn), "the withdrawal")
    assert guarded.standing().withdrawn == {"unsound"}
    assert "gate_firings was 1 over" in guarded.standing().reason
    assert "allowed: at most 1.5 times the author's measurement, 0.5" in guarded.standing().reason
    (sound,) = [state for state in guarded.status()[0]["guardrails"] if state["arm"] == "sound"]
    assert sound["last"]["mean"] == 1, "positive control: they are counted, and every token once"


def test_answers_that_begin_too_late_withdraw_an_arm(guarded: Guarded) -> None:
    """Whoever is in that arm sends long prompts, which take many steps to read; the edits of both arms are alike."""
    guarded.begin("polite", guarded.moved("early", 5), guarded.moved("late", 6), guardrails=[
        {"metric": "first_token_seconds", "maximum_ratio": 3, "interval": "4s", "minimum_requests": 3},
    ])  # fmt: skip
    arms = dict(zip(UNITS, map(arm_of, guarded.ask_all()), strict=True))
    draw = np.random.default_rng(0)

    def is_withdrawn() -> bool:
        for unit, arm in arms.items():  # one after the other, so that nobody waits for another's prompt
            guarded.ask(unit, draw.integers(10, 40_000, 1500 if arm == "unsound" else 5).tolist())
        return bool(guarded.standing().withdrawn)

    wait_until(is_withdrawn, "the withdrawal", 120)
    assert guarded.standing().withdrawn == {"unsound"}
    assert "first_token_seconds" in guarded.standing().reason


@pytest.mark.slow
def test_a_ramp_stands_still_while_its_bucket_is_away(guarded: Guarded) -> None:
    """A minute after the last look nobody is added any more, though by the store it is time; all are answered as they
    were. When the bucket is back the ramp goes on, and moves nobody."""
    guarded.begin("polite", guarded.moved("sound", 9), "base", coverage=0.4, ramp=[{"after": "75s", "coverage": 1}])
    began = time.monotonic()
    before = list(map(arm_of, guarded.ask_all()))
    assert "" in before
    with guarded.line.cut():
        while time.monotonic() - began < 85:
            assert list(map(arm_of, guarded.ask_all())) == before
            time.sleep(1)
        assert guarded.standing().coverage(datetime.now(UTC)) == 1
    wait_until(lambda: guarded.status()[0]["coverage"] == 1, "the ramp")
    after = list(map(arm_of, guarded.ask_all()))
    assert "" not in after
    assert [now for was, now in zip(before, after, strict=True) if was] == [was for was in before if was]
