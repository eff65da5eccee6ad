"""Two workers divide a model that has a variant in its weights, and one of them is killed while the weights change."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import psutil
import pytest

from loadtests.server import Server
from tests.conftest import base_of
from tests.engine.conftest import Serving, serve
from tests.engine.test_weights_server import linear_bundle, says
from tests.parity import cores_apart

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
FLAGS = ("--dtype", "float32", "--max-model-len", "640", "--enforce-eager", "--tensor-parallel-size", "2")
SETTINGS = {"weights": "polite"}
END_SECONDS = 90


def workers_of(server: Server) -> list[psutil.Process]:
    """The two workers, in the order of their ranks."""
    assert server.process is not None
    found = [each for each in psutil.Process(server.process.pid).children(recursive=True)
             if "Worker" in " ".join(each.cmdline())]  # fmt: skip
    return sorted(found, key=lambda each: " ".join(each.cmdline()))


def test_no_half_of_a_version_is_ever_served(tiny_model: Path, tmp_path: Path) -> None:
    """One worker stands still, the other exchanges its weights, and the first is killed: nothing is answered any more.

    Started again, the server serves what the store promotes.
    """
    base, environment = base_of(tiny_model), {"VLLM_CPU_OMP_THREADS_BIND": cores_apart(2)}
    first, second = (linear_bundle("polite", base, seed) for seed in (1, 2))
    serving = serve(tiny_model, tmp_path, [first], *FLAGS, settings=SETTINGS, environment=environment)
    try:
        assert says(serving, "polite")[0] == first.version
        workers = workers_of(serving.server)
        assert len(workers) == 2
        serving.store.promote(f"polite@{serving.store.publish(second)}")
        workers[1].suspend()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{serving.url}/v1/edits/sync", timeout=10)
        workers[1].kill()
        deadline, answered = time.monotonic() + END_SECONDS, list[str]()
        while serving.server.process is not None and serving.server.process.poll() is None:
            assert time.monotonic() < deadline, "the server outlives its worker"
            try:
                answer = httpx.post(f"{serving.url}/v1/completions", json={"model": "polite", "prompt": "x"}, timeout=5)
                answered += [answer.text] if answer.status_code == httpx.codes.OK else []
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        assert answered == []
    finally:
        serving.server.stop()
    started_again(serving, tiny_model, tmp_path, second.version, environment)


def started_again(serving: Serving, model: Path, folder: Path, promoted: str, environment: dict[str, str]) -> None:
    trust = {"trust_file": str(folder / "trust.json"), "cache_folder": str(folder / "node"), **SETTINGS}
    server = Server.with_edits(
        model, folder / "store", folder / "again.log", *FLAGS, settings=trust, environment=environment
    )
    with server:
        again = Serving(server, serving.store, serving.base, model, serving.bundles, serving.signer)
        assert says(again, "polite")[0] == promoted
