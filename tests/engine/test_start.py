"""What happens at the start: a server that cannot serve edits exactly does not start, and says why."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edit_store import EditStore
from loadtests.client import complete
from loadtests.server import CPU_ENVIRONMENT, Server, ServerFailed
from tests.conftest import base_of, publish, random_bundle

pytestmark = pytest.mark.vllm

PROMPT = "One two three"
FLAGS = ("--dtype", "float32", "--max-model-len", "512")


def additional(store: Path, **settings: object) -> str:
    return json.dumps({"edits": {"store": str(store), **settings}})


def test_a_warm_compile_cache_keeps_edits_in_and_a_plain_start_is_plain(tiny_model: Path, tmp_path: Path) -> None:
    """One cache folder, four starts: cold with edits, warm with edits, without the plugin, and warm with edits again.

    The graph that was compiled with edits is never used without them, nor the other way round.
    """
    store = EditStore(str(tmp_path / "store"), create=True)
    version = publish(store, random_bundle("loud", base_of(tiny_model), seed=1))
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    answers: dict[str, list[str]] = {"base": [], "loud": []}
    for number, plain in enumerate((False, False, True, False)):
        log = tmp_path / f"start-{number}.log"
        if plain:
            server = Server.plain(tiny_model, log, *FLAGS, environment=cache)
        else:
            server = Server.with_edits(tiny_model, tmp_path / "store", log, *FLAGS, environment=cache)
        with server:
            answers["base"].append(complete(server.url, "base", PROMPT, 8, ignore_eos=True)["choices"][0]["text"])
            if not plain:
                answer = complete(server.url, "loud", PROMPT, 8, ignore_eos=True)
                assert answer["headers"]["x-edits-version"] == version
                answers["loud"].append(answer["choices"][0]["text"])
    assert len(set(answers["base"])) == 1
    assert len(set(answers["loud"])) == 1
    assert answers["base"][0] != answers["loud"][0]


@pytest.mark.parametrize(
    ("plugins", "flags", "says"),
    [
        ("none", ("--load-format", "edits"), "not supported"),
        (None, ("--load-format", "edits"), "VLLM_PLUGINS"),
        ("edits", ("--enforce-eager",), "--load-format edits"),
        ("edits", ("--load-format", "edits", "--enable-lora"), "LoRA"),
    ],
    ids=["plugin disabled", "plugins not named", "load format not named", "a configuration not proven exact"],
)
def test_a_start_without_all_of_the_plugin_is_refused(
    plugins: str | None, flags: tuple[str, ...], says: str, tiny_model: Path, tmp_path: Path
) -> None:
    EditStore(str(tmp_path / "store"), create=True)
    chosen = (*FLAGS, *flags, "--additional-config", additional(tmp_path / "store"))
    environment = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    server = Server.plain(tiny_model, tmp_path / "server.log", *chosen, environment=environment)
    with pytest.raises(ServerFailed):
        server.start()
    assert says in server.log_text()


def test_an_unknown_setting_and_a_missing_store_are_refused_at_start(tiny_model: Path, tmp_path: Path) -> None:
    chosen = (*FLAGS, "--load-format", "edits", "--additional-config", additional(tmp_path / "none", slotz=3))
    server = Server.plain(tiny_model, tmp_path / "server.log", *chosen, environment={"VLLM_PLUGINS": "edits"})
    with pytest.raises(ServerFailed):
        server.start()
    assert "unknown setting. Did you mean 'slots'" in server.log_text()


def test_more_slots_than_memory_are_refused_at_start(tiny_model: Path, tmp_path: Path) -> None:
    EditStore(str(tmp_path / "store"), create=True)
    room = [{"kind": "low_rank", "site": "*", "rank": 512}]
    given = additional(tmp_path / "store", slots=4096, reserve=room)
    chosen = (*FLAGS, "--load-format", "edits", "--additional-config", given)
    server = Server.plain(tiny_model, tmp_path / "server.log", *chosen, environment={"VLLM_PLUGINS": "edits"})
    with pytest.raises(ServerFailed):
        server.start()
    assert re.search(r"edits\.slots = 4096 takes .* are free: [1-9]\d* slots of .* fit", server.log_text())


def test_offline_python_serves_variants_and_survives_a_worker_that_refuses(tiny_model: Path, tmp_path: Path) -> None:
    """`LLM.generate` with variants mixed in one batch; a worker that refuses an install leaves the old version."""
    store = EditStore(str(tmp_path / "store"), create=True)
    base = base_of(tiny_model)
    publish(store, random_bundle("loud", base, seed=1))
    second = publish(store, random_bundle("loud", base, seed=2), tag=None)
    script = Path(__file__).with_name("offline_story.py")
    environment = {**CPU_ENVIRONMENT, "VLLM_PLUGINS": "edits", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ran = subprocess.run(
        [sys.executable, str(script), str(tiny_model), str(tmp_path / "store"), second],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "the story holds" in ran.stdout
