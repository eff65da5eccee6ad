"""`/v1/edits`: what is served, look at the store now, promote, roll back, withdraw.

Below /v1, so vLLM's own --api-key guards it too. Changes need the admin token besides; without one they are refused.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from edit_store.errors import AmbiguousVersion, BundleRefused, Conflict, EditsError, NotFound
from edit_store.trust import Enforcement
from plugin.http.middleware import OURS
from plugin.reconcile import Reconciler

ADMIN_TOKEN_HEADER = "x-edits-admin-token"  # noqa: S105  a header's name, not a secret
_STATUS = {NotFound: 404, AmbiguousVersion: 409, Conflict: 409, BundleRefused: 422}


class Promotion(BaseModel):
    """Body of PUT /v1/edits/{name}."""

    model_config = ConfigDict(extra="forbid")

    version: str = Field(description="digest or its beginning, of a version published under this name")
    tag: str | None = Field(default=None, description="tag to move; the server's default tag if absent")
    reason: str = Field(default="", description="why, for the history")


class Return(BaseModel):
    """Body of POST /v1/edits/{name}/rollback."""

    model_config = ConfigDict(extra="forbid")

    tag: str | None = None
    reason: str = ""


TagQuery = Annotated[str | None, Query(description="tag; the server's default tag if absent")]
ReasonQuery = Annotated[str, Query(description="why, for the history")]


def router(reconciler: Callable[[], Reconciler], admin_token_file: Callable[[], str | None]) -> APIRouter:
    """The routes; both arguments are asked at each request."""
    routes = APIRouter(prefix=OURS, tags=["edits"])

    @routes.get("", summary="Variants, versions, slots, in-flight requests, last swap, last error, store head")
    async def status() -> Any:
        return reconciler().status()

    @routes.post("/sync", summary="Read the store now and follow what moved; count what gates did")
    async def sync() -> Any:
        core = reconciler()
        swaps = await core.sync(retry_refused=True)
        await core.read_firings()
        return {"swaps": [asdict(swap) for swap in swaps], "last_error": core.last_error}

    @routes.put("/{name}", summary="Promote a version: append to the store, then follow it")
    async def promote(name: str, body: Promotion, request: Request) -> Any:
        core = reconciler()
        tag = body.tag or core.table.default_tag
        actor = _authorized(request, admin_token_file())
        reference = f"{name}@{body.version}"
        return await _changed(
            core, lambda: core.reader.store.promote(reference, tag=tag, reason=body.reason, actor=actor)
        )

    @routes.post("/{name}/rollback", summary="Return to the version promoted before")
    async def rollback(name: str, body: Return, request: Request) -> Any:
        core = reconciler()
        tag = body.tag or core.table.default_tag
        actor = _authorized(request, admin_token_file())
        return await _changed(core, lambda: core.reader.store.rollback(name, tag=tag, reason=body.reason, actor=actor))

    @routes.delete("/{name}", summary="Withdraw: the tag promotes nothing any more, and requests for it are not found")
    async def withdraw(name: str, request: Request, tag: TagQuery = None, reason: ReasonQuery = "") -> Any:
        core = reconciler()
        moved = tag or core.table.default_tag
        actor = _authorized(request, admin_token_file())
        return await _changed(core, lambda: core.reader.store.withdraw(name, tag=moved, reason=reason, actor=actor))

    return routes


async def _changed(core: Reconciler, change: Callable[[], Any]) -> Any:
    """Append to the store, follow it at once, and answer with the entry and the swap."""
    if core.reader.trust.enforcement is Enforcement.REQUIRE and not core.reader.store.signs:
        raise HTTPException(
            403,
            detail="promotions must be signed, and this server has no key: set edits.signing_key_file, or use "
            "`vllm-edits promote --key` on the store",
        )
    try:
        entry = await asyncio.to_thread(change)
    except EditsError as error:
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 503)
        raise HTTPException(status, detail=str(error)) from error
    swaps = await core.sync(retry_refused=True)
    swap = next((swap for swap in swaps if (swap.variant, swap.tag) == (entry.name, entry.tag)), None)
    if swap is not None and swap.error:
        raise HTTPException(422, detail=f"promoted in the store, but this server keeps the old version: {swap.error}")
    return {"entry": entry.model_dump(mode="json"), "swap": asdict(swap) if swap else None}


def _authorized(request: Request, token_file: str | None) -> str:
    """Who changes; HTTPException unless the admin token came with the request."""
    if token_file is None:
        raise HTTPException(
            403, detail="changes over HTTP are off: set edits.admin_token_file, or use the command line on the store"
        )
    expected = Path(token_file).read_text().strip()
    sent = request.headers.get(ADMIN_TOKEN_HEADER, "")
    if not expected or not hmac.compare_digest(sent.encode(), expected.encode()):
        raise HTTPException(401, detail=f"send the admin token in the header {ADMIN_TOKEN_HEADER}")
    return f"http:{request.client.host if request.client else 'unknown'}"
