"""Two workers divide a model that has a variant in its weights, and one of them is killed while the weights change."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import httpx
import psutil
import pytest

from loadtests.harness.server import Server
from tests.proofs.parity import cores_apart
from tests.support.bundles import base_of
from tests.support.engine import SLOW_ON_TWO, Serving, serve
from tests.support.in_weights import linear_bundle, says

pytestmark = [pytest.mark.vllm, *SLOW_ON_TWO]
HOLDING = """
import importlib.util, os, pathlib, sys, time

FOLDER = pathlib.Path(os.environ["TESTS_HOLD"])

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "vllm_edits.plugin.vllm_host.worker":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            put = module.EditsWorker.edits_put_weights

            def held(self, *args):
                rank = self._edits().edited.worker.rank
                if (FOLDER / "hold").exists() and rank == 1:
                    (FOLDER / "waits").touch()
                    time.sleep(3600)
                answer = put(self, *args)
                if (FOLDER / "hold").exists():
                    (FOLDER / "exchanged").write_text(str(answer))
                return answer

            module.EditsWorker.edits_put_weights = held

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
"""A sitecustomize: once the file `hold` is there, the second worker stands still before it exchanges its weights."""
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
    """One worker has exchanged its weights when the other, which has not, is killed: nothing is answered any more.

    Started again, the server serves what the store promotes.
    """
    base = base_of(tiny_model)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(HOLDING)
    environment = {"VLLM_CPU_OMP_THREADS_BIND": cores_apart(2)}
    holding = {"PYTHONPATH": str(tmp_path / "site"), "TESTS_HOLD": str(tmp_path)}
    first, second = (linear_bundle("polite", base, seed) for seed in (1, 2))
    serving = serve(tiny_model, tmp_path, [first], *FLAGS, settings=SETTINGS, environment={**environment, **holding})
    try:
        assert says(serving, "polite")[0] == first.version
        workers = workers_of(serving.server)
        assert len(workers) == 2
        serving.store.promote(f"polite@{serving.store.publish(second)}")
        (tmp_path / "hold").touch()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{serving.url}/v1/edits/sync", timeout=10)
        assert (tmp_path / "waits").exists()
        assert "digest" in (tmp_path / "exchanged").read_text(), "positive control: half of it is in place"
        workers[1].kill()
        assert answers_until_it_ends(serving) == []
    finally:
        serving.server.stop()
    started_again(serving, tiny_model, tmp_path, second.version, environment)


def answers_until_it_ends(serving: Serving) -> list[str]:
    """What the server still answers; it must end."""
    deadline, answered = time.monotonic() + END_SECONDS, list[str]()
    while serving.server.process is not None and serving.server.process.poll() is None:
        assert time.monotonic() < deadline, "the server outlives its worker"
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.post(f"{serving.url}/v1/completions", json={"model": "polite", "prompt": "x"}, timeout=5)
            answered += [answer.text] if answer.status_code == httpx.codes.OK else []
        time.sleep(0.2)
    return answered


def started_again(serving: Serving, model: Path, folder: Path, promoted: str, environment: dict[str, str]) -> None:
    trust = {"trust_file": str(folder / "trust.json"), "cache_folder": str(folder / "node"), **SETTINGS}
    server = Server.with_edits(
        model, folder / "store", folder / "again.log", *FLAGS, settings=trust, environment=environment
    )
    with server:
        again = Serving(server, serving.store, serving.base, model, serving.bundles, serving.signer, serving.exposures)
        assert says(again, "polite")[0] == promoted
