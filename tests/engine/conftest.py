"""Real servers, one of a kind for the whole session: a start costs a minute or two."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.harness.metrics import Metrics
from loadtests.harness.record import gpu
from loadtests.harness.server import Server
from tests.conftest import KINDS, base_of, bundle_of, publish, random_bundle, random_pairs
from tests.gpu_ways import IN_PIECES, runner_of
from tests.parity import cores_apart
from vllm_edits.edit_store import BaseModelRef, Bundle, EditStore, Role, SigningKey, TrustedKey, TrustPolicy


def wait_until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Ask again and again; an assertion says what did not come true in time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)


SLOW_ON_TWO = [pytest.mark.slow, pytest.mark.devices(2)]
USUAL_OR_AS_ON_A_GPU = [
    pytest.param({}, id="usual"),
    *([] if gpu() else [pytest.param(IN_PIECES, id="as on a GPU", marks=pytest.mark.slow)]),
]
"""What is added to a server's environment."""


@dataclass
class Serving:
    """A running server with its store."""

    server: Server
    store: EditStore
    base: BaseModelRef
    model: Path
    bundles: dict[str, Bundle]
    signer: SigningKey
    exposures: Path
    engines: int = 1
    runner: str = "V1"
    """which of vLLM's model runners"""

    @property
    def url(self) -> str:
        return self.server.url

    def sync(self) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}/v1/edits/sync", timeout=60)
        answer.raise_for_status()
        return dict(answer.json())

    def status(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/v1/edits", timeout=10).json())

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's series that carry these labels."""
        return Metrics.of(self.url).sum(name, **labels)


def kind_bundle(kind: str, base: BaseModelRef, strength: float) -> Bundle:
    """A bundle of one kind at an early, a middle and a late layer."""
    name = kind.replace("_", "-")
    layers = (1, base.widths.layers // 2, base.widths.layers - 1)
    pairs = [pair for layer in layers for pair in random_pairs(kind, layer, base.widths, seed=layer, strength=strength)]
    return bundle_of(name, base, pairs)


def variants_of_every_kind(base: BaseModelRef, strength: float) -> dict[str, Bundle]:
    """One variant for each kind, and one with all kinds."""
    # What an offset is added to is larger than what the others multiply: rounding would hide a weak one.
    strengths = {kind: strength * (5 if kind == "offset" else 1) for kind in KINDS}
    made = {kind.replace("_", "-"): kind_bundle(kind, base, each) for kind, each in strengths.items()}
    return {**made, "all-kinds": random_bundle("all-kinds", base, seed=5, strength=strength)}


def serve(
    model: Path, folder: Path, bundles: list[Bundle], *flags: str, settings: dict[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Serving:  # fmt: skip
    """A server that asks for signatures, and a store that gives them."""
    signer = SigningKey.generate()
    roles = (Role.AUTHOR, Role.PROMOTER)
    TrustPolicy(keys=(TrustedKey(name="tests", public=signer.public_pem(), roles=roles),)).save(folder / "trust.json")
    signer.save(folder / "server.key")
    store = EditStore(str(folder / "store"), create=True, signer=signer)
    for bundle in bundles:
        publish(store, bundle)
    ours = {
        "poll_seconds": 3600, "trust_file": str(folder / "trust.json"), "signing_key_file": str(folder / "server.key"),
        "cache_folder": str(folder / "node"), "exposure_folder": str(folder / "exposures"), **(settings or {}),
    }  # fmt: skip
    log = folder / "server.log"
    server = Server.with_edits(model, folder / "store", log, *flags, settings=ours, environment=environment)
    named = {each.manifest.name: each for each in bundles}
    runner = runner_of(environment or {})
    return Serving(server.start(), store, base_of(model), model, named, signer, folder / "exposures", runner=runner)


def ways() -> list[Any]:
    """What `exact_server` is started with: each dtype, also as on a GPU, and there with every kind of CUDA graphs."""
    if not gpu():
        slow = ("bfloat16", "float32 as on a GPU", "bfloat16 as on a GPU")
        return ["float32", *(pytest.param(way, marks=pytest.mark.slow) for way in slow)]
    return ["float32", "bfloat16 FULL_AND_PIECEWISE", "bfloat16 PIECEWISE", "bfloat16 NONE"]


@pytest.fixture(scope="session", params=ways())
def exact_server(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Serving]]:
    """SmolLM2 with a variant of every kind, compiled, in either dtype."""
    dtype, _, how = request.param.partition(" ")
    bundles = list(variants_of_every_kind(base_of(smollm2), strength=0.1).values())
    flags = ["--dtype", dtype, "--max-model-len", "1024"]
    environment: Mapping[str, str] = {}
    if how == "as on a GPU":
        environment = IN_PIECES
    elif how:
        flags += ["--compilation-config", json.dumps({"cudagraph_mode": how})]
    serving = serve(smollm2, tmp_path_factory.mktemp(f"exact-{dtype}"), bundles, *flags, environment=environment)
    yield dtype, serving
    serving.server.stop()


@pytest.fixture(
    scope="session",
    params=[
        "one process",
        pytest.param("one process, as on a GPU", marks=pytest.mark.slow),
        pytest.param("two engines behind two processes", marks=SLOW_ON_TWO),
    ],
)
def small_server(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """A tiny model in float32 with two slots, little KV cache and small steps: everything is scarce."""
    base = base_of(tiny_model)
    bundles = [random_bundle(f"variant-{seed}", base, seed) for seed in range(6)]
    token_file = tmp_path_factory.mktemp("secrets") / "admin-token"
    token_file.write_text("let-me-in\n")
    flags = ("--dtype", "float32", "--max-model-len", "640", "--max-num-batched-tokens", "96", "--block-size", "32",
             "--num-gpu-blocks-override", "48", "--max-num-seqs", "16",
             "--enable-auto-tool-choice", "--tool-call-parser", "hermes")  # fmt: skip
    two, environment = request.param.startswith("two"), dict[str, str]()
    if request.param.endswith("as on a GPU"):
        environment = dict(IN_PIECES)
    if two:
        flags += ("--data-parallel-size", "2", "--api-server-count", "2")
        environment = {"VLLM_CPU_OMP_THREADS_BIND": cores_apart(2)}
    folder = tmp_path_factory.mktemp("small")
    settings = {"slots": 2, "admin_token_file": token_file}
    serving = serve(tiny_model, folder, bundles, *flags, settings=settings, environment=environment)
    serving.engines = 2 if two else 1
    yield serving
    serving.server.stop()
