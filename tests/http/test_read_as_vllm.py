"""The model that the middleware reads in a request is the one that vLLM's own handlers see, whatever bytes arrive.

vLLM's real application is built, with SageMaker's endpoint, its pydantic models and its error handlers; only what
stands behind the handlers is replaced, by something that writes down the name it was given.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.middleware import Middleware
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.serve import create_error_response
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_edits.plugin import request as plugin_request
from vllm_edits.plugin.http.api_key import ApiKeys
from vllm_edits.plugin.http.middleware import VariantMiddleware
from vllm_edits.plugin.metrics import Metrics
from vllm_edits.plugin.request import Request
from vllm_edits.plugin.serving.lease import CURRENT_LEASE, Lease
from vllm_edits.plugin.serving.variants import BASE, Choice
from vllm_edits.plugin.vllm_host.served_models import ServedModels

pytestmark = pytest.mark.anyio
BASE_NAME, NAMES = "tiny", ("capital", "polite@staging", "büro/größe")
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
    "/v1/responses": {"input": "Hello"},
    "/inference/v1/generate": {"token_ids": [1, 2], "sampling_params": {}},
    "/tokenize": {"prompt": "Hello"},
    "/invocations": {"prompt": "Hello"},
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Seen:
    """What one request came to: the name that vLLM's handler was given, and the one that was leased for it."""

    model: str | None
    leased: str


@dataclass
class Recorder:
    """Stands behind every handler of vLLM."""

    seen: list[Seen] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        async def handle(request: Any, *_: Any) -> Any:
            lease = CURRENT_LEASE.get()
            self.seen.append(Seen(request.model, lease.choice.requested if lease is not None else ""))
            return create_error_response("seen")

        return handle


class EveryName:
    """An owner of slots that has a variant for every name."""

    async def lease(self, request: Request) -> Lease:
        model = request.model
        version = None if model in ("", BASE_NAME) else "a" * 64
        return Lease(Choice(model or BASE_NAME, BASE if version is None else model, version), 0, lambda _: None)


@dataclass
class VLLM:
    """vLLM's application with the middleware in its place, innermost."""

    recorder: Recorder
    client: httpx.AsyncClient
    metrics: Metrics

    async def post(self, path: str, content: bytes, headers: Any, worst: int = 499) -> tuple[int, Seen | None]:
        """The status, at worst that, and what vLLM's handler saw, None where it was not reached."""
        self.recorder.seen.clear()
        answer = await self.client.post(path, content=content, headers=headers)
        assert answer.status_code <= worst, answer.text
        return answer.status_code, self.recorder.seen[0] if self.recorder.seen else None


@pytest.fixture(scope="module")
async def vllm() -> AsyncIterator[VLLM]:
    level = logging.root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "")
        app = build_app(
            make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out"]), ("generate",), None
        )
    logging.root.setLevel(level)  # SageMaker's package silences everything below an error
    recorder, metrics = Recorder(), Metrics()
    for name in ("openai_serving_completion", "openai_serving_chat", "openai_serving_responses", "serving_tokens",
                 "anthropic_serving_messages", "serving_tokenization"):  # fmt: skip
        setattr(app.state, name, recorder)
    app.state.openai_serving_models, app.state.enable_server_load_tracking = SimpleNamespace(), False
    serving = EveryName(), metrics, ApiKeys((), ())
    app.user_middleware.append(Middleware(VariantMiddleware, serving=lambda: serving))
    app.middleware_stack = app.build_middleware_stack()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield VLLM(recorder, client, metrics)


def same(seen: Seen | None) -> bool:
    """Whether vLLM goes on with the name that was leased; None of a request that vLLM refused."""
    return seen is None or (seen.model or BASE_NAME).encode(errors="backslashreplace").decode() == seen.leased


JSON = {"content-type": "application/json"}


def encoded(text: str) -> list[bytes]:
    """A body in each form of Unicode that json.loads knows."""
    return [text.encode(form) for form in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32",
                                           "utf-32-le", "utf-32-be")]  # fmt: skip


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/invocations"])
@pytest.mark.parametrize("name", NAMES)
async def test_every_form_of_json_names_the_variant_to_both(vllm: VLLM, path: str, name: str) -> None:
    body = {**BODIES[path], "model": name}
    plain, loose = json.dumps(body), json.dumps(body, ensure_ascii=False)
    odd = [plain[:-1] + f', "vllm_xargs": null, "x": {value}}}' for value in
           ("NaN", "Infinity", "-Infinity", "1e999", '"\\ud83d"', "1" * 4000)]  # fmt: skip
    contents = [*encoded(loose), *encoded(odd[0]), plain.encode(), *(each.encode() for each in odd),
                plain.replace('"model"', '"mod\\u0065l"').encode(),
                f'{{"model": "other", {plain[1:]}'.encode()]  # fmt: skip
    for content in contents:
        for kind in (JSON, {"content-type": "application/json; charset=utf-16"}):
            _, seen = await vllm.post(path, content, kind)
            assert seen == Seen(name, name), content[:80]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("depth", [900, 3_000, 200_000])
async def test_what_is_nested_too_deep_is_vllms_to_refuse(vllm: VLLM, path: str, depth: int) -> None:
    body = json.dumps({**BODIES[path], "model": "capital"})[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}"
    status, seen = await vllm.post(path, body.encode(), JSON, worst=500 if path == "/invocations" else 499)
    assert seen is None or path == "/invocations" or same(seen)
    assert status >= 400


@pytest.mark.parametrize(
    ("header", "named", "leased"),
    [
        ("capital", BASE_NAME, "capital"),
        ("capital", None, "capital"),
        ("capital", "polite", "capital"),
        (BASE_NAME, "capital", BASE_NAME),
        (None, "capital", "capital"),
        ("", "capital", "capital"),
        (None, None, BASE_NAME),
        (None, BASE_NAME, BASE_NAME),
    ],
)
async def test_sagemakers_header_and_the_body_mean_one_model(
    vllm: VLLM, header: str | None, named: str | None, leased: str
) -> None:
    """The header wins, as it does in vLLM; without one the body's name is served, which vLLM alone overlooks."""
    body = {**BODIES["/invocations"], **({"model": named} if named is not None else {})}
    headers = {**JSON, **({"X-Amzn-SageMaker-Adapter-Identifier": header} if header is not None else {})}
    _, seen = await vllm.post("/invocations", json.dumps(body).encode(), headers)
    assert seen is not None
    assert seen.leased == leased
    assert seen.model in (header, None)
    _, elsewhere = await vllm.post("/v1/completions", json.dumps(body).encode(), headers)
    assert elsewhere == Seen(named, named or BASE_NAME)


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["\ud83d", "\x00"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
models = st.one_of(st.sampled_from([*NAMES, BASE_NAME, ""]), st.text(max_size=12), values)
kinds = st.sampled_from(
    ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/problem+json",
     "application/json;charset=utf-16", "text/plain", "text/json", "", "multipart/form-data; boundary=json"]
)  # fmt: skip


@st.composite
def contents(draw: Any, path: str) -> bytes:
    """A body: fields in any order, some twice, keys spelled in escapes, any encoding, now and then cut or flipped."""
    often = st.sampled_from([True] * 5 + [False])
    fields = [*BODIES[path].items()] if draw(often) else []
    named = draw(st.lists(st.tuples(st.just("model"), st.sampled_from(NAMES) if draw(often) else models), max_size=3))
    more = draw(st.lists(st.tuples(st.sampled_from(["user", "x", "stream", "vllm_xargs", "Model", "model "]), values),
                         max_size=2))  # fmt: skip
    parts = []
    for key, value in draw(st.permutations([*fields, *named, *more])):
        spelled = json.dumps(key)
        if draw(st.integers(0, 5)) == 0 and key:
            spelled = f'"\\u{ord(key[0]):04x}{spelled[2:]}'
        parts.append(f"{spelled}: {json.dumps(value, ensure_ascii=draw(st.booleans()))}")
    text = "{" + ", ".join(parts) + "}"
    text = draw(st.sampled_from(["", " ", "\ufeff"])) + text + draw(st.sampled_from(["", "", "\r\n", "x", "\x00"]))
    form = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1"]))
    body = text.encode(form, "surrogatepass" if form != "latin-1" else "replace")
    if draw(st.integers(0, 9)) == 0 and body:
        at = draw(st.integers(0, len(body) - 1))
        body = body[:at] + bytes([draw(st.integers(0, 255))]) + body[at + draw(st.integers(0, 2)) :]
    return body


headers_sent = st.lists(
    st.tuples(st.sampled_from(["X-Amzn-SageMaker-Adapter-Identifier", "x-amzn-sagemaker-adapter-identifier"]),
              st.sampled_from([*NAMES[:2], BASE_NAME, "", "ä"])), max_size=2,
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("path", BODIES)
async def test_no_bytes_make_the_two_read_different_names(vllm: VLLM, path: str) -> None:
    reached, named = 0, 0

    @settings(max_examples=500)
    @given(contents(path), st.just("application/json") | kinds, headers_sent)
    async def differ(content: bytes, kind: str, sent: list[tuple[str, str]]) -> None:
        nonlocal reached, named
        headers = [*((name, value.encode("latin-1")) for name, value in sent), ("content-type", kind)]
        _, seen = await vllm.post(path, content, headers)
        if seen is not None:
            reached += 1
            named += seen.leased != BASE_NAME
            if path == "/invocations" and not (sent and sent[0][1]):
                return  # vLLM overlooks the body's name there; the lease goes by it
            assert same(seen), seen

    inner = differ.hypothesis.inner_test  # type: ignore[attr-defined]
    await _run(differ, inner)
    assert min(reached, named) > 10, "hardly any of these requests reached a handler"


async def _run(test: Any, inner: Any) -> None:
    """Run a hypothesis test whose body is asynchronous, in the loop of the client's."""
    loop = asyncio.get_running_loop()

    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run_coroutine_threadsafe(inner(*args, **kwargs), loop).result()

    test.hypothesis.inner_test = run
    await asyncio.to_thread(test)


async def test_the_check_sees_a_middleware_that_reads_otherwise(vllm: VLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with a strict reader alone, one NaN is enough."""
    monkeypatch.setattr(plugin_request, "json", SimpleNamespace(loads=msgspec.json.decode))
    _, seen = await vllm.post("/v1/completions", b'{"model": "capital", "prompt": "Hello", "x": NaN}', JSON)
    assert seen == Seen("capital", BASE_NAME)
    assert not same(seen)


async def test_models_are_served_by_the_name_they_were_leased_under() -> None:
    """Should vLLM ever read another name than the middleware, it is told that there is no such model."""

    class Base:
        def is_base_model(self, name: str) -> bool:
            return name == BASE_NAME

    models = ServedModels(Base(), SimpleNamespace())  # type: ignore[arg-type]
    for requested, known in (("capital", {"capital"}), (BASE_NAME, {BASE_NAME})):
        token = CURRENT_LEASE.set(Lease(Choice(requested, requested, None), 0, lambda _: None))
        assert {name for name in ("capital", "other", BASE_NAME) if models.is_base_model(name)} == known
        CURRENT_LEASE.reset(token)
    assert models.is_base_model(BASE_NAME)
    assert not models.is_base_model("capital")
