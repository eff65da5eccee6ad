"""Captures CUDA graphs again after the edits of a serving model were exchanged. Runs in workers, between two steps.

A captured graph keeps the addresses of the slot tensors that it was captured with. vLLM has the same case when it
scales experts while it serves: it drops the graphs and captures them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import vllm
from vllm.config import CUDAGraphMode

from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.vllm_host.seams import optional


def require_capture_again(worker: Any) -> None:
    """UnsupportedHost if graphs are used that this vLLM cannot capture again while it serves."""
    runner = worker.model_runner
    manager, keeping = _manager(runner), optional(runner, "GPUModelRunner.preserve_serving_state")
    able = keeping if manager is None else optional(manager, "CudaGraphManager.release_graphs")
    if _used(worker) and able is None:
        raise UnsupportedHost(
            f"vLLM {vllm.__version__} cannot capture CUDA graphs again while it serves. Restart the server to make "
            'capacity, use vLLM 0.32 or later, or start with --compilation-config \'{"cudagraph_mode": "NONE"}\''
        )


def capture_again(worker: Any) -> None:
    """Drop all captured graphs, and capture them with the present edits. Nothing happens where none are used."""
    if not _used(worker):
        return
    runner = worker.model_runner
    for manager in _managers(runner):
        if release := optional(manager, "CudaGraphManager.release_graphs"):
            release()
    keeping = optional(runner, "GPUModelRunner.preserve_serving_state", nullcontext)  # of V1, whose dummy batches clear
    with keeping():
        runner.capture_model()


def _used(worker: Any) -> bool:
    return worker.vllm_config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)


def _manager(runner: Any) -> Any:
    return optional(runner, "GPUModelRunner.cudagraph_manager")


def _managers(runner: Any) -> Iterator[Any]:
    """Managers of captured graphs on V2: of the model, and of a model that guesses for it."""
    yield _manager(runner)
    speculator = optional(runner, "GPUModelRunner.speculator")
    yield from () if speculator is None else vars(speculator).values()
