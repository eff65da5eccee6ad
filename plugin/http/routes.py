"""The routes below `/v1/edits`: status, sync, promote, roll back, withdraw.

They are below /v1, so vLLM's own --api-key guards them too. Changes also need the admin token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin import headers
from vllm_edits.plugin.http import admin_token, experiment_routes, probe_routes, reservation_routes
from vllm_edits.plugin.http.api_key import ApiKeys
from vllm_edits.plugin.http.middleware import OURS
from vllm_edits.plugin.http.statuses import status_of
from vllm_edits.plugin.serving.coordinator import Coordinator, TagChange


class Promotion(BaseModel):
    """Body of PUT /v1/edits/{name}."""

    model_config = ConfigDict(extra="forbid")

    version: str = Field(description="version published under this name: its digest, or the first digits")
    tag: str | None = Field(default=None, description="tag to move; the server's default tag if absent")
    reason: str = Field(default="", description="reason, kept in the history")


class Return(BaseModel):
    """Body of POST /v1/edits/{name}/rollback."""

    model_config = ConfigDict(extra="forbid")

    tag: str | None = None
    reason: str = ""


TagQuery = Annotated[str | None, Query(description="tag; the server's default tag if absent")]
ReasonQuery = Annotated[str, Query(description="reason, kept in the history")]


def router(
    coordinator: Callable[[], Coordinator], admin_token_file: Callable[[], str | None], keys: Callable[[], ApiKeys]
) -> APIRouter:
    """The routes. All arguments are called at each request."""

    def key_sent(request: Request) -> None:
        """Require the API key. vLLM requires it too, but not on these routes with some values of --root-path."""
        if not keys().sent(request.scope["headers"]):
            raise HTTPException(401, detail="Unauthorized: send the API key as Authorization: Bearer …")

    routes = APIRouter(prefix=OURS, tags=["edits"], dependencies=[Depends(key_sent)])
    changes = APIRouter(route_class=_needing_token(admin_token_file))

    @routes.get("", summary="Variants, versions, slots, in-flight requests, last swap, last error, store head")
    async def status() -> Any:
        return await coordinator().status()

    experiment_routes.add_to(routes, coordinator)

    @routes.post("/sync", summary="Read the store now and follow new promotions; read the counters of gates")
    async def sync() -> Any:
        return await coordinator().sync()

    async def changed(request: Request, change: TagChange) -> Any:
        actor = f"http:{request.client.host if request.client else 'unknown'}"
        try:
            answer = await coordinator().change(replace(change, actor=actor))
        except EditsError as error:
            raise HTTPException(status_of(error), detail=str(error)) from error
        awaits = answer["swap"] is not None and answer["swap"]["awaits_capacity"]
        return JSONResponse(answer, status_code=202 if awaits else 200)

    @changes.put("/{name}", summary="Promote a version: append to the store, then follow it")
    async def promote(name: str, body: Promotion, request: Request) -> Any:
        return await changed(request, TagChange("promote", name, body.tag, body.version, body.reason))

    @changes.post("/{name}/rollback", summary="Return to the version that was promoted before")
    async def rollback(name: str, body: Return, request: Request) -> Any:
        return await changed(request, TagChange("rollback", name, body.tag, reason=body.reason))

    @changes.delete("/{name}", summary="Withdraw: stop serving the tag; requests for it get a 404")
    async def withdraw(name: str, request: Request, tag: TagQuery = None, reason: ReasonQuery = "") -> Any:
        return await changed(request, TagChange("withdraw", name, tag, reason=reason))

    probe_routes.add_to(changes, coordinator)
    reservation_routes.add_to(routes, changes, coordinator)
    routes.include_router(changes)
    return routes


def _needing_token(admin_token_file: Callable[[], str | None]) -> type[APIRoute]:
    """A route class that checks the admin token before it reads any other part of a request."""

    class NeedingToken(APIRoute):
        def get_route_handler(self) -> Any:
            handler = super().get_route_handler()

            async def authorized(request: Request) -> Any:
                _authorize(request, admin_token_file())
                return await handler(request)

            return authorized

    return NeedingToken


def _authorize(request: Request, token_file: str | None) -> None:
    """HTTPException unless the request has the admin token: 401, or 503 if the token cannot be read."""
    if token_file is None:
        raise HTTPException(
            403,
            detail="changes over HTTP are disabled. Set edits.admin_token_file, or use the command line on the store",
        )
    try:
        allowed = admin_token.matches(token_file, request.headers.get(headers.ADMIN_TOKEN, ""))
    except admin_token.TokenUnreadable as error:
        raise HTTPException(503, detail=f"no change can be authorised now: {error}") from error
    if not allowed:
        raise HTTPException(401, detail=f"missing or wrong admin token. Send it in the header {headers.ADMIN_TOKEN}")
