"""The table of all that this plugin uses of vLLM. It does not import vLLM.

Only this folder knows vLLM's objects. `SEAMS` names everything that it uses of them, each with its purpose:

- calls: functions, methods, and the arguments they `take`
- reads and writes: attributes, fields, keys of prompts, members of enumerations
- replacements and subclasses: the methods that vLLM calls, by the names that it calls them
- names in text: environment variables, finish reasons, names in a function's closure (`holds`)

A row holds in every supported version, or names its versions (`since`, `until`), or says why some objects lack it
(`absent`). `optional` reads such an object, and nothing else of vLLM is read with a default. A name that no longer
exists ends the start with a message (compat.py). Tests read the sources of the oldest and the newest build and of the
newest release for GPUs, and fail for any use in this folder that the table does not name.

Not in the table: the modules of each architecture, which are data of `vllm_edits.edit_store.architectures` and are
looked up when a model is loaded; and texts of clients and operators, as routes, headers, request fields and flags.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from packaging.version import Version


@dataclass(frozen=True)
class Seam:
    """A name in a module of vLLM: a function, a class, or `Class.attribute`. takes: needed arguments of a function."""

    file: str
    name: str
    needed_for: str
    takes: tuple[str, ...] = ()
    """arguments of the function"""
    holds: tuple[str, ...] = ()
    """names and texts that stand in the definition"""
    since: str = ""
    """the first version that has it, if not all do"""
    until: str = ""
    """the first version that no longer has it"""
    absent: str = ""
    """why an object may be without it; '' where all have it"""

    def is_in(self, version: Version) -> bool:
        """True if a version should have it."""
        return (not self.since or version >= Version(self.since)) and (not self.until or version < Version(self.until))


def _of(
    file: str, owner: str, needed_for: str, *names: str, since: str = "", until: str = "", absent: str = ""
) -> list[Seam]:
    """Attributes of one class."""
    return [Seam(file, f"{owner}.{name}", needed_for, since=since, until=until, absent=absent) for name in names]


_ARGUMENTS = "the keys that callers must send"
_BOUND = "where sites are divided among workers"
_CACHE = "cache blocks shared with the base model up to the first edit"
_CLAIM = "claims on slots"
_COMPILED = "a compiler for the model, where it needs one"
_CPU_WEIGHTS = "a variant in the weights of a CPU server"
_ENDING = "ending one request whose claim is false, instead of the engine"
_FILES = "telling which base model is served"
_FORMAT = "the load format"
_FRONT_ENDS = "refusing front ends that attach no plugin"
_GROWTH = "a reservation that grows while the server runs"
_HTTP = "the HTTP side"
_LOGITS = "edits at logits"
_MANY_ENGINES = "data parallel"
_MEMORY = "refusing more slots than a GPU has memory for"
_MODELS = "the list of models, with variants"
_NAN = "keeping NaN from other requests"
_OFFLINE = "variants for Python users"
_PLUGINS = "leaving on the plugins that are on"
_PROMPTS = "prompt lengths, and vectors in the place of tokens"
_PROBES = "probes"
_PROOF = "proving that edits have an effect"
_RUNNING = "weights_running = abort"
_SALT = "keeping variants apart in the prefix cache"
_SHADOW = "answering a request twice, to compare"
_UNPROVEN = "refusing ways of running that are not proven"
_USAGE = "counting what a request used"
_V1 = "token slots on the V1 runner"
_V2 = "token slots on a GPU"
_WEIGHTS = "a variant in the weights"
_WORKERS = "installing versions"

_BLOCKS, _RUNNER = "v1/core/kv_cache_manager.py", "v1/worker/gpu_model_runner.py"
_CONFIG, _MODEL, _PARALLEL = "config/vllm.py", "config/model.py", "config/parallel.py"
_ENGINE, _ASYNC = "v1/engine/__init__.py", "v1/engine/async_llm.py"
_LINEAR, _LOADERS = "model_executor/layers/linear.py", "model_executor/model_loader/__init__.py"
_SCHEDULER, _STATE = "v1/core/sched/scheduler.py", "v1/worker/gpu/model_states/default.py"
_ATTENTION, _BASE_LOADER = "model_executor/layers/attention/attention.py", "model_executor/model_loader/base_loader.py"

_FRONT_END = (
    Seam("plugins/__init__.py", "DEFAULT_PLUGINS_GROUP", _FORMAT, holds=("vllm.general_plugins",)),
    Seam("plugins/__init__.py", "ENDPOINT_PLUGINS_GROUP", _HTTP, holds=("vllm.endpoint_plugins",)),
    Seam("plugins/__init__.py", "PLATFORM_PLUGINS_GROUP", _PLUGINS, holds=("vllm.platform_plugins",)),
    Seam("plugins/__init__.py", "IO_PROCESSOR_PLUGINS_GROUP", _PLUGINS, holds=("vllm.io_processor_plugins",)),
    Seam("plugins/__init__.py", "STAT_LOGGER_PLUGINS_GROUP", _PLUGINS, holds=("vllm.stat_logger_plugins",)),
    Seam("plugins/endpoint_plugins/interface.py", "EndpointPlugin.attach_router", _HTTP, ("app",)),
    Seam("plugins/endpoint_plugins/interface.py", "EndpointPlugin.init_state", _HTTP,
         ("engine_client", "state", "args")),
    *_of("plugins/endpoint_plugins/interface.py", "EndpointPlugin", _HTTP, "name", "required_tasks"),
    Seam("entrypoints/openai/api_server.py", "init_app_state", _HTTP, holds=("openai_serving_models",), until="0.29"),
    Seam("entrypoints/launchers/api_server/app_state.py", "init_app_state", _HTTP, holds=("openai_serving_models",),
         since="0.29"),
    *_of("entrypoints/openai/cli_args.py", "FrontendArgs", _ARGUMENTS, "api_key", until="0.29"),
    *_of("entrypoints/launchers/cli_args.py", "FrontendArgs", _ARGUMENTS, "api_key", since="0.29", until="0.33"),
    *_of("entrypoints/common/cli_args.py", "FrontendArgs", _ARGUMENTS, "api_key", since="0.33"),
    *_of("entrypoints/openai/models/serving.py", "OpenAIServingModels", _MODELS,
         "base_model_paths", "show_available_models"),
    Seam("entrypoints/openai/models/serving.py", "OpenAIServingModels.is_base_model", _MODELS, ("model_name",)),
    Seam("entrypoints/openai/models/serving.py", "OpenAIServingModels.model_name", _MODELS, ("lora_request",)),
    *_of("entrypoints/openai/models/protocol.py", "BaseModelPath", _MODELS, "name"),
    *_of("entrypoints/openai/engine/protocol.py", "ModelCard", _MODELS, "id", "root", "parent", until="0.29"),
    *_of("entrypoints/openai/engine/protocol.py", "ModelList", _MODELS, "data", until="0.29"),
    *_of("entrypoints/serve/engine/protocol.py", "ModelCard", _MODELS, "id", "root", "parent", since="0.29"),
    *_of("entrypoints/serve/engine/protocol.py", "ModelList", _MODELS, "data", since="0.29"),
    Seam("entrypoints/cli/main.py", "main", _FRONT_ENDS),
    Seam("entrypoints/cli/run_batch.py", "RunBatchSubcommand.name", _FRONT_ENDS, holds=("run-batch",)),
    Seam("envs.py", "environment_variables", _FRONT_ENDS, holds=("VLLM_USE_RUST_FRONTEND",)),
    Seam("envs.py", "environment_variables", _ARGUMENTS, holds=("VLLM_API_KEY",)),
    Seam("envs.py", "environment_variables", "refusing that any client calls the workers",
         holds=("VLLM_SERVER_DEV_MODE",)),
    Seam("envs.py", "environment_variables", _HTTP, holds=("VLLM_PLUGINS",)),
)  # fmt: skip

_ENGINE_CLIENT = (
    Seam(_ASYNC, "AsyncLLM.generate", _CLAIM, ("prompt", "sampling_params", "request_id")),
    Seam(_ASYNC, "AsyncLLM.generate", _PROBES, ("priority", "data_parallel_rank")),
    Seam(_ASYNC, "AsyncLLM.encode", _CLAIM),
    Seam(_ASYNC, "AsyncLLM.collective_rpc", _WORKERS, ("method", "args")),
    Seam(_ASYNC, "AsyncLLM.vllm_config", _HTTP),
    Seam(_ASYNC, "AsyncLLM.errored", "an engine that ends while versions are installed"),
    Seam(_ASYNC, "AsyncLLM.pause_generation", _RUNNING, ("mode", "clear_cache")),
    Seam(_ENGINE, "PauseMode", _RUNNING, holds=("abort",)),
    *_of(_ASYNC, "AsyncLLM", _RUNNING, "resume_generation", "is_paused"),
    Seam(_ASYNC, "AsyncLLM.engine_core", _MANY_ENGINES),
    Seam("v1/engine/core_client.py", "AsyncMPClient._call_utility_async", _MANY_ENGINES, ("method", "engine")),
    Seam("v1/engine/core_client.py", "MPClient.core_engines", _MANY_ENGINES),
    Seam("v1/engine/core.py", "EngineCore.collective_rpc", _MANY_ENGINES, ("method", "timeout", "args", "kwargs")),
    Seam("entrypoints/llm.py", "LLM.llm_engine", _OFFLINE),
    Seam("entrypoints/llm.py", "LLM.generate", _OFFLINE, ("prompts", "sampling_params")),
    Seam("entrypoints/llm.py", "LLM.generate", _PROBES, ("use_tqdm",)),
    Seam("entrypoints/llm.py", "LLM.collective_rpc", _OFFLINE, ("method", "args")),
    Seam("v1/engine/llm_engine.py", "LLMEngine.vllm_config", _OFFLINE),
)  # fmt: skip

_REQUESTS = (
    *_of("outputs.py", "RequestOutput", _USAGE, "outputs", "prompt_token_ids", "metrics"),
    *_of("outputs.py", "CompletionOutput", _USAGE, "index", "text", "token_ids", "finish_reason"),
    *_of("v1/metrics/stats.py", "RequestStateStats", _USAGE, "first_token_ts", "last_token_ts", "is_corrupted"),
    Seam(_ENGINE, "FINISH_REASON_STRINGS", _USAGE, holds=("abort", "error")),
    *_of("outputs.py", "CompletionOutput", _SHADOW, "logprobs"),
    *_of("logprobs.py", "Logprob", _SHADOW, "logprob"),
    *_of("sampling_params.py", "SamplingParams", _SHADOW, "logprobs", "seed", "temperature"),
    *_of("sampling_params.py", "SamplingParams", _CLAIM, "extra_args", "clone"),
    *_of("sampling_params.py", "SamplingParams", _PROBES, "max_tokens", "ignore_eos", "detokenize"),
    *_of("sampling_params.py", "SamplingParams", _USAGE, "output_kind"),
    *_of("sampling_params.py", "RequestOutputKind", _USAGE, "DELTA"),
    *_of("inputs/llm.py", "TextPrompt", _SALT, "prompt"),
    *_of("inputs/llm.py", "TokensPrompt", _SALT, "prompt_token_ids"),
    *_of("inputs/llm.py", "EmbedsPrompt", _SALT, "prompt_embeds", "prompt_token_ids"),
    *_of("inputs/llm.py", "_PromptOptions", _SALT, "cache_salt"),
    *_of("inputs/engine.py", "TokensInput", _SALT, "prompt_token_ids"),
    *_of("inputs/engine.py", "EmbedsInput", _SALT, "prompt_embeds", "prompt_token_ids"),
    *_of("inputs/engine.py", "_InputOptions", _SALT, "cache_salt"),
    Seam(_ENGINE, "EngineCoreRequest", _SALT),
)  # fmt: skip

_CONFIGS = (
    *_of(_CONFIG, "VllmConfig", _UNPROVEN, "scheduler_config", "parallel_config", "lora_config", "speculative_config",
         "kv_transfer_config", "cache_config", "compilation_config", "model_config", "weight_transfer_config",
         "quant_config", "load_config", "device_config"),
    *_of(_CONFIG, "VllmConfig", "the settings", "additional_config"),
    *_of(_CONFIG, "VllmConfig", _ENDING, "instance_id"),
    *_of(_PARALLEL, "ParallelConfig", _UNPROVEN, "pipeline_parallel_size", "data_parallel_external_lb",
         "data_parallel_hybrid_lb", "tensor_parallel_size", "enable_expert_parallel", "use_ubatching",
         "prefill_context_parallel_size", "decode_context_parallel_size"),
    *_of(_PARALLEL, "ParallelConfig", _MANY_ENGINES, "data_parallel_size", "data_parallel_index"),
    *_of(_PARALLEL, "ParallelConfig", "several API server processes", "_api_process_rank", "_api_process_count"),
    *_of(_PARALLEL, "ParallelConfig", _WORKERS, "worker_cls"),
    *_of("config/scheduler.py", "SchedulerConfig", _CACHE, "scheduler_cls", "async_scheduling"),
    *_of("config/scheduler.py", "SchedulerConfig", _V2, "max_num_batched_tokens"),
    *_of("config/scheduler.py", "SchedulerConfig", _PROBES, "policy"),
    *_of(_MODEL, "ModelConfig", _PROBES, "max_logprobs", "logprobs_mode", "dtype"),
    *_of("config/speculative.py", "SpeculativeConfig", _UNPROVEN, "method"),
    *_of("config/speculative.py", "SpeculativeConfig", _UNPROVEN, "enable_adaptive_verification", since="0.28"),
    *_of("config/cache.py", "CacheConfig", _UNPROVEN, "kv_sharing_fast_prefill"),
    *_of("config/cache.py", "CacheConfig", _MEMORY, "kv_cache_memory_bytes", "gpu_memory_utilization"),
    *_of("config/compilation.py", "CompilationConfig", _UNPROVEN, "pass_config"),
    *_of("config/compilation.py", "PassConfig", _UNPROVEN, "enable_sp", until="0.32"),
    *_of("config/compilation.py", "CompilationConfig", _COMPILED, "mode", "backend"),
    *_of("config/device.py", "DeviceConfig", _MEMORY, "device"),
    *_of("config/device.py", "DeviceConfig", _GROWTH, "device_type"),
    *_of(_MODEL, "ModelConfig", _FILES, "model", "revision", "model_weights", "hf_config_path", "hf_overrides"),
    *_of(_MODEL, "ModelConfig", _UNPROVEN, "model_impl", "enable_sleep_mode"),
    *_of(_MODEL, "ModelConfig", _MEMORY, "dtype", "max_model_len", "original_max_model_len"),
    *_of(_MODEL, "ModelConfig", "a model that guesses for another", "runner_type"),
    *_of("config/load.py", "LoadConfig", _FILES, "load_format", "ignore_patterns"),
    Seam("model_executor/layers/quantization/base_config.py", "QuantizationConfig.get_name", _UNPROVEN),
)  # fmt: skip

_LOADING = (
    Seam(_LOADERS, "register_model_loader", _FORMAT, ("load_format",)),
    Seam(_LOADERS, "_LOAD_FORMAT_TO_MODEL_LOADER", _FORMAT),
    Seam(_LOADERS, "get_model_loader", _FORMAT, ("load_config",)),
    Seam(_BASE_LOADER, "BaseModelLoader.__init__", _FORMAT, ("load_config",)),
    Seam(_BASE_LOADER, "BaseModelLoader.load_config", _FORMAT),
    Seam(_BASE_LOADER, "BaseModelLoader.load_model", _FORMAT, ("vllm_config", "model_config", "prefix")),
    Seam(_BASE_LOADER, "BaseModelLoader.download_model", _FORMAT, ("model_config",)),
    Seam(_BASE_LOADER, "BaseModelLoader.load_weights", _WEIGHTS, ("model", "model_config")),
    Seam("model_executor/model_loader/default_loader.py", "DefaultModelLoader._prepare_weights", _FILES,
         ("model_name_or_path", "subfolder", "revision", "fall_back_to_pt", "allow_patterns_overrides")),
    Seam("transformers_utils/repo_utils.py", "get_hf_file_to_dict", _FILES, ("file_name", "model", "revision")),
    Seam("utils/import_utils.py", "resolve_obj_by_qualname", _WORKERS, ("qualname",)),
    Seam("forward_context.py", "set_forward_context", _PROOF, ("attn_metadata", "vllm_config", "skip_compiled")),
    Seam("model_executor/models/llama.py", "LlamaForCausalLM.forward", _PROOF,
         ("input_ids", "positions", "intermediate_tensors", "inputs_embeds")),
    Seam("model_executor/models/llama.py", "LlamaForCausalLM.compute_logits", _PROOF, ("hidden_states",)),
    Seam("model_executor/models/llama.py", "LlamaForCausalLM.logits_processor", _LOGITS),
    Seam("model_executor/layers/logits_processor.py", "LogitsProcessor.forward", _LOGITS,
         ("lm_head", "hidden_states")),
    Seam(_ATTENTION, "Attention.forward", _NAN, ("query", "key", "value")),
    Seam(_ATTENTION, "Attention.get_kv_cache_spec", _MEMORY, ("vllm_config",)),
    Seam(_ATTENTION, "Attention.kv_sharing_target_layer_name", _MEMORY),
    Seam("v1/kv_cache_interface.py", "KVCacheSpec.max_memory_usage_bytes", _MEMORY, ("vllm_config",)),
)  # fmt: skip

_LAYERS = (
    *_of(_LINEAR, "RowParallelLinear", _BOUND, "reduce_results", "input_size_per_partition",
         absent="of what sums over no workers"),
    *_of(_LINEAR, "ColumnParallelLinear", _BOUND, "output_size_per_partition", absent="of what divides no output"),
    Seam("distributed/communication_op.py", "tensor_model_parallel_all_reduce", _BOUND, ("input_",)),
    Seam("distributed/parallel_state.py", "get_tensor_model_parallel_rank", _BOUND),
    Seam("distributed/parallel_state.py", "get_tensor_model_parallel_world_size", _BOUND),
    Seam(_LINEAR, "LinearBase.quant_method", _WEIGHTS),
    Seam(_LINEAR, "UnquantizedLinearMethod.create_weights", _WEIGHTS, holds=("weight",)),
    *_of(_LINEAR, "ColumnParallelLinear", _WEIGHTS, "bias"),
    *_of(_LINEAR, "RowParallelLinear", _WEIGHTS, "bias"),
    Seam("model_executor/layers/utils.py", "dispatch_cpu_unquantized_gemm", _CPU_WEIGHTS,
         holds=("cpu_linear", "handler", "packed_weight", "convert_weight_packed")),
    Seam("model_executor/layers/utils.py", "cpu_unquantized_gemm", _CPU_WEIGHTS, holds=("cpu_linear",),
         absent="on a GPU"),
    Seam("_custom_ops.py", "CPUDNNLGEMMHandler.handler_tensor", _CPU_WEIGHTS),
    Seam("_custom_ops.py", "create_onednn_mm", _CPU_WEIGHTS, ("weight", "primitive_cache_size")),
    Seam("_custom_ops.py", "onednn_mm", _CPU_WEIGHTS, ("dnnl_handler", "x", "bias")),
)  # fmt: skip

_RUNNERS = (
    Seam("v1/worker/worker_base.py", "WorkerBase.model_runner", _WORKERS),
    Seam("v1/worker/cpu_model_runner.py", "CPUModelRunner.get_model", _WORKERS),
    Seam("v1/worker/gpu/model_runner.py", "GPUModelRunner.get_model", _WORKERS),
    *_of(_RUNNER, "GPUModelRunner", _V1, "input_batch", "requests", "query_start_loc", "input_ids", "get_model",
         "model"),
    *_of("v1/utils.py", "CpuGpuBuffer", _V1, "np", "gpu"),
    *_of("v1/worker/gpu_input_batch.py", "CachedRequestState", _V1, "req_id", "sampling_params"),
    *_of("v1/worker/gpu_input_batch.py", "CachedRequestState", _PROMPTS, "prompt_embeds", "prompt_is_token_ids"),
    *_of("v1/worker/gpu_input_batch.py", "InputBatch", _V1, "req_ids", "num_reqs", "num_computed_tokens_cpu",
         "num_prompt_tokens"),
    *_of("v1/core/sched/output.py", "NewRequestData", _V2, "req_id", "sampling_params"),
    *_of("v1/core/sched/output.py", "NewRequestData", _PROMPTS, "prompt_token_ids", "prompt_embeds",
         "prompt_is_token_ids"),
    Seam("v1/worker/gpu/model_states/__init__.py", "init_model_state", _V2, holds=("get_model_state_cls",),
         until="0.29", absent="of a model that leaves it to the runner"),
    Seam("v1/worker/gpu/model_states/__init__.py", "resolve_model_state_cls", _V2, holds=("get_model_state_cls",),
         since="0.29", absent="of a model that leaves it to the runner"),
    Seam(_STATE, "DefaultModelState.add_request", _V2, ("req_index", "new_req_data")),
    Seam(_STATE, "DefaultModelState.prepare_inputs", _V2, ("input_batch", "req_states")),
    Seam("v1/worker/gpu/model_states/interface.py", "ModelState.remove_request", _V2, ("req_id",)),
    Seam("v1/worker/gpu/model_states/interface.py", "ModelState.model", _LOGITS),
    Seam("v1/worker/gpu/states.py", "RequestState.req_id_to_index", _V2),
    *_of("v1/worker/gpu/input_batch.py", "InputBatch", _V2, "req_ids", "num_scheduled_tokens",
         "num_computed_tokens_np", "input_ids"),
)  # fmt: skip

_SCHEDULING = (
    Seam(_SCHEDULER, "Scheduler.__init__", _CACHE, ("vllm_config", "block_size", "hash_block_size")),
    Seam("v1/core/sched/async_scheduler.py", "AsyncScheduler", _CACHE),
    Seam(_SCHEDULER, "Scheduler.add_request", _CACHE, ("request",)),
    *_of("v1/request.py", "Request", _CACHE, "_block_hasher", "block_hashes", "update_block_hashes",
         "num_prompt_tokens", "sampling_params"),
    Seam(_SCHEDULER, "Scheduler.update_from_output", _ENDING, ("scheduler_output", "model_runner_output")),
    Seam(_SCHEDULER, "Scheduler.finish_requests", _ENDING, ("request_ids", "finished_status")),
    *_of(_SCHEDULER, "Scheduler", _ENDING, "kv_cache_manager", "requests", "kv_cache_config"),
    *_of("v1/core/sched/output.py", "SchedulerOutput", _ENDING, "num_scheduled_tokens"),
    Seam(_BLOCKS, "KVCacheManager.get_block_ids", _ENDING, ("request_id",)),
    Seam(_BLOCKS, "KVCacheManager.evict_blocks", _ENDING, ("block_ids",)),
    Seam(_BLOCKS, "KVCacheManager.free", _ENDING, ("request",)),
    Seam(_BLOCKS, "KVCacheManager.pop_blocks_for_free", _ENDING, ("request",)),
    Seam(_BLOCKS, "KVCacheManager.block_pool", _ENDING),
    Seam("v1/core/block_pool.py", "BlockPool.null_block", _ENDING),
    Seam("v1/core/kv_cache_utils.py", "KVCacheBlock.block_id", _ENDING),
    Seam("v1/kv_cache_interface.py", "KVCacheConfig.kv_cache_groups", _ENDING),
    Seam("v1/kv_cache_interface.py", "KVCacheGroupSpec.kv_cache_spec", _ENDING),
    Seam("v1/kv_cache_interface.py", "KVCacheSpec.block_size", _ENDING),
    *_of("v1/request.py", "Request", _ENDING, "request_id", "client_index", "get_finished_reason"),
    *_of("v1/request.py", "RequestStatus", _ENDING, "FINISHED_ERROR"),
    *_of(_ENGINE, "EngineCoreOutput", _ENDING, "request_id", "new_token_ids", "finish_reason"),
    *_of(_ENGINE, "EngineCoreOutputs", _ENDING, "outputs"),
)  # fmt: skip

_COMPILING = (
    Seam("compilation/decorators.py", "_support_torch_compile", _GROWTH,
         holds=("aot_compiled_fn", "save_aot_compiled_function", "was_aot_compile_fn_loaded_from_disk",
                "do_not_compile", "torch_aot_compile"), absent="of what vLLM does not compile ahead of time"),
    Seam("compilation/decorators.py", "_model_hash_key", _GROWTH, ("fn",)),
    Seam("compilation/decorators.py", "_verify_source_unchanged", _GROWTH, ("source_info", "vllm_config")),
    Seam("compilation/decorators.py", "maybe_use_cudagraph_partition_wrapper", _GROWTH, ("vllm_config",)),
    Seam("compilation/caching.py", "aot_compile_hash_factors", _GROWTH, ("vllm_config",)),
    Seam("compilation/caching.py", "VllmSerializableFunction.finalize_loading", _GROWTH, ("vllm_config",),
         absent="of code that inductor alone compiled"),
    Seam("compilation/wrapper.py", "TorchCompileWithNoGuardsWrapper.__init__", _GROWTH,
         ("compile_prefix", "is_encoder")),
    *_of("compilation/wrapper.py", "TorchCompileWithNoGuardsWrapper", _GROWTH, "_compile_prefix", "_is_encoder",
         "vllm_config"),
    Seam("config/vllm.py", "set_current_vllm_config", _GROWTH, ("vllm_config",)),
    *_of("config/compilation.py", "CompilationConfig", _GROWTH, "cudagraph_mode", "cache_dir", "local_cache_dir",
         "dynamic_shapes_config"),
    *_of("config/compilation.py", "DynamicShapesConfig", _GROWTH, "evaluate_guards"),
    *_of("config/compilation.py", "CUDAGraphMode", _GROWTH, "NONE"),
    *_of(_PARALLEL, "ParallelConfig", _GROWTH, "rank"),
    Seam("envs.py", "environment_variables", _GROWTH, holds=("VLLM_CACHE_ROOT", "VLLM_DISABLE_COMPILE_CACHE")),
    Seam("distributed/parallel_state.py", "get_tp_group", _GROWTH),
    *_of("distributed/parallel_state.py", "GroupCoordinator", _GROWTH, "cpu_group"),
    *_of("v1/worker/worker_base.py", "WorkerBase", _GROWTH, "vllm_config"),
    Seam("v1/worker/gpu_model_runner.py", "GPUModelRunner.capture_model", _GROWTH),
    Seam("v1/worker/gpu/model_runner.py", "GPUModelRunner.capture_model", _GROWTH),
    Seam("v1/worker/gpu_model_runner.py", "GPUModelRunner.preserve_serving_state", _GROWTH, since="0.32",
         absent="on V2"),
    Seam("v1/worker/gpu/model_runner.py", "GPUModelRunner.cudagraph_manager", _GROWTH, absent="on V1"),
    Seam("v1/worker/gpu/model_runner.py", "GPUModelRunner.speculator", _GROWTH, absent="on V1"),
    Seam("v1/worker/gpu/cudagraph_utils.py", "CudaGraphManager.release_graphs", _GROWTH, since="0.32",
         absent="of other parts of a speculator"),
)  # fmt: skip

SEAMS: tuple[Seam, ...] = (
    *_FRONT_END, *_ENGINE_CLIENT, *_REQUESTS, *_CONFIGS, *_LOADING, *_LAYERS, *_RUNNERS, *_SCHEDULING, *_COMPILING,
)  # fmt: skip

_ROWS = Counter(seam.name for seam in SEAMS)
_OPTIONAL = {
    name for seam in SEAMS if seam.absent or ((seam.since or seam.until) and _ROWS[seam.name] == 1)
    for name in (seam.name, *seam.holds)
}  # fmt: skip
"""Names that some objects or versions lack. Of two rows for one name, each is where some versions have it."""


def optional(owner: Any, name: str, default: Any = None) -> Any:
    """An attribute of an object of vLLM's that may have none, by its name in the table, or the default.

    LookupError for one of which the table does not say so: without it this plugin would go on as if it were off.
    """
    if name not in _OPTIONAL:
        raise LookupError(f"{name}: expected a row of SEAMS with since, until or absent, found none")
    return getattr(owner, name.rpartition(".")[2], default)
