"""The routes `/v1/edits/experiments` (state of experiments) and `/v1/edits/feedback` (feedback from clients).

Feedback comes from clients, so it needs vLLM's --api-key, as any request, and no admin token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from vllm_edits.edit_store.errors import FeedbackRefused, NotFound
from vllm_edits.plugin.serving.coordinator import Coordinator


class FeedbackBody(BaseModel):
    """Body of POST /v1/edits/feedback."""

    model_config = ConfigDict(extra="forbid")

    request_id: str = Field(description="the `id` of an answer, or its header x-edits-request")
    metric: str = Field(description="a feedback metric of the experiment's document")
    value: float = Field(allow_inf_nan=False)


def add_to(routes: APIRouter, coordinator: Callable[[], Coordinator]) -> None:
    """Add the routes. `coordinator` is called at each request."""

    @routes.get("/experiments", summary="State of the experiments on this server: arms, coverage, guardrails")
    async def experiments() -> Any:
        return (await coordinator().status())["experiments"]

    @routes.post("/feedback", summary="Send feedback on a request of an experiment; sending the same again is harmless")
    async def feedback(body: FeedbackBody) -> Any:
        try:
            return await coordinator().feedback(body.request_id, body.metric, body.value)
        except NotFound as error:
            raise HTTPException(404, detail=str(error)) from error
        except FeedbackRefused as error:
            raise HTTPException(422, detail=str(error)) from error
