"""Reads the variant of a request, leases its version for the lifetime of the request, and adds headers to the answer.

It runs in every API server process. It is plain ASGI: streaming is not changed, and the lease's context variable
reaches vLLM's handlers. The body is passed on unchanged. Every POST with a JSON body is read, on any path, so an
unknown name never reaches vLLM. No lease is made for a request without a body, for one that aborts others (it could
wait for them), and for the plugin's own routes (a change of the weights would wait for its own request to end).
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from vllm_edits.edit_store.errors import (
    AmbiguousVersion,
    ArmRefused,
    EditsError,
    NotFound,
    RequestRefused,
    ShadowRefused,
)
from vllm_edits.plugin import headers
from vllm_edits.plugin.experiments.records import Outcome
from vllm_edits.plugin.http.api_key import ApiKeys, KeyMissing
from vllm_edits.plugin.metrics import UNKNOWN, Metrics
from vllm_edits.plugin.request import STRENGTH_ARGUMENT, Request, first, is_json
from vllm_edits.plugin.serving.coordinator import Coordinator
from vllm_edits.plugin.serving.exposures import count, exposure_of
from vllm_edits.plugin.serving.lease import CURRENT_LEASE, Lease, Usage
from vllm_edits.plugin.serving.variants import BASE

AsgiScope = dict[str, Any]
VLLM_ID_HEADER = b"x-request-id"
OURS, _ANTHROPIC_PATH = "/v1/edits", "/v1/messages"
BEAMS = "use_beam_search"


class BeamsRefused(RequestRefused):
    """A beam search on a variant whose edits differ for prompt and answer."""


class VariantMiddleware:
    """The ASGI middleware. `serving` returns the coordinator, the metrics and the API keys."""

    def __init__(self, app: Any, serving: Callable[[], tuple[Coordinator, Metrics, ApiKeys]]) -> None:
        self._app = app
        self._serving = serving

    async def __call__(self, scope: AsgiScope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not is_json(scope["headers"]) or _is_ours(scope):
            await self._app(scope, receive, send)
            return
        coordinator, metrics, keys = self._serving()
        arrived = time.monotonic()
        body, replay = await _buffered(receive)
        if not body or _aborts_requests(_path(scope)):
            await self._app(scope, replay, send)
            return
        request = Request.read(_path(scope), scope["headers"], body, id=uuid.uuid4().hex)
        try:
            if not keys.sent(scope["headers"]):
                keys.require_base(request.model)
                request = Request(request.model, request.strengths, target=BASE)
            lease = await _unless_gone(coordinator.lease(request), receive)
            if lease is not None and lease.choice.info.bound_to_prompt and request.beam_search:
                lease.give_back()
                raise BeamsRefused(
                    f"beam search is not possible with {request.model!r}: its edits differ for prompt and answer, but "
                    f"beam search sends the answer so far as a prompt. Leave out {BEAMS}"
                )
        except EditsError as error:
            metrics.requests.labels(*metrics.labels(UNKNOWN, None), "rejected").inc()
            await _answer_error(_path(scope), error, send)
            return
        if lease is None:
            metrics.requests.labels(*metrics.labels(UNKNOWN, None), "aborted").inc()
            return
        lease.usage.started = arrived
        await self._serve(lease, metrics, _with_id(scope, lease.choice.feedback_token), replay, send)

    async def _serve(self, lease: Lease, metrics: Metrics, scope: AsgiScope, receive: Any, send: Any) -> None:
        status, finished, failed = 0, False, False

        async def receive_until_gone() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect" and not finished:
                lease.usage.aborted = True
            return message

        async def send_with_headers(message: dict[str, Any]) -> None:
            nonlocal status, finished
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_headers(lease, scope)]}
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                finished = True

        token = CURRENT_LEASE.set(lease)
        try:
            with lease.hold():
                await self._app(scope, receive_until_gone, send_with_headers)
        except Exception:
            failed = True
            raise
        finally:
            CURRENT_LEASE.reset(token)
            lease.when_released(partial(self._settle, lease, metrics, 500 if failed else status, finished))

    def _settle(self, lease: Lease, metrics: Metrics, status: int, finished: bool) -> None:
        """Count a request and record its exposure, when it has left the engine."""
        outcome = _outcome(lease.usage, status, finished)
        _record(lease, metrics, outcome)
        reached_engine = lease.usage.engine_requests or outcome != "ok"  # /tokenize does not, and is no exposure
        if lease.choice.assignment is not None and reached_engine:
            exposure = exposure_of(lease.choice, lease.choice.assignment, lease.usage, outcome)
            count(exposure, metrics)
            self._serving()[0].record(exposure)


def record_late(metrics: Metrics, lease: Lease) -> None:
    """Count engine work that outlived its HTTP request as a separate request."""
    _record(lease, metrics, _outcome(lease.usage, 200, finished=True))


def _outcome(usage: Usage, status: int, finished: bool) -> Outcome:
    """The outcome of a request. A request that the engine never saw and that was not refused (a count of tokens) is ok.

    The HTTP status is not enough: a stream may fail after status 200, and the engine may refuse a request.
    """
    if status >= 500 or usage.failed:
        return "error"
    if usage.refused or status >= 400:
        return "rejected"
    return "aborted" if usage.engine_requests and (usage.aborted or not finished) else "ok"


def _record(lease: Lease, metrics: Metrics, outcome: Outcome) -> None:
    """Count a request that has ended, if the engine saw it or it was refused."""
    usage, labels = lease.usage, metrics.labels(lease.choice.variant, lease.choice.version)
    if usage.engine_requests or outcome != "ok":
        metrics.requests.labels(*labels, outcome).inc()
    if not usage.engine_requests or outcome == "rejected":
        return
    metrics.tokens.labels(*labels, "prompt").inc(usage.prompt_tokens)
    metrics.tokens.labels(*labels, "generation").inc(usage.output_tokens)
    metrics.request_seconds.labels(labels[0]).observe(usage.seconds)
    if usage.first_token_seconds is not None:
        metrics.time_to_first_token_seconds.labels(labels[0]).observe(usage.first_token_seconds)
    if usage.seconds_per_token is not None:
        metrics.time_per_output_token_seconds.labels(labels[0]).observe(usage.seconds_per_token)


def _headers(lease: Lease, scope: AsgiScope) -> list[tuple[bytes, bytes]]:
    choice = lease.choice
    said = {headers.VARIANT: choice.variant, headers.VERSION: choice.version or BASE}
    if choice.assignment is not None:
        said[headers.EXPERIMENT] = f"{choice.assignment.experiment}/{choice.assignment.arm}"
        said[headers.REQUEST] = choice.feedback_token
    found = [(name.encode(), value.encode()) for name, value in said.items()]
    if first(scope["headers"], b"origin"):  # a script in a browser sees only exposed headers
        found.append((b"access-control-expose-headers", b", ".join(name for name, _ in found)))
    return found


def _with_id(scope: AsgiScope, feedback_token: str) -> AsgiScope:
    """The request with its feedback token as its id, if it is in an experiment and has no id of its own."""
    if not feedback_token or any(name == VLLM_ID_HEADER for name, _ in scope["headers"]):
        return scope
    return {**scope, "headers": [*scope["headers"], (VLLM_ID_HEADER, feedback_token.encode())]}


def _path(scope: AsgiScope) -> str:
    """The path below --root-path, as in Starlette's router: only whole path segments are removed."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    below = path.removeprefix(root)
    return below if below in ("", path) or below.startswith("/") else path


def _aborts_requests(path: str) -> bool:
    """True for paths that abort other requests. With a lease, they could wait for the requests that they abort."""
    return path == "/inference/v1/abort_requests" or (path.startswith("/v1/responses/") and path.endswith("/cancel"))


def _is_ours(scope: AsgiScope) -> bool:
    return _path(scope) == OURS or _path(scope).startswith(f"{OURS}/")


async def _unless_gone(lease: Coroutine[Any, Any, Lease], receive: Any) -> Lease | None:
    """The lease, or None if the client leaves while it waits for a slot. So no version is installed for a gone client.

    The body has been read, so `receive` can only return the disconnect.
    """
    wanted, gone = asyncio.ensure_future(lease), asyncio.ensure_future(receive())
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        wanted.cancel()
        await asyncio.wait({wanted})
        if not wanted.cancelled() and wanted.exception() is None:
            wanted.result().give_back()  # it came at the last moment
        return None
    finally:
        wanted.cancel()
        gone.cancel()


async def _buffered(receive: Any) -> tuple[bytes, Any]:
    """The whole body, and a `receive` that returns it again and then listens for a disconnect."""
    chunks, more, disconnected = [], True, None
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            disconnected = message
            break
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(chunks)
    pending = [disconnected] if disconnected else [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return pending.pop() if pending else await receive()

    return body, replay


async def _answer_error(path: str, error: EditsError, send: Any) -> None:
    """Send an error in the format of the endpoint: OpenAI's, or Anthropic's below /v1/messages."""
    parameter = "model"
    if isinstance(error, NotFound | AmbiguousVersion):
        status, kind, message = 404, "NotFoundError", str(error)
    elif isinstance(error, RequestRefused):
        parameters = {BeamsRefused: BEAMS, ArmRefused: headers.ARM, ShadowRefused: headers.SHADOW}
        parameter = parameters.get(type(error), STRENGTH_ARGUMENT)
        status, kind, message = 400, "BadRequestError", str(error)
    elif isinstance(error, KeyMissing):
        status, kind, message = 401, "AuthenticationError", str(error)
    else:
        status, kind, message = 503, "ServiceUnavailableError", str(error)
    content: dict[str, Any]
    if path.startswith(_ANTHROPIC_PATH):
        content = {"type": "error", "error": {"type": kind, "message": message}}
    else:
        content = {"error": {"message": message, "type": kind, "param": parameter, "code": status}}
    data = json.dumps(content).encode()
    said = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": said})
    await send({"type": "http.response.body", "body": data})
