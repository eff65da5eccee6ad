"""A real server proves versions by their probes before the first request: what is not as it was recorded is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.proofs.parity import ENVIRONMENT
from tests.support.bundles import Pairs, bundle_of, publish
from tests.support.engine import USUAL_OR_AS_ON_A_GPU, Serving, serve
from vllm_edits.edit_store import BaseModelRef, Bundle, EditStore, LowRank, Offset, Strength, identify
from vllm_edits.edit_store.authoring.host import Host
from vllm_edits.edit_store.authoring.probing import probes_of

pytestmark = pytest.mark.vllm

TEXTS = ["The capital of France is", "Once upon a time there was a little", "Good morning, said the"]
FLAGS = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16")
RESERVE = [
    {"kind": "offset", "site": "layers.*.resid", "features": ["scaled"]},
    {"kind": "low_rank", "site": "layers.*.mlp.out", "rank": 1},
]


def pairs(base: BaseModelRef, layer: int, seed: int) -> Pairs:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (0.4 * random.normal(size=shape)).astype(np.float32)

    low_rank = LowRank(site=f"layers.{layer}.mlp.out", reads=f"layers.{layer}.mlp.h", rank=1)
    return [
        (Offset(site=f"layers.{layer}.resid"), {"vector": normal(base.widths.hidden)}),
        (low_rank, {"read": normal(1, base.widths.mlp), "write": normal(1, base.widths.hidden)}),
    ]


def scaled(edits: Pairs, factor: float) -> Pairs:
    """The same edits with so much of what they write."""
    return [(edit, {name: array * (factor if name in ("vector", "write") else 1) for name, array in numbers.items()})
            for edit, numbers in edits]  # fmt: skip


def proven(host: Host, name: str, base: BaseModelRef, edits: Pairs, strength: Strength | None = None) -> Bundle:
    bundle = bundle_of(name, base, edits).with_probes(probes_of(host, edits, TEXTS, strength=strength))
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"strength": strength}))


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


@pytest.fixture(scope="module", params=USUAL_OR_AS_ON_A_GPU)
def serving(
    request: pytest.FixtureRequest, tiny_model: Path, host: Host, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("probes")
    (folder / "admin-token").write_text("let-me-in\n")
    base = identify(tiny_model)
    loud = proven(host, "loud", base, pairs(base, 1, 1))
    settings = {"slots": 4, "reserve": json.dumps(RESERVE), "grow": "never"}
    settings["admin_token_file"] = str(folder / "admin-token")
    found = serve(tiny_model, folder, [loud], *FLAGS, environment=request.param, settings=settings)
    yield found
    found.server.stop()


def of(serving: Serving, name: str) -> dict[str, Any]:
    (row,) = [row for row in serving.status()["variants"] if row["name"] == name]
    return dict(row)


def test_a_version_that_is_served_as_recorded_passes(serving: Serving) -> None:
    row = of(serving, "loud")
    assert row["probes"]["result"] == "passed"
    assert row["probes"]["share"] == pytest.approx(1, abs=0.01)
    assert row["probes"]["noise"] < 2e-3
    assert max(probe["effect"] for probe in row["probes"]["probes"]) > 0.1
    assert serving.metric("vllm_edits_probes_total", result="passed") >= 1
    assert serving.metric("vllm_edits_probe_share", variant="loud") == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("fault", ["negated", "halved", "in another layer", "inert"])
def test_a_version_that_is_not_what_was_recorded_is_refused_beside_streams(
    serving: Serving, host: Host, fault: str
) -> None:
    """The version before it keeps serving, and running streams are not touched."""
    served, right = of(serving, "loud"), pairs(serving.base, 2, 7)
    wrong = {
        "negated": scaled(right, -1), "halved": scaled(right, 0.5), "in another layer": pairs(serving.base, 3, 7),
        "inert": scaled(right, 0),
    }[fault]  # fmt: skip
    made = bundle_of("loud", serving.base, wrong)
    bundle = made.with_probes(probes_of(host, right, TEXTS))
    with streaming(serving) as texts:
        publish(serving.store, bundle)
        (swap,) = serving.sync()["swaps"]
    assert swap["failed_in"] == "install"
    assert "of the change that its author recorded is there" in swap["error"]
    row = of(serving, "loud")
    assert (row["version"], row["probes"]) == (served["version"], served["probes"])
    assert len(texts) > 1
    assert len(set(texts)) == 1
    assert "probes failed variant=loud" in serving.server.log_text()
    assert serving.metric("vllm_edits_bundles_rejected_total", reason="probes") >= 1
    answer = httpx.post(
        f"{serving.url}/v1/completions", json={"model": "loud", "prompt": TEXTS[0], "max_tokens": 2}, timeout=60
    )
    assert answer.headers["x-edits-version"] == served["version"]


class streaming:  # noqa: N801  reads as a function
    """A client that asks the base model the same, again and again; gives the answers."""

    def __init__(self, serving: Serving) -> None:
        self._url = serving.url
        self._texts: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._ended.is_set() or len(self._texts) < 2:
            body = {"model": "base", "prompt": TEXTS[1], "max_tokens": 24, "logprobs": 3, "temperature": 0}
            answer = httpx.post(f"{self._url}/v1/completions", json={**body, "ignore_eos": True}, timeout=120)
            choice = answer.json()["choices"][0]
            self._texts.append(json.dumps([choice["text"], [len(row) for row in choice["logprobs"]["top_logprobs"]]]))

    def __enter__(self) -> list[str]:
        self._thread.start()
        return self._texts

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def test_the_right_version_is_served_with_its_strengths(serving: Serving, host: Host) -> None:
    """Positive control for the faults; and probes at the ends of its strengths."""
    bounds = Strength(minimum=-1, maximum=2)
    right = [pairs(serving.base, 2, 7)[0]]
    bundle = proven(host, "mild", serving.base, right, bounds)
    publish(serving.store, bundle)
    (swap,) = [swap for swap in serving.sync()["swaps"] if swap["variant"] == "mild"]
    assert not swap["error"], swap["error"]
    assert {probe["strength"] for probe in of(serving, "mild")["probes"]["probes"]} == {-1.0, 1.0, 2.0}


def test_a_command_probes_a_variant(serving: Serving, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("let-me-in\n")
    words = ["probe", "loud", "--url", serving.url]
    command = [str(Path(sys.executable).with_name("vllm-edits")), *words]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "admin token" in refused.stderr
    done = subprocess.run([*command, "--admin-token-file", str(token)], capture_output=True, text=True, check=True)
    assert f"loud@{of(serving, 'loud')['version'][:12]}: passed" in done.stdout
    assert "of the recorded change is there" in done.stdout


def test_edits_that_do_nothing_on_the_server_are_found(tiny_model: Path, host: Host, tmp_path: Path) -> None:
    store, base = EditStore(str(tmp_path / "store"), create=True), identify(tiny_model)
    edits = pairs(base, 1, 1)[:1]
    version = store.publish(proven(host, "loud", base, edits))
    environment = {**ENVIRONMENT, "VLLM_PLUGINS": "edits"}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline_probes.py")), str(tiny_model), store.url, version],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert "the story holds" in ran.stdout, ran.stdout[-2000:] + ran.stderr[-4000:]
