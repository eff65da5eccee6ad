"""Everything of a server but vLLM: middleware, gate and routes around handlers written like vLLM's."""

from __future__ import annotations

import asyncio
import enum
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from tests.support.fakes import FakeWorkers, Server
from vllm_edits.plugin.claim import CLAIM
from vllm_edits.plugin.headers import ADMIN_TOKEN
from vllm_edits.plugin.http.api_key import ApiKeys
from vllm_edits.plugin.http.middleware import VariantMiddleware, record_late
from vllm_edits.plugin.http.routes import router
from vllm_edits.plugin.request import Request as PluginRequest
from vllm_edits.plugin.serving.coordinator import Coordinator
from vllm_edits.plugin.serving.coordinator_socket import CoordinatorServer, FencedWorkers, RemoteCoordinator
from vllm_edits.plugin.serving.lease import CURRENT_LEASE
from vllm_edits.plugin.vllm_host.engine_gate import EngineGate
from vllm_edits.plugin.vllm_host.served_models import ServedModels

PROMPT_TOKENS = 4


TOKEN = {ADMIN_TOKEN: "let-me-in"}


class OutputKind(enum.Enum):
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class Sampling:
    """vLLM's SamplingParams."""

    max_tokens: int
    output_kind: OutputKind
    extra_args: dict[str, Any] | None = None
    logprobs: int | None = None
    seed: int | None = None
    temperature: float = 0.0

    def clone(self) -> Sampling:
        return replace(self)


@dataclass
class Logprob:
    """vLLM's Logprob."""

    logprob: float


@dataclass
class FakeEngine:
    """vLLM's engine client: a token a step, its claim checked on the workers; an abandoned request is aborted.

    After `pause`, all requests together get as many tokens as `step` gives out, until `resume`.
    """

    workers: FakeWorkers
    requests: list[SimpleNamespace] = field(default_factory=list)
    running: int = 0
    aborted: int = 0

    def __post_init__(self) -> None:
        self.pause()
        self.resume()

    def pause(self) -> None:
        self._tokens = asyncio.Semaphore(0)

    def step(self) -> None:
        self._tokens.release()

    def resume(self) -> None:
        for _ in range(1000):
            self._tokens.release()

    async def generate(self, prompt: Any, sampling: Sampling, request_id: str) -> AsyncIterator[Any]:
        self.requests.append(SimpleNamespace(prompt=prompt, extra_args=sampling.extra_args, request_id=request_id))
        self.running += 1
        try:
            for step in range(1, sampling.max_tokens + 1):
                await self._tokens.acquire()
                await asyncio.sleep(0)
                self._check(sampling.extra_args)
                last = step == sampling.max_tokens
                if last or sampling.output_kind is OutputKind.DELTA:
                    steps = [step] if sampling.output_kind is OutputKind.DELTA else range(step)
                    ids = [self.token(number, sampling.extra_args) for number in steps]
                    told = None if sampling.logprobs is None else [{token: Logprob(-token / 8)} for token in ids]
                    completion = SimpleNamespace(
                        index=0, token_ids=ids, text="word", logprobs=told, finish_reason="length" if last else None
                    )
                    yield SimpleNamespace(prompt_token_ids=[0] * PROMPT_TOKENS, outputs=[completion], metrics=None)
        except (asyncio.CancelledError, GeneratorExit):
            self._check(sampling.extra_args)  # until the engine knows, the slot must still be this request's
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    def token(self, step: int, extra_args: dict[str, Any] | None) -> int:
        """Which token comes at that step."""
        return step

    def _check(self, extra_args: dict[str, Any] | None) -> None:
        """What a worker does on each step: raises on a false claim."""
        for worker in self.workers.workers:
            worker.edited.slot_of((extra_args or {}).get(CLAIM))

    def encode(self, prompt: Any) -> str:
        return f"pooled {prompt}"

    @property
    def claims(self) -> list[str | None]:
        """The version of each request so far, None for the base."""
        return [
            request.extra_args[CLAIM][1] if CLAIM in (request.extra_args or {}) else None for request in self.requests
        ]


class Card(BaseModel):
    id: str
    root: str | None = None
    parent: str | None = None


class FakeModels:
    """vLLM's list of served models."""

    def is_base_model(self, name: str | None) -> bool:
        return name in (None, "tiny")

    def model_name(self, lora_request: Any = None) -> str:
        return "tiny"

    async def show_available_models(self) -> Any:
        return SimpleNamespace(data=[Card(id="tiny", root="/models/tiny")])


class Completion(BaseModel):
    """A request body; vLLM's have the same fields among many."""

    model: str | None = None
    prompt: str = "Hello"
    max_tokens: int = 3
    stream: bool = False
    cache_salt: str | None = None
    vllm_xargs: dict[str, Any] | None = None


def with_cancellation(handler: Any) -> Any:
    """vLLM's decorator of that name: the handler is cancelled when the client goes away, and answers null."""

    async def wrapper(body: Completion, raw_request: Request) -> Any:
        async def disconnected() -> None:
            while (await raw_request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(handler(body)), asyncio.create_task(disconnected())]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return tasks[0].result() if tasks[0] in done else None

    return wrapper


class Handlers:
    """Handlers written like vLLM's: they know an engine and a list of models, and nothing of variants."""

    def __init__(self, engine: Any, models: Any) -> None:
        self._engine = engine
        self._models = models
        self._background: set[asyncio.Task[None]] = set()

    def add_to(self, app: FastAPI) -> None:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
            app.post(path)(with_cancellation(self.complete))
        app.post("/v1/pooling")(self.pool)
        app.post("/v1/audio/transcriptions")(self.transcribe)
        app.post("/v1/background")(self.complete_later)
        app.post("/echo")(self.echo)
        app.get("/v1/models")(self.list_models)

    def _outputs(self, body: Completion) -> Any:
        kind = OutputKind.DELTA if body.stream else OutputKind.FINAL_ONLY
        prompt = {"prompt": body.prompt, **({"cache_salt": body.cache_salt} if body.cache_salt else {})}
        return self._engine.generate(prompt, Sampling(body.max_tokens, kind, body.vllm_xargs), "request-1")

    async def _events(self, body: Completion) -> AsyncIterator[str]:
        """Errors are told in the stream, whose status has been sent."""
        try:
            async for output in self._outputs(body):
                if output.outputs[0].finish_reason == "error":
                    yield 'data: {"error": {"code": 500}}\n\n'
                    break
                yield f"data: {output.outputs[0].token_ids}\n\n"
        except (ValueError, RuntimeError) as error:
            yield f"data: {json.dumps({'error': str(error)})}\n\n"
        yield "data: [DONE]\n\n"

    async def complete(self, body: Completion) -> Any:
        if not self._models.is_base_model(body.model):
            return JSONResponse({"error": {"message": "vLLM knows no such model", "code": 404}}, 404)
        if body.prompt == "crash":
            raise RuntimeError("a fault in vLLM")
        if body.prompt == "bad":
            return JSONResponse({"error": {"message": "bad", "code": 400}}, 400)
        if body.stream:
            return StreamingResponse(self._events(body), media_type="text/event-stream")
        try:
            tokens = [output.outputs[0].token_ids async for output in self._outputs(body)][-1]
        except ValueError as error:
            return JSONResponse({"error": {"message": str(error), "code": 400}}, 400)
        if body.prompt == "crash late":
            raise RuntimeError("a fault in vLLM")
        return {"model": self._models.model_name(), "tokens": tokens}

    async def complete_later(self, body: Completion, turns: int = 1) -> Any:
        """A response in the background: it calls the engine after it has answered."""

        async def work() -> None:
            await asyncio.sleep(0.01)
            for _ in range(turns):
                async for _ in self._outputs(body):
                    pass

        self._background.add(asyncio.create_task(work()))
        return {"status": "queued"}

    async def transcribe(self, request: Request) -> Any:
        """Multipart in vLLM: the model's name is not in a JSON body."""
        return await self.complete(Completion(model=request.query_params["model"]))

    async def pool(self, body: Completion) -> Any:
        try:
            return self._engine.encode(body.prompt)
        except ValueError as error:
            return JSONResponse({"error": {"message": str(error), "code": 400}}, 400)

    async def echo(self, request: Request) -> Any:
        return Response(await request.body())

    async def list_models(self) -> Any:
        return [card.model_dump() for card in (await self._models.show_available_models()).data]


class Site:
    """The app with the plugin attached as `vllm_edits.plugin.vllm_host.frontend` attaches it."""

    def __init__(
        self,
        server: Server,
        admin_token_file: Path | None,
        coordinator: Coordinator | None = None,
        keys: Sequence[str] = (),
        handlers: type[Handlers] = Handlers,
    ) -> None:
        self.server = server
        self.keys = ApiKeys(keys, ["tiny"])
        self.engine = FakeEngine(server.workers)
        self.app = FastAPI()
        self.coordinator = coordinator or server.core
        self.app.add_middleware(VariantMiddleware, serving=lambda: (self.coordinator, server.metrics, self.keys))
        token_file = str(admin_token_file) if admin_token_file else None
        self.app.include_router(router(lambda: self.coordinator, lambda: token_file, lambda: self.keys))
        models = ServedModels(FakeModels(), self.coordinator.served)
        gate = EngineGate(
            self.engine,
            self.coordinator.renew,
            lease_of=lambda target: self.coordinator.lease(PluginRequest(target=target)),
            note=self.coordinator.record,
            record_late=partial(record_late, server.metrics),
        )
        self.handlers = handlers(gate, models)
        self.handlers.add_to(self.app)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://server")

    async def ask(self, model: str | None, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        body = {**({"model": model} if model is not None else {}), **options}
        answer = await self.client.post(path, json=body)
        await self.server.core.slots.wait_drained()
        assert CURRENT_LEASE.get() is None
        return answer

    def count(self, variant: str, version: str | None, outcome: str) -> float:
        return self.server.metric("requests_total", variant=variant, version=(version or "")[:12], outcome=outcome)

    def is_quiet(self) -> bool:
        """Nobody is being answered, and no slot is held for anybody."""
        return (
            self.engine.running == 0
            and all(one.users == 0 for one in self.server.residents().values())
            and self.server.status()["base"]["in_flight"] == 0
        )


@asynccontextmanager
async def another_process(server: Server, path: Path) -> AsyncIterator[RemoteCoordinator]:
    """An owner that is asked over its socket, as the other processes of an API server do."""
    listening = CoordinatorServer(path)
    await listening.start(server.core)
    remote = RemoteCoordinator(path, lambda: server.workers.call("edits_fence"))
    await remote.connect()
    server.asked.workers = FencedWorkers(server.workers, listening.fence)
    yield remote
    await remote.close()
    await listening.close()


class Call:
    """One request driven as uvicorn drives it: what was sent can be seen meanwhile, and the client can go away."""

    def __init__(
        self, app: Any, body: dict[str, Any], *, pieces: int = 1, cut: bool = False, path: str = "/v1/completions",
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        data = json.dumps(body).encode()
        size = -(-len(data) // pieces)
        self._body = [data[begin : begin + size] for begin in range(0, len(data), size)]
        self._cut = cut
        if cut:
            self._body.pop()
        self._gone = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        told = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *told], "client": ("127.0.0.1", 1),
            "server": ("server", 80),
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(0), "more_body": self._cut or bool(self._body)}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        if not self._gone.is_set():
            self.sent.append(message)

    def chunks(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message.get("body")]

    def leave(self) -> None:
        self._gone.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.001)
