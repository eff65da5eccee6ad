"""A real server that starts on an empty store is given one version after the other that it has no capacity for."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from loadtests.harness.client import complete
from tests.proofs.parity import cores_apart, every_edit
from tests.support.bundles import bundle_of, publish, random_bundle
from tests.support.engine import SLOW_ON_TWO, Serving, kind_bundle, serve, wait_until
from tests.support.gpu_ways import IN_PIECES
from tests.support.log_probs import NOISE_FLOOR, VISIBLE, apart, ask, reference, served
from vllm_edits.edit_store import Bundle
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.host import edited

pytestmark = pytest.mark.vllm

FLAGS = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16")
PROMPTS = ("The capital of France is", "Once upon a time there was a little")
GROW_SECONDS = 600.0
WAYS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "one process": ((), {}),
    "V2, in pieces, as on a GPU": ((), dict(IN_PIECES)),
    "two engines behind two processes": (
        ("--data-parallel-size", "2", "--api-server-count", "2"), {"VLLM_CPU_OMP_THREADS_BIND": cores_apart(2)},
    ),
    "two workers": (("--tensor-parallel-size", "2"), {"VLLM_CPU_OMP_THREADS_BIND": cores_apart(2)}),
    "nothing compiled": (("--enforce-eager",), {}),
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        "one process",
        pytest.param("nothing compiled", marks=pytest.mark.slow),
        pytest.param("V2, in pieces, as on a GPU", marks=pytest.mark.slow),
        pytest.param("two workers", marks=[pytest.mark.slow, *SLOW_ON_TWO]),
        pytest.param("two engines behind two processes", marks=[pytest.mark.slow, *SLOW_ON_TWO]),
    ],
)
def empty(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """A server on an empty store."""
    flags, environment = WAYS[request.param]
    folder = tmp_path_factory.mktemp("empty")
    token = folder / "admin-token"
    token.write_text("let-me-in\n")
    serving = serve(
        tiny_model, folder, [], *FLAGS, *flags, environment=environment,
        settings={"slots": 8, "admin_token_file": str(token)},
    )  # fmt: skip
    yield serving
    serving.server.stop()


@dataclass
class Load:
    """Clients that ask the same again and again, and want the same answer each time."""

    serving: Serving
    answers: dict[str, list[Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    longest_gap: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)

    def one(self, model: str) -> None:
        while not self._ended.is_set():
            try:
                found = ask(self.serving, model, PROMPTS[0], ignore_eos=True)
            except Exception as error:  # noqa: BLE001  told by the test
                self.failures.append(repr(error))
                return
            self.answers.setdefault(model, []).append((found["token_ids"], found["logprobs"]["token_logprobs"]))

    def streamed(self) -> None:
        """Answers as they come; the longest time between two pieces is a pause of the engine."""
        while not self._ended.is_set():
            body = {"model": "base", "prompt": PROMPTS[1], "max_tokens": 64, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{self.serving.url}/v1/completions", json=body, timeout=120) as answer:
                last = None
                for _ in answer.iter_lines():
                    now = time.monotonic()
                    self.longest_gap = max(self.longest_gap, now - (last or now))
                    last = now

    @contextmanager
    def running(self, *models: str) -> Iterator[None]:
        with ThreadPoolExecutor(len(models) + 1) as pool:
            futures = [pool.submit(self.one, model) for model in models] + [pool.submit(self.streamed)]
            try:
                yield
            finally:
                self._ended.set()
            for future in futures:
                future.result()


def grow_for(serving: Serving, *bundles: Bundle) -> dict[str, Any]:
    """Promote versions, wait until they are served; returns the last growth."""
    for bundle in bundles:
        publish(serving.store, bundle)
    serving.sync()

    def is_there() -> bool:
        refused = {row["name"]: row["error"] for row in serving.status()["refused"]}
        lasting = [
            refused[each.manifest.name] for each in bundles if "is refused" in refused.get(each.manifest.name, "")
        ]
        assert not lasting, lasting
        return {(row["name"], row["version"]) for row in serving.status()["variants"]} >= {
            (each.manifest.name, each.version) for each in bundles
        }

    wait_until(is_there, "the versions are served", GROW_SECONDS)
    last: dict[str, Any] = serving.status()["reservation"]["last"]
    assert last["error"] == ""
    return last


def exact(serving: Serving, *bundles: Bundle) -> None:
    """Every version answers as transformers edited by its formulas, and not as the base model."""
    torch.set_num_threads(1)
    truth_of = AutoModelForCausalLM.from_pretrained(serving.model, dtype=torch.float64).eval()
    rounded = AutoModelForCausalLM.from_pretrained(serving.model, dtype=torch.float32).eval()
    for bundle in bundles:
        name, pairs = bundle.manifest.name, pairs_of(bundle)
        choice = ask(serving, name, PROMPTS[0])
        assert choice["version"] == bundle.version
        with edited(truth_of, pairs), edited(rounded, pairs):
            truth, noisy = reference(truth_of, choice), reference(rounded, choice)
        error, noise = apart(served(choice), truth), apart(noisy, truth)
        assert error <= 2 * noise + NOISE_FLOOR["float32"], name
        assert apart(served(choice), reference(truth_of, choice)) > max(VISIBLE, 2 * error), f"{name} does nothing"


def test_versions_that_do_not_fit_are_served_without_a_restart(empty: Serving) -> None:
    """Under load: nothing fails, answers of what serves stay what they were, the new answers are the formula's."""
    base = empty.base
    first, every = kind_bundle("offset", base, 1.0), random_bundle("every", base, seed=3, strength=0.3)
    load = Load(empty)
    before = [complete(empty.url, "base", prompt, 12, logprobs=1, ignore_eos=True)["choices"] for prompt in PROMPTS]
    held = empty.status()["reservation"]["bytes"]
    one = grow_for(empty, first)
    assert empty.status()["reservation"]["bytes"] > held
    exact(empty, first)
    hits = empty.metric("vllm:prefix_cache_hits_total")
    with load.running("base", first.manifest.name):
        other = grow_for(empty, every)
    print(json.dumps({"first": one, "second": other, "longest gap": load.longest_gap}))  # noqa: T201
    assert load.failures == []
    for model, answers in load.answers.items():
        assert len(answers) > 1, model
        assert {tuple(ids) for ids, _ in answers} == {tuple(answers[0][0])}, model
        for _, log_probs in answers:
            assert log_probs == pytest.approx(answers[0][1], abs=2e-4), model
    exact(empty, first, every)
    after = [complete(empty.url, "base", prompt, 12, logprobs=1, ignore_eos=True)["choices"] for prompt in PROMPTS]
    assert [[choice["text"] for choice in each] for each in after] == [[c["text"] for c in each] for each in before]
    assert empty.metric("vllm:prefix_cache_hits_total") >= hits
    assert empty.metric("vllm_edits_growths_total", result="ok") >= 2
    assert empty.metric("vllm_edits_growths_total", result="error") == 0


def test_an_operator_grows_ahead_of_a_promotion(empty: Serving) -> None:
    body = {"reserve": [{"kind": "scale", "site": "layers.*.attn.z"}]}
    url = f"{empty.url}/v1/edits/reservation"
    assert httpx.post(url, json=body, timeout=60).status_code == httpx.codes.UNAUTHORIZED
    answer = httpx.post(url, json=body, headers={"x-edits-admin-token": "let-me-in"}, timeout=60)
    assert answer.status_code == httpx.codes.ACCEPTED
    wait_until(lambda: not httpx.get(url, timeout=60).json()["growing"], "it has grown", GROW_SECONDS)
    growths = empty.metric("vllm_edits_growths_total", result="ok")
    scale = kind_bundle("scale", empty.base, 0.5)
    grow_for(empty, scale)
    assert empty.metric("vllm_edits_growths_total", result="ok") == growths, "it fits: no further growth"
    exact(empty, scale)


@pytest.mark.slow
def test_every_kind_at_every_site_is_served_without_a_restart(empty: Serving) -> None:
    """All forms of a kind at once, and one kind after the other."""
    by_kind: dict[str, list[Bundle]] = {}
    for number, (_, pair) in enumerate(every_edit(empty.base)):
        kind = pair[0].kind
        by_kind.setdefault(kind, []).append(bundle_of(f"{kind.replace('_', '-')}-{number}", empty.base, [pair]))
    for kind, bundles in by_kind.items():
        grow_for(empty, *bundles)
        print(kind, len(bundles), empty.status()["reservation"]["last"])  # noqa: T201
        exact(empty, *bundles)
    assert sum(map(len, by_kind.values())) > 100
