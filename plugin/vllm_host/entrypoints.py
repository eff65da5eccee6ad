"""What vLLM loads by entry point: `register` in every process, `endpoint_plugin` in the API server."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Register the load format `edits`. vLLM may call this several times; nothing else happens until it is used."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    from vllm_edits.plugin.vllm_host.compat import LOAD_FORMAT
    from vllm_edits.plugin.vllm_host.loader import EditsModelLoader

    if _LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT) is not EditsModelLoader:
        register_model_loader(LOAD_FORMAT)(EditsModelLoader)


def endpoint_plugin() -> Any:
    """The HTTP side."""
    from vllm_edits.plugin.vllm_host.frontend import EditsEndpoints

    return EditsEndpoints()
