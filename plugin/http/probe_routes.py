"""The route `/v1/edits/{name}/probe`: probes a variant that is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.http.statuses import status_of
from vllm_edits.plugin.serving.coordinator import Coordinator


def add_to(changes: APIRouter, coordinator: Callable[[], Coordinator]) -> None:
    """Add the route. changes: routes that need the admin token. `coordinator` is called at each request."""

    @changes.post("/{name}/probe", summary="Probe a variant now; with failing figures it gets no request any more")
    async def probe(
        name: str, tag: Annotated[str | None, Query(description="tag; the server's default tag if absent")] = None
    ) -> Any:
        try:
            return await coordinator().probe(name if tag is None else f"{name}@{tag}")
        except EditsError as error:
            raise HTTPException(status_of(error), detail=str(error)) from error
