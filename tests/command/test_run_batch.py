"""A file of requests: what is refused before a model is loaded, and what is written of each answer."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse

from vllm_edits.edit_store.errors import EditsError, SettingsError
from vllm_edits.plugin.cli import run_batch

pytestmark = pytest.mark.anyio
GOOD: dict[str, Any] = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"model": "polite"}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "custom_id": "é"}) + "\n")
    assert [line.custom_id for line in run_batch.read(path)] == ["1", "é"]
    assert run_batch.read(path)[0] == run_batch.BatchLine("1", "/v1/completions", {"model": "polite"})
    odd = {**GOOD, "body": {"prompt": "a\u2028b\u0085c"}}
    path.write_text(json.dumps(odd, ensure_ascii=False) + "\r\n")
    assert run_batch.read(path)[0].body == odd["body"], "these end no line of JSON"


def test_every_bad_line_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    bad = [
        "{", "[1]", json.dumps({**GOOD, "custom_id": 1}), json.dumps({**GOOD, "method": "GET"}),
        json.dumps({**GOOD, "url": "v1"}), json.dumps({**GOOD, "body": []}), json.dumps(GOOD),
        json.dumps({**GOOD, "custom_id": "2", "body": {"stream": True}}), "[" * 100_000,
        *(json.dumps({**GOOD, "url": url}) for url in ("/v1/x\n", "/v1/\ud83d", "/v1/completions/", "/", "/a b")),
    ]  # fmt: skip
    path.write_text("\n".join([json.dumps(GOOD), *bad]))
    with pytest.raises(SettingsError) as error:
        run_batch.read(path)
    said = str(error.value).splitlines()
    assert len(said) == 1 + len(bad)
    reasons = ["not JSON", "expected an object", "string as custom_id, found 1", "found GET", "found POST 'v1'",
               "an object as body", "is used in an earlier line", "Leave it out", "not JSON",
               *["expected POST to a path"] * 5]  # fmt: skip
    for number, reason in enumerate(reasons, 2):
        assert any(line.startswith(f"  line {number}: ") and reason in line for line in said), (number, said)
    path.write_text("{\n" * 100)
    with pytest.raises(SettingsError, match="and 80 more"):
        run_batch.read(path)


@pytest.mark.parametrize("contents", [b"", b"\n\n", b"\xff", None])
def test_a_file_without_requests_is_refused(tmp_path: Path, contents: bytes | None) -> None:
    path = tmp_path / "in.jsonl"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(SettingsError, match=r"contains no requests|cannot be read"):
        run_batch.read(path)


async def test_answers_are_written_as_they_come_with_the_version_and_what_failed(tmp_path: Path) -> None:
    app, running, most = FastAPI(), 0, 0

    @app.post("/v1/completions")
    async def complete(body: dict[str, Any]) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        if body["model"] == "absent":
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        return JSONResponse({"said": body["model"]}, headers={"x-edits-version": "abc", "x-request-id": "r"})

    @app.post("/silent")
    async def silent() -> Any:
        return JSONResponse({"error": None}, 503)

    @app.post("/moved")
    async def moved() -> Any:
        return RedirectResponse("/odd", 307)

    @app.post("/odd")
    async def odd() -> Any:
        return PlainTextResponse("no JSON")

    path = str(tmp_path / "socket")
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    serving = asyncio.create_task(server.serve([listening]))
    while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
        await asyncio.sleep(0.01)
    lines = [run_batch.BatchLine(str(number), "/v1/completions", {"model": "polite"}) for number in range(8)]
    lines += [run_batch.BatchLine("bad", "/v1/completions", {"model": "absent"}),
              run_batch.BatchLine("odd", "/odd", {}),
              run_batch.BatchLine("strange", "/odd", {"prompt": "\ud83d", "temperature": float("nan")}),
              run_batch.BatchLine("moved", "/moved", {}), run_batch.BatchLine("silent", "/silent", {})]  # fmt: skip
    out, seen = io.StringIO(), 0

    def progress() -> None:
        nonlocal seen
        seen += 1
        assert len(out.getvalue().splitlines()) == seen

    failed = await run_batch.answer(path, lines, out, at_once=3, progress=progress)
    server.should_exit = True
    await serving
    listening.close()
    answers = {said["custom_id"]: said for said in map(json.loads, out.getvalue().splitlines())}
    assert (failed, seen, most, len(answers)) == (3, 13, 3, 13)
    assert answers["0"]["response"] == {"status_code": 200, "request_id": "r", "body": {"said": "polite"}}
    assert (answers["0"]["edits"], answers["0"]["error"]) == ({"version": "abc"}, None)
    assert (answers["bad"]["response"]["status_code"], answers["bad"]["error"]) == (404, {"message": "no such model"})
    assert answers["odd"]["response"]["body"] == answers["strange"]["response"]["body"] == {"text": "no JSON"}
    assert (answers["strange"]["error"], answers["moved"]["response"]["status_code"]) == (None, 307)
    assert answers["moved"]["error"] is not None, "a server that sends elsewhere has answered nothing"
    assert answers["silent"]["error"] == {"error": None}, "what failed is never told as answered"


async def test_a_request_that_nobody_answers_is_told() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("nobody listens")

    async with httpx.AsyncClient(transport=httpx.MockTransport(refuse), base_url="http://server") as client:
        said = await run_batch._answered(client, run_batch.BatchLine("1", "/v1/completions", {}), {})
    assert (said["response"], said["error"]["code"]) == (None, "no_answer")
    assert "nobody listens" in said["error"]["message"]


def test_a_server_that_ends_is_told() -> None:
    with (
        pytest.raises(EditsError, match="ended during its start, with code 3"),
        run_batch.server(["sh", "-c", "exit 3"], {}),
    ):
        pass
