"""Real servers, one of a kind for the whole session: a start costs a minute or two."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from loadtests.harness.record import gpu
from tests.proofs.parity import cores_apart
from tests.support.bundles import KINDS, base_of, random_bundle
from tests.support.engine import SLOW_ON_TWO, Serving, kind_bundle, serve
from tests.support.gpu_ways import IN_PIECES
from vllm_edits.edit_store import BaseModelRef, Bundle


def variants_of_every_kind(base: BaseModelRef, strength: float) -> dict[str, Bundle]:
    """One variant for each kind, and one with all kinds."""
    # What an offset is added to is larger than what the others multiply: rounding would hide a weak one.
    strengths = {kind: strength * (5 if kind == "offset" else 1) for kind in KINDS}
    made = {kind.replace("_", "-"): kind_bundle(kind, base, each) for kind, each in strengths.items()}
    return {**made, "all-kinds": random_bundle("all-kinds", base, seed=5, strength=strength)}


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
    settings = {"slots": 2, "admin_token_file": token_file, "grow": "ask"}
    serving = serve(tiny_model, folder, bundles, *flags, settings=settings, environment=environment)
    serving.engines = 2 if two else 1
    yield serving
    serving.server.stop()
