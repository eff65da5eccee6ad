"""What the plugin touches of vLLM is in the table of seams, and what is in the table is touched."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydantic
import pytest
from fastapi import FastAPI
from torch import Tensor, nn

from tests.support.touched import Touch, texts_of_vllm, touched
from vllm_edits.plugin.vllm_host.seams import SEAMS

PLUGIN = {str(path): path.read_text() for path in sorted(Path("plugin").rglob("*.py"))}
SOURCES = {Path(path).name: text for path, text in PLUGIN.items() if Path(path).parent.name == "vllm_host"}
DECLARED = {name for seam in SEAMS for name in (*seam.name.split("."), *seam.takes, *seam.holds)} | {
    Path(seam.file).stem for seam in SEAMS if "/" not in seam.file
}
METHODS = {
    name for kind in (dict, list, set, tuple, str, deque, np.ndarray, Tensor, nn.Module, FastAPI, pydantic.BaseModel)
    for name in dir(kind)
}  # fmt: skip
"""What can be called on containers, texts, arrays, modules, apps and models of data, whoever's they are."""
NOT_VLLMS = {"_state", "serving", "update"}
"""Of Starlette's `State`, of the plugin's own middleware, and of pydantic's `model_copy`."""


def undeclared(sources: Mapping[str, str]) -> list[str]:
    """What is touched and not in the table, or goes by unsaid where there is none; names with `edits` are our own."""
    found = [touch for touch in touched(sources) if not _is_known(touch)]
    return [str(touch) for touch in (*found, *texts_of_vllm(sources)) if touch in found or touch.name not in DECLARED]


def _is_known(touch: Touch) -> bool:
    if "edits" in touch.name or touch.name.startswith("__") or touch.name in NOT_VLLMS:
        return True
    return not touch.silent and (touch.name in DECLARED or (touch.called and touch.name in METHODS))


def test_what_is_touched_is_in_the_table() -> None:
    assert undeclared(SOURCES) == []


def test_what_the_rest_of_the_plugin_names_is_in_the_table() -> None:
    """It knows no object of vLLM's, but variables of the environment and groups of plugins."""
    named = {touch.name for touch in texts_of_vllm(PLUGIN)}
    assert named <= DECLARED
    assert {"VLLM_PLUGINS", "VLLM_API_KEY", "vllm.platform_plugins"} <= named


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "was", "becomes", "told"),
    [
        ("outputs.py", "return output.metrics.first_token_ts", "return output.metrics.first_ts", "first_ts"),
        ("outputs.py", "output.metrics.is_corrupted", "output.metrics.corrupted", "corrupted"),
        ("outputs.py", "output.metrics.is_corrupted", 'getattr(output.metrics, "is_corrupted", False)',
         "is_corrupted, with a default"),
        ("outputs.py", "completion.text.strip()", "completion.said.strip()", "said"),
        ("outputs.py", "[token].logprob)", "[token].log_probability)", "log_probability"),
        ("addressing.py", '.get("cache_salt")', '.get("salt")', "salt"),
        ("addressing.py", '{"prompt_token_ids": prompt}', '{"prompt_ids": prompt}', "prompt_ids"),
        ("engine_gate.py", "async def generate(", "async def produce(", "produce"),
        ("served_models.py", '{"id": name, "root"', '{"id": name, "origin"', "origin"),
        ("frontend.py", "paused = await self._engine.is_paused()", "paused = await self._engine.paused()", "paused"),
        ("frontend.py", 'mode="abort"', 'how="abort"', "how"),
        ("frontend.py", 'need(state, "openai_serving_models")', 'need(state, "models")', "models"),
        ("worker.py", "self.model_runner.get_model", "self.runner.get_model", "runner"),
        ("loader.py", "def load_weights(", "def read_weights(", "read_weights"),
        ("base_files.py", "load_format=", "form=", "form"),
        ("front_ends.py", "VLLM_USE_RUST_FRONTEND", "VLLM_RUST_FRONTEND", "VLLM_RUST_FRONTEND"),
        ("ending.py", "for name, request in scheduler.requests.items()", "for name, request in scheduler.all.items()",
         "all"),
        ("ending.py", "request.client_index", "request.client", "client"),
        ("runner_v2.py", "req_states.req_id_to_index", "req_states.indices", "indices"),
        ("scheduler.py", "from vllm.v1.core.sched.scheduler import Scheduler",
         "from vllm.v1.core.sched.scheduler import Planner as Scheduler", "Planner"),
    ],
)  # fmt: skip
def test_another_name_is_noticed(file: str, was: str, becomes: str, told: str) -> None:
    assert was in SOURCES[file]
    found = undeclared({**SOURCES, file: SOURCES[file].replace(was, becomes)})
    assert [line for line in found if re.fullmatch(rf"{file}:\d+: {told}", line)], found


OWN = """
from typing import Any
from vllm_edits.plugin.serving.lease import Lease

class Gate:
    def __init__(self, engine: Any, answers: dict[str, Any]) -> None:
        self._engine, self._answers = engine, answers

    def ask(self, lease: Lease, outputs: list[Any]) -> None:
        self._answers["whatever"].anything
        lease.of_our_own
        for output, mine in zip(outputs, self._mine(), strict=True):
            mine.of_our_own
            output.strip()
            output.edits_own

    def _mine(self) -> list[Lease]:
        return []
"""


def test_what_is_the_plugins_own_is_not_asked_of_the_table() -> None:
    assert undeclared({"own.py": OWN}) == []
    assert undeclared({"own.py": OWN.replace("output.strip()", "output.strip")}) == ["own.py:14: strip"]
    assert undeclared({"own.py": OWN.replace("lease: Lease", "lease: Any")}) == ["own.py:11: of_our_own"]


def test_what_is_in_the_table_is_touched() -> None:
    words: set[str] = set()
    for file, text in {**PLUGIN, "entry points": Path("pyproject.toml").read_text()}.items():
        if not file.endswith("seams.py"):
            words |= {word.strip(".") for word in re.findall(r"[\w.-]+", text)} | set(re.findall(r"\w+", text))
    needed = {(seam.file, name) for seam in SEAMS for name in seam.holds or (seam.name.rpartition(".")[2],)}
    assert sorted(f"{file}: {name}" for file, name in needed if name not in words) == []
