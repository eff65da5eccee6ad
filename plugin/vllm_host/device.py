"""Checks the device of a worker (kernels, compiler), and computes the memory that is free for slots."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

from vllm_edits.edit_store.byte_sizes import sized
from vllm_edits.edit_store.errors import UnsupportedHost

_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)")


@dataclass(frozen=True)
class Free:
    """The memory that slots may use. `beside` describes the memory that was subtracted."""

    size: int
    beside: str = ""


def check_device(device: torch.device) -> None:
    """UnsupportedHost for a GPU without kernels in torch, because the first kernel would end the engine."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    known = [(kind, (int(major), int(minor))) for kind, major, minor in
             (found.groups() for found in map(_ARCHITECTURE.match, torch.cuda.get_arch_list()) if found)]  # fmt: skip
    # Machine code (sm) runs on the same major version from its minor version on; PTX (compute) runs on all newer ones.
    runs = (capability >= version and (kind == "compute" or capability[0] == version[0]) for kind, version in known)
    if not any(runs):
        raise UnsupportedHost(
            f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))}, but this "
            f"torch has kernels only for {' '.join(torch.cuda.get_arch_list())}. Use another GPU or another build of "
            "torch"
        )


def check_compiler(device: torch.device, compilation: Any) -> None:
    """UnsupportedHost if torch compiles for a CPU, but finds no C++ compiler.

    It calls the compiler at every start, even if all results are cached.
    """
    compiled = int(compilation.mode or 0) > 0 and compilation.backend in ("", "inductor")
    compiler = os.environ.get("CXX") or "g++"
    if device.type == "cpu" and compiled and shutil.which(compiler) is None:
        raise UnsupportedHost(
            f"the model is compiled for this CPU, but no C++ compiler was found ({compiler}). Install g++, set CXX to "
            "another compiler, or start with --enforce-eager, which needs no compiler and is slower"
        )


def free_for_slots(vllm_config: Any, model: nn.Module, device: torch.device) -> Free:
    """The memory that is free for slots after the base model was loaded. On a GPU, within vLLM's share of the memory.

    Room for the KV cache is subtracted: its size, if it is set (--kv-cache-memory-bytes); else the size for one request
    of the greatest length.
    """
    if device.type != "cuda":
        return Free(int(psutil.virtual_memory().available))
    free, total = torch.cuda.mem_get_info(device)
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes is not None:
        asked = int(cache.kv_cache_memory_bytes)
        return Free(max(0, free - asked), f" beside the {sized(asked)} of --kv-cache-memory-bytes")
    share = min(free, int(total * cache.gpu_memory_utilization) - (total - free))
    least, longest = _cache_of_one_request(vllm_config, model), vllm_config.model_config.max_model_len
    return Free(
        max(0, share - least),
        f" beside the model and the KV cache of one request of {longest} tokens ({sized(least)}; --max-model-len), in "
        f"the share that --gpu-memory-utilization {cache.gpu_memory_utilization} leaves of {sized(total)}",
    )


def free_for_growth(device: torch.device) -> int:
    """The memory that is free for further slots while the engine serves: what nothing has taken, and on a GPU what
    torch has taken and does not use."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def _cache_of_one_request(vllm_config: Any, model: nn.Module) -> int:
    """Bytes of KV cache for a request of the greatest length, or 0 if vLLM chooses the length itself."""
    if vllm_config.model_config.original_max_model_len == -1:
        return 0
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Attention)]
    specs = [layer.get_kv_cache_spec(vllm_config) for layer in layers if layer.kv_sharing_target_layer_name is None]
    return sum(spec.max_memory_usage_bytes(vllm_config) for spec in specs if spec is not None)
