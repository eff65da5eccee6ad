"""The model list for clients: the base model and every variant. Runs in the API process.

It replaces vLLM's own list in every handler. A variant's name is accepted only from a request with a lease on it. So a
path that the middleware does not cover answers with a 404, not with the base model.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from vllm_edits.plugin.serving.coordinator import Served
from vllm_edits.plugin.serving.lease import CURRENT_LEASE


class ServedModels:
    """vLLM's list of served models, extended with the variants in `served`."""

    def __init__(self, models: Any, served: Callable[[], Awaitable[Served]]) -> None:
        self._models = models
        self._served = served

    def __getattr__(self, name: str) -> Any:
        return getattr(self._models, name)

    def is_base_model(self, model_name: str) -> bool:
        """True if vLLM may continue with a request for this name.

        With a lease on a variant, the name must be the leased name. If vLLM reads another name in the request than the
        middleware, it answers with a 404, not with the wrong model.
        """
        lease = CURRENT_LEASE.get()
        if lease is None or self._models.is_base_model(lease.choice.requested):
            return bool(self._models.is_base_model(model_name))
        return lease.choice.requested == model_name

    def model_name(self, lora_request: Any = None) -> str:
        """The model name in answers: the name that the client requested."""
        lease = CURRENT_LEASE.get()
        if lora_request is None and lease is not None and not self._models.is_base_model(lease.choice.requested):
            return lease.choice.requested
        return str(self._models.model_name(lora_request))

    async def show_available_models(self) -> Any:
        """The answer of `GET /v1/models`: base models, then variants with `root` (version) and `parent` (base)."""
        listed = await self._models.show_available_models()
        base, served = listed.data[0], await self._served()
        if not served.base:
            listed.data.clear()
        for name, variant, version in served.variants:
            card = {"id": name, "root": f"{variant}@{version}", "parent": base.id}
            listed.data.append(base.model_copy(update=card))
        listed.data += [base.model_copy(update={"id": name, "parent": base.id}) for name in served.experiments]
        return listed
