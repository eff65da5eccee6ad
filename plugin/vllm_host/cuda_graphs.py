"""Captures CUDA graphs again after the edits of a serving model were exchanged. Runs in workers, between two steps.

A captured graph keeps the addresses of the slot tensors that it was captured with. vLLM has the same case when it
scales experts while it serves: it drops the graphs and captures them again.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from vllm.config import CUDAGraphMode

from vllm_edits.plugin.vllm_host.seams import optional


def capture_again(worker: Any) -> None:
    """Drop all captured graphs, and capture them with the present edits. Nothing happens where none are used."""
    if worker.vllm_config.compilation_config.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return
    runner = worker.model_runner
    managers = [optional(runner, "GPUModelRunner.cudagraph_manager")]
    speculator = optional(runner, "GPUModelRunner.speculator")
    managers += [] if speculator is None else vars(speculator).values()
    for manager in managers:
        if release := optional(manager, "CudaGraphManager.release_graphs"):
            release()
    keeping = optional(runner, "GPUModelRunner.preserve_serving_state", nullcontext)  # of V1, whose dummy batches clear
    with keeping():
        runner.capture_model()
