"""Answers the requests of a file with a server that runs only for this: `vllm-edits run-batch`.

The file has OpenAI's batch format, with one JSON object per line: `custom_id`, `url`, `body`. The server is an ordinary
server on a Unix socket. So every endpoint, variant, experiment and header works as over the network.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import httpx

from vllm_edits.edit_store.errors import EditsError, SettingsError

SHOWN, _OURS = 20, "x-edits-"
_PATH = re.compile(r"(/[!-.0-~]+)+")
"""Pattern of a URL: ASCII, without spaces, and without a slash at the end, which a server would redirect."""
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class BatchLine:
    """A request in the file."""

    custom_id: str
    url: str
    body: Mapping[str, Any]


def read(path: Path) -> list[BatchLine]:
    """Read every request of a file. SettingsError lists the invalid lines."""
    try:
        texts = path.read_text().split("\n")  # splitlines would also split at characters that JSON strings may contain
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    found, wrong, seen = list[BatchLine](), list[str](), set[str]()
    for number, text in enumerate(texts, 1):
        if text.strip():
            line, why = _line(text)
            if line is not None and line.custom_id in seen:
                why = f"custom_id {line.custom_id!r} is used in an earlier line"
            if why or line is None:
                wrong.append(f"  line {number}: {why}")
            else:
                seen.add(line.custom_id)
                found.append(line)
    if wrong:
        more = [f"  and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise SettingsError("\n".join([f"{path} is not a valid file of requests:", *wrong[:SHOWN], *more]))
    if not found:
        raise SettingsError(
            f"{path} contains no requests: expected one JSON object per line, with custom_id, url and body"
        )
    return found


def _line(text: str) -> tuple[BatchLine | None, str]:
    """The request in a line, or the reason why the line is invalid."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    if not isinstance(said, dict):
        return None, "expected an object with custom_id, url and body"
    custom_id, url, body = said.get("custom_id"), said.get("url"), said.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return None, f"expected a non-empty string as custom_id, found {custom_id!r}"
    if said.get("method", "POST") != "POST" or not isinstance(url, str) or not _PATH.fullmatch(url):
        return None, f"expected POST to a path such as /v1/chat/completions, found {said.get('method', 'POST')} {url!r}"
    if not isinstance(body, dict):
        return None, f"expected an object as body, found {body!r:.40}"
    if body.get("stream"):
        return None, "stream is not possible in a batch. Leave it out"
    return BatchLine(custom_id, url, body), ""


@contextmanager
def server(command: Sequence[str], environment: Mapping[str, str], log: TextIO | None = None) -> Any:
    """Start a server on its own socket; yields the socket's path. EditsError if the server ends during its start."""
    with tempfile.TemporaryDirectory(prefix="vllm-edits-batch-") as folder:
        path = f"{folder}/server.sock"
        process = subprocess.Popen([*command, "--uds", path], env=dict(environment), stdout=log, stderr=log)
        try:
            _wait(process, path)
            yield path
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def _wait(process: subprocess.Popen[Any], path: str) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://server") as client:
        while True:
            with suppress(httpx.HTTPError):
                if Path(path).exists() and client.get("/health", timeout=5).status_code == httpx.codes.OK:
                    return
            try:
                raise EditsError(
                    f"the server ended during its start, with code {process.wait(_LOOK_SECONDS)}. See its output"
                )
            except subprocess.TimeoutExpired:
                continue


async def answer(
    path: str, lines: Sequence[BatchLine], out: TextIO, *, at_once: int, api_key: str = "",
    progress: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """Send every request and write each answer when it arrives; returns the number of failed requests."""
    free, failed = asyncio.Semaphore(at_once), 0
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    transport = httpx.AsyncHTTPTransport(uds=path, limits=httpx.Limits(max_connections=None))
    async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=None) as client:  # noqa: S113

        async def ask(line: BatchLine) -> None:
            nonlocal failed
            async with free:
                said = await _answered(client, line, headers)
            failed += said["error"] is not None
            out.write(json.dumps(said) + "\n")
            out.flush()
            progress()

        async with asyncio.TaskGroup() as group:
            for line in lines:
                group.create_task(ask(line))
    return failed


async def _answered(client: httpx.AsyncClient, line: BatchLine, headers: Mapping[str, str]) -> dict[str, Any]:
    """A line of the file of answers: OpenAI's format, with the variant and the version from the server's headers."""
    found: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": None,
                             "error": None}  # fmt: skip
    content = json.dumps(line.body).encode()  # also JSON that is invalid but accepted by vLLM
    try:
        reply = await client.post(line.url, content=content, headers={**headers, "content-type": "application/json"})
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return {**found, "error": {"code": "no_answer", "message": repr(error)}}
    try:
        body = reply.json()
    except ValueError:
        body = {"text": reply.text}
    told = {name[len(_OURS) :]: value for name, value in reply.headers.items() if name.startswith(_OURS)}
    response = {"status_code": reply.status_code, "request_id": reply.headers.get("x-request-id", ""), "body": body}
    why = (body.get("error") if isinstance(body, dict) else None) or body or {"message": reply.reason_phrase}
    return {**found, "response": response, "error": None if reply.is_success else why, "edits": told}
