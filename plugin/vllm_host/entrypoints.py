"""Entry points for vLLM: `register` for every process, `endpoint_plugin` for the API server."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Register the load format `edits`. vLLM may call it several times. It has no other effect."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    from vllm_edits.plugin.vllm_host.compat import LOAD_FORMAT
    from vllm_edits.plugin.vllm_host.loader import EditsModelLoader

    if _LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT) is not EditsModelLoader:
        register_model_loader(LOAD_FORMAT)(EditsModelLoader)


def endpoint_plugin() -> Any:
    """Make the endpoint plugin: the HTTP side."""
    from vllm_edits.plugin.vllm_host.frontend import EditsEndpoints

    return EditsEndpoints()
