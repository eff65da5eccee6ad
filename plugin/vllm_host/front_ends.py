"""Which program has started this engine, and whether the plugin's HTTP side can be in it.

Some of vLLM's front ends attach no endpoint plugin: they would serve the base model to all, and know no variant. Those
that can be told by their command are refused while the engine starts. Any other is found out by the scheduler: until
the plugin's HTTP side has attached itself, requests end with an error (ending.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from vllm_edits.edit_store.errors import UnsupportedHost

_BATCH = "`vllm run-batch` does not load the plugin. Use `vllm-edits run-batch MODEL --store … -i … -o …`"
_GRPC = "`vllm serve --grpc` does not load the plugin. Serve over HTTP"
_PROGRAM = 4
"""A command's program is among so many of its first words: behind an interpreter, and its flags."""
_RUST = "the front end of VLLM_USE_RUST_FRONTEND does not load the plugin. Unset that variable"


def require_http() -> None:
    """UnsupportedHost when this engine was started by a front end that the plugin cannot be part of."""
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise UnsupportedHost(_RUST)
    for words in _commands():
        if why := refused(words):
            raise UnsupportedHost(why)


def refused(words: Sequence[str]) -> str:
    """Why a command's engine cannot serve edits, or ''."""
    for group, word in enumerate(words[:_PROGRAM]):
        if Path(word).name == "vllm" or word == "vllm.entrypoints.cli.main":
            rest = words[group + 1 :]
            return _BATCH if rest[:1] == ["run-batch"] else _GRPC if "--grpc" in rest else ""
        if word.startswith("vllm.entrypoints."):
            return _BATCH if word.endswith(".run_batch") else _GRPC if "grpc_server" in word else ""
    return ""


def _commands() -> Iterable[list[str]]:
    """The command of this process, and of those that started it."""
    process = psutil.Process()
    for each in (process, *process.parents()):
        try:
            yield each.cmdline()
        except psutil.Error:
            return
