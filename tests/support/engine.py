"""Real servers, as tests of the engine start them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.harness.metrics import Scrape
from loadtests.harness.record import gpu
from loadtests.harness.server import Server
from tests.support.bundles import base_of, bundle_of, publish, random_pairs
from tests.support.gpu_ways import IN_PIECES, runner_of
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
        return Scrape.of(self.url).sum(name, **labels)


def kind_bundle(kind: str, base: BaseModelRef, strength: float) -> Bundle:
    """A bundle of one kind at an early, a middle and a late layer."""
    name = kind.replace("_", "-")
    layers = (1, base.widths.layers // 2, base.widths.layers - 1)
    pairs = [pair for layer in layers for pair in random_pairs(kind, layer, base.widths, seed=layer, strength=strength)]
    return bundle_of(name, base, pairs)


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
