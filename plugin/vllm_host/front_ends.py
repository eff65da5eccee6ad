"""Refuses front ends of vLLM that do not load the plugin's HTTP side. Runs in the workers at start.

Some front ends load no endpoint plugin. They would serve the base model only, and know no variant. Front ends that
their command line shows are refused at the start of the engine. With any other, the scheduler ends all requests with an
error until the plugin's HTTP side has attached (ending.py).
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
"""Number of first words of a command that may contain its program, after an interpreter and its flags."""
_RUST = "the front end of VLLM_USE_RUST_FRONTEND does not load the plugin. Unset that variable"


def require_http() -> None:
    """UnsupportedHost if a front end without the plugin's HTTP side has started this engine."""
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise UnsupportedHost(_RUST)
    for words in _commands():
        if why := refused(words):
            raise UnsupportedHost(why)


def refused(words: Sequence[str]) -> str:
    """The reason why a command's engine cannot serve edits, or ''."""
    for group, word in enumerate(words[:_PROGRAM]):
        if Path(word).name == "vllm" or word == "vllm.entrypoints.cli.main":
            rest = words[group + 1 :]
            return _BATCH if rest[:1] == ["run-batch"] else _GRPC if "--grpc" in rest else ""
        if word.startswith("vllm.entrypoints."):
            return _BATCH if word.endswith(".run_batch") else _GRPC if "grpc_server" in word else ""
    return ""


def _commands() -> Iterable[list[str]]:
    """The commands of this process and of its parents."""
    process = psutil.Process()
    for each in (process, *process.parents()):
        try:
            yield each.cmdline()
        except psutil.Error:
            return
