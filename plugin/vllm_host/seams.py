"""The table of all interfaces of vLLM that the plugin uses, and a check of vLLM's sources. It does not import vLLM.

Every supported version has all of them: tests read the sources of the oldest and the newest build, and of the newest
release for GPUs. For other versions, the table shows what may break.
"""

from __future__ import annotations

import ast
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Read = Callable[[str], str | None]
"""Reads a file of the package `vllm`; None if it does not exist."""


@dataclass(frozen=True)
class Seam:
    """A name in a module of vLLM: a function, a class, or `Class.attribute`. takes: needed arguments of a function."""

    file: str
    name: str
    needed_for: str
    takes: tuple[str, ...] = ()


_V2 = "token slots on a GPU"
_V1 = "token slots on the V1 runner"
_BOUND = "where sites are divided among workers"
_WEIGHTS = "a variant in the weights"
_CPU_WEIGHTS = "a variant in the weights of a CPU server"
_MEMORY = "refusing more slots than a GPU has memory for"
_ENDING = "ending one request whose claim is false, instead of the engine"
_FILES = "telling which base model is served"
_CACHE = "cache blocks shared with the base model up to the first edit"

SEAMS = (
    Seam("plugins/__init__.py", "ENDPOINT_PLUGINS_GROUP", "the HTTP side"),
    Seam("plugins/endpoint_plugins/interface.py", "EndpointPlugin.attach_router", "the HTTP side", ("app",)),
    Seam("plugins/endpoint_plugins/interface.py", "EndpointPlugin.init_state", "the HTTP side",
         ("engine_client", "state", "args")),
    Seam("v1/engine/async_llm.py", "AsyncLLM.generate", "claims on slots", ("prompt", "sampling_params", "request_id")),
    Seam("v1/engine/async_llm.py", "AsyncLLM.collective_rpc", "installing versions", ("method", "args")),
    Seam("v1/engine/async_llm.py", "AsyncLLM.errored", "an engine that ends while versions are installed"),
    Seam("v1/engine/async_llm.py", "AsyncLLM.pause_generation", "weights_running = abort", ("mode", "clear_cache")),
    Seam("v1/engine/async_llm.py", "AsyncLLM.resume_generation", "weights_running = abort"),
    Seam("v1/engine/async_llm.py", "AsyncLLM.is_paused", "weights_running = abort"),
    Seam("v1/engine/core_client.py", "AsyncMPClient._call_utility_async", "data parallel", ("method", "engine")),
    Seam("v1/engine/core_client.py", "MPClient.core_engines", "data parallel"),
    Seam("model_executor/model_loader/__init__.py", "register_model_loader", "the load format", ("load_format",)),
    Seam("model_executor/model_loader/__init__.py", "_LOAD_FORMAT_TO_MODEL_LOADER", "the load format"),
    Seam("model_executor/model_loader/__init__.py", "get_model_loader", "the load format", ("load_config",)),
    Seam("model_executor/model_loader/base_loader.py", "BaseModelLoader.load_model", "the load format",
         ("vllm_config", "model_config", "prefix")),
    Seam("model_executor/model_loader/base_loader.py", "BaseModelLoader.load_weights", _WEIGHTS, ("model",)),
    Seam("model_executor/model_loader/default_loader.py", "DefaultModelLoader._prepare_weights", _FILES,
         ("model_name_or_path", "subfolder", "revision", "fall_back_to_pt", "allow_patterns_overrides")),
    Seam("forward_context.py", "set_forward_context", "proving that edits have an effect",
         ("attn_metadata", "vllm_config", "skip_compiled")),
    Seam("transformers_utils/repo_utils.py", "get_hf_file_to_dict", _FILES, ("file_name", "model", "revision")),
    Seam("config/model.py", "ModelConfig.model_weights", _FILES),
    Seam("config/model.py", "ModelConfig.hf_config_path", _FILES),
    Seam("config/model.py", "ModelConfig.hf_overrides", _FILES),
    Seam("config/load.py", "LoadConfig.ignore_patterns", _FILES),
    Seam("model_executor/layers/attention/attention.py", "Attention.forward", "keeping NaN from other requests",
         ("query", "key", "value")),
    Seam("model_executor/layers/attention/attention.py", "Attention.get_kv_cache_spec", _MEMORY, ("vllm_config",)),
    Seam("model_executor/layers/attention/attention.py", "Attention.kv_sharing_target_layer_name", _MEMORY),
    Seam("v1/kv_cache_interface.py", "KVCacheSpec.max_memory_usage_bytes", _MEMORY, ("vllm_config",)),
    Seam("config/model.py", "ModelConfig.original_max_model_len", _MEMORY),
    Seam("config/model.py", "ModelConfig.model_impl", "refusing models that transformers builds"),
    Seam("model_executor/layers/logits_processor.py", "LogitsProcessor.forward", "edits at logits",
         ("lm_head", "hidden_states")),
    Seam("model_executor/layers/linear.py", "RowParallelLinear.reduce_results", _BOUND),
    Seam("model_executor/layers/linear.py", "RowParallelLinear.input_size_per_partition", _BOUND),
    Seam("model_executor/layers/linear.py", "ColumnParallelLinear.output_size_per_partition", _BOUND),
    Seam("distributed/communication_op.py", "tensor_model_parallel_all_reduce", _BOUND, ("input_",)),
    Seam("distributed/parallel_state.py", "get_tensor_model_parallel_rank", _BOUND),
    Seam("distributed/parallel_state.py", "get_tensor_model_parallel_world_size", _BOUND),
    Seam("model_executor/layers/linear.py", "UnquantizedLinearMethod", _WEIGHTS),
    Seam("_custom_ops.py", "CPUDNNLGEMMHandler.handler_tensor", _CPU_WEIGHTS),
    Seam("_custom_ops.py", "create_onednn_mm", _CPU_WEIGHTS, ("weight",)),
    Seam("_custom_ops.py", "onednn_mm", _CPU_WEIGHTS, ("dnnl_handler", "x", "bias")),
    Seam("v1/worker/gpu_model_runner.py", "GPUModelRunner.input_batch", _V1),
    Seam("v1/worker/gpu_model_runner.py", "GPUModelRunner.requests", _V1),
    Seam("v1/worker/gpu_model_runner.py", "GPUModelRunner.query_start_loc", _V1),
    Seam("v1/worker/gpu_model_runner.py", "GPUModelRunner.input_ids", _V1),
    Seam("v1/worker/gpu_input_batch.py", "CachedRequestState.req_id", _V1),
    Seam("v1/worker/gpu_input_batch.py", "CachedRequestState.prompt_embeds", _V1),
    Seam("v1/worker/gpu_input_batch.py", "CachedRequestState.prompt_is_token_ids", _V1),
    Seam("v1/worker/gpu_input_batch.py", "InputBatch.req_ids", _V1),
    Seam("v1/worker/gpu_input_batch.py", "InputBatch.num_reqs", _V1),
    Seam("v1/worker/gpu_input_batch.py", "InputBatch.num_computed_tokens_cpu", _V1),
    Seam("v1/worker/gpu_input_batch.py", "InputBatch.num_prompt_tokens", _V1),
    Seam("v1/core/sched/output.py", "NewRequestData.prompt_embeds", _V2),
    Seam("v1/core/sched/output.py", "NewRequestData.prompt_is_token_ids", _V2),
    Seam("v1/worker/gpu/model_states/__init__.py", "init_model_state", _V2),
    Seam("v1/worker/gpu/model_states/default.py", "DefaultModelState.add_request", _V2,
         ("req_index", "new_req_data")),
    Seam("v1/worker/gpu/model_states/interface.py", "ModelState.remove_request", _V2, ("req_id",)),
    Seam("v1/worker/gpu/model_states/default.py", "DefaultModelState.prepare_inputs", _V2,
         ("input_batch", "req_states")),
    Seam("v1/worker/gpu/states.py", "RequestState.req_id_to_index", _V2),
    Seam("v1/worker/gpu/input_batch.py", "InputBatch.req_ids", _V2),
    Seam("v1/worker/gpu/input_batch.py", "InputBatch.num_scheduled_tokens", _V2),
    Seam("v1/worker/gpu/input_batch.py", "InputBatch.num_computed_tokens_np", _V2),
    Seam("v1/worker/gpu/input_batch.py", "InputBatch.input_ids", _V2),
    Seam("v1/core/sched/scheduler.py", "Scheduler.update_from_output", _ENDING,
         ("scheduler_output", "model_runner_output")),
    Seam("v1/core/sched/scheduler.py", "Scheduler.finish_requests", _ENDING, ("request_ids", "finished_status")),
    Seam("v1/core/sched/scheduler.py", "Scheduler.kv_cache_manager", _ENDING),
    Seam("config/vllm.py", "VllmConfig.instance_id", _ENDING),
    Seam("config/parallel.py", "ParallelConfig.data_parallel_index", _ENDING),
    Seam("v1/core/sched/scheduler.py", "Scheduler.requests", _ENDING),
    Seam("v1/core/kv_cache_manager.py", "KVCacheManager.get_block_ids", _ENDING, ("request_id",)),
    Seam("v1/core/kv_cache_manager.py", "KVCacheManager.evict_blocks", _ENDING, ("block_ids",)),
    Seam("v1/core/kv_cache_manager.py", "KVCacheManager.free", _ENDING, ("request",)),
    Seam("v1/core/kv_cache_manager.py", "KVCacheManager.block_pool", _ENDING),
    Seam("v1/core/block_pool.py", "BlockPool.null_block", _ENDING),
    Seam("v1/core/sched/scheduler.py", "Scheduler.kv_cache_config", _ENDING),
    Seam("v1/kv_cache_interface.py", "KVCacheGroupSpec.kv_cache_spec", _ENDING),
    Seam("v1/kv_cache_interface.py", "KVCacheSpec.block_size", _ENDING),
    Seam("v1/request.py", "RequestStatus.FINISHED_ERROR", _ENDING),
    Seam("v1/request.py", "Request.get_finished_reason", _ENDING),
    Seam("v1/request.py", "Request.client_index", _ENDING),
    Seam("v1/engine/__init__.py", "EngineCoreOutput.finish_reason", _ENDING),
    Seam("v1/engine/__init__.py", "EngineCoreOutputs.outputs", _ENDING),
    Seam("v1/core/sched/scheduler.py", "Scheduler.add_request", _CACHE, ("request",)),
    Seam("v1/core/sched/async_scheduler.py", "AsyncScheduler", _CACHE),
    Seam("v1/request.py", "Request._block_hasher", _CACHE),
    Seam("v1/request.py", "Request.block_hashes", _CACHE),
    Seam("v1/request.py", "Request.update_block_hashes", _CACHE),
)  # fmt: skip


def missing(read: Read) -> list[str]:
    """The interfaces that vLLM's sources lack, each with its purpose."""
    modules: dict[str, ast.Module | None] = {}
    found = []
    for seam in SEAMS:
        if seam.file not in modules:
            text = read(seam.file)
            modules[seam.file] = None if text is None else _parsed(text)
        module = modules[seam.file]
        why = f"no file vllm/{seam.file}" if module is None else _fault(module, seam)
        if why:
            found.append(f"{seam.needed_for}: {why}")
    return found


def _parsed(text: str) -> ast.Module:
    # If garbage collection runs meanwhile, Python 3.11 may lose count of its recursion depth and fail.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if collecting:
            gc.enable()


def _fault(module: ast.Module, seam: Seam) -> str:
    """The reason why a module does not have a seam, or ''."""
    group: ast.AST | None = module
    for part in seam.name.split("."):
        group = _member(module, group, part) if group is not None else None
    if group is None:
        return f"no {seam.name} in vllm/{seam.file}"
    if not seam.takes:
        return ""
    if not isinstance(group, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{seam.name} in vllm/{seam.file} is not a function"
    arguments = group.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    absent = [name for name in seam.takes if name not in names]
    return f"{seam.name} in vllm/{seam.file} does not take {' and '.join(absent)}" if absent else ""


def _member(module: ast.Module, group: ast.AST, name: str) -> ast.AST | None:
    """The member with this name in a module or a class, or in a base class in the same module."""
    for node in _members(group):
        if name in _names(node, inside_class=isinstance(group, ast.ClassDef)):
            return node
    if isinstance(group, ast.ClassDef):
        for base in group.bases:
            held = _member(module, module, base.id) if isinstance(base, ast.Name) else None
            if isinstance(held, ast.ClassDef) and (inherited := _member(module, held, name)) is not None:
                return inherited
    return None


def _members(group: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module, also below `if` and `try`; for a class also those of its methods."""
    for node in ast.iter_child_nodes(group):
        yield node
        if isinstance(node, ast.If | ast.Try) or isinstance(group, ast.ClassDef):
            yield from (each for each in ast.walk(node) if each is not node)


def _names(node: ast.AST, *, inside_class: bool) -> list[str]:
    """The names that a statement defines; inside a class also attributes of self."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [each.asname or each.name for each in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    plain = [target.id for target in targets if isinstance(target, ast.Name)]
    own = [target.attr for target in targets if isinstance(target, ast.Attribute) and inside_class]
    return plain + own
