"""The routes `/v1/edits/reservation`: what is reserved, and growth ahead of a promotion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.http.statuses import status_of
from vllm_edits.plugin.serving.coordinator import CapacityWish, Coordinator


class GrowthBody(BaseModel):
    """Body of POST /v1/edits/reservation."""

    model_config = ConfigDict(extra="forbid")

    versions: list[str] = Field(default=[], description="versions to make capacity for: name, name@tag or name@version")
    reserve: list[str | dict[str, Any]] = Field(
        default=[], description="profiles (standard, all) and entries, as in the setting `reserve`"
    )
    scopes: int = Field(default=0, ge=0, le=64, description="largest number of scopes in one version")


def add_to(routes: APIRouter, changes: APIRouter, coordinator: Callable[[], Coordinator]) -> None:
    """Add the routes. changes: routes that need the admin token. `coordinator` is called at each request."""

    @routes.get("/reservation", summary="What is reserved, and the last growth: phase, seconds, longest pause")
    async def reservation() -> Any:
        return (await coordinator().status())["reservation"]

    @changes.post("/reservation", summary="Grow for versions or entries, while the server serves; 200 if they fit")
    async def grow(body: GrowthBody) -> Any:
        try:
            answer = await coordinator().grow(CapacityWish(body.versions, body.reserve, body.scopes))
        except EditsError as error:
            raise HTTPException(status_of(error), detail=str(error)) from error
        return JSONResponse(answer, status_code=202 if answer["growing"] else 200)
