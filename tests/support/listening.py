"""A site that listens on a port, streams completions as vLLM does, and exports metrics; no engine runs."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import generate_latest

from loadtests.harness.server import free_port
from tests.support.fakes import Answer, Server
from tests.support.site import Completion, Handlers, Site

STEP_SECONDS = 0.001

Poll = Callable[[int, Callable[[], Answer]], Answer]
"""what a worker answers to a poll of its growth, by its number and what it would do"""


class Completions(Handlers):
    """Answers in the form of vLLM's completions: every token is the name of the model that was asked for."""

    tokens = 0

    async def _events(self, body: Completion) -> AsyncIterator[str]:
        async for output in self._outputs(body):
            self.tokens += 1
            choice = {"text": f"{body.model} ", "finish_reason": output.outputs[0].finish_reason}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    async def complete(self, body: Completion) -> Any:
        if body.stream or not self._models.is_base_model(body.model):
            return await super().complete(body)
        outputs = [output async for output in self._outputs(body)]
        self.tokens += body.max_tokens
        text = f"{body.model} " * len(outputs[-1].outputs[0].token_ids)
        return JSONResponse({"choices": [{"text": text, "logprobs": {"top_logprobs": [{f"{body.model} ": 0.0}]}}]})


@asynccontextmanager
async def listening(server: Server) -> AsyncIterator[str]:
    """Serve on a port of this machine; gives the URL. The engine makes a token each millisecond for all requests."""
    site = Site(server, None, handlers=Completions)
    handlers: Any = site.handlers

    @site.app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        ours = generate_latest(server.registry).decode()
        counted = f"# TYPE vllm:generation_tokens counter\nvllm:generation_tokens_total {handlers.tokens}\n"
        return PlainTextResponse(ours + counted)

    async def steps() -> None:
        site.engine.pause()
        while True:
            await asyncio.sleep(STEP_SECONDS)
            site.engine.step()

    port, stepping = free_port(), asyncio.create_task(steps())
    web = uvicorn.Server(uvicorn.Config(site.app, port=port, log_level="error"))
    serving = asyncio.create_task(web.serve())
    while not web.started:  # noqa: ASYNC110  uvicorn has no event for it
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        web.should_exit = True
        await serving
        stepping.cancel()


def counted(server: Server) -> Counter[str]:
    """Requests that a server has counted, by variant."""
    samples = (sample for metric in server.registry.collect() for sample in metric.samples)
    found = Counter[str]()
    for sample in samples:
        if sample.name == "vllm_edits_requests_total":
            found[sample.labels["variant"]] += int(sample.value)
    return found


def compiles_under_load(server: Server, variants: int, seen: Callable[[], bool] = lambda: True) -> Poll:
    """Answers of workers to `edits_grow_poll`: they compile until clients were answered meanwhile, however slow it is.

    That is when each of so many variants, or base model, has ended two requests since `seen` was true for the first
    time: at least the second one began after it.
    """
    before: list[Counter[str]] = []

    def answer(_number: int, act: Callable[[], Answer]) -> Answer:
        now = counted(server)
        if not before and seen():
            before.append(now)
        ended = now - before[0] if before else Counter[str]()
        waits = sum(each >= 2 for each in ended.values()) < variants
        return {"phase": "compiling", "pause": 0.0} if waits else act()

    return answer
