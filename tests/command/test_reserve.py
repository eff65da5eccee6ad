"""`reserve show`, `reserve grow` and `status` ask the real routes of a server over fake workers, by a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from typer.testing import CliRunner, Result

from tests.support.fakes import Answer, Server, refuse, version_of
from tests.support.site import Site
from vllm_edits.edit_store import LowRank
from vllm_edits.plugin.cli import reserve_commands
from vllm_edits.plugin.cli.commands import app

ENTRY = '{"kind":"offset","site":"layers.*.resid"}'
SIGHT = '{"kind":"offset","sight":"resid"}'
VLLMS_ERRORS = "vLLM's errors"
either_form = pytest.mark.parametrize("running", ["FastAPI's errors", VLLMS_ERRORS], indirect=True)
WIDE = LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=2)


class Running:
    """A server that listens; commands know its address and its admin token."""

    def __init__(self, app: FastAPI, server: Server, token: Path) -> None:
        self.server = server
        self.token = token
        self._listening = socket.socket()
        self._listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=asyncio.run, args=[self._uvicorn.serve([self._listening])])
        self._thread.start()
        while not self._uvicorn.started:
            self._thread.join(0.01)

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()
        self._listening.close()

    def run(self, *words: str, token: bool = True) -> Result:
        allowed = ["--admin-token-file", str(self.token)] if token and "grow" in words else []
        return CliRunner().invoke(app, [*words, "--url", self.url, *allowed])

    def shown(self) -> Any:
        """The state of the reservation, by the command."""
        ran = self.run("reserve", "show", "--json")
        assert ran.exit_code == 0, ran.stderr
        return json.loads(ran.stdout)


def in_vllms_form(app: FastAPI) -> None:
    """Errors as vLLM writes them."""

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": {"message": error.detail, "code": error.status_code}}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def not_valid(_request: Request, error: RequestValidationError) -> JSONResponse:
        said = "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors())
        return JSONResponse({"error": {"message": said, "code": 422}}, 422)


@pytest.fixture
def running(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server whose policy is `ask`; it writes errors as FastAPI does, or with a parameter as vLLM does."""
    monkeypatch.setattr(reserve_commands, "_POLL_SECONDS", 0.01)
    token = tmp_path / "token"
    token.write_text("let-me-in\r\n")
    server = Server(f"memory://{tmp_path}", grow="ask")
    site = Site(server, token)
    if getattr(request, "param", None) == VLLMS_ERRORS:
        in_vllms_form(site.app)
    made = Running(site.app, server, token)
    yield made
    made.close()


@pytest.fixture
def compiling(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers compile until a command has looked once and waits."""
    waits = threading.Event()

    def poll(_number: int, act: Any) -> Answer:
        return act() if waits.is_set() else {"phase": "compiling", "pause": 0.0}

    def sleep(seconds: float) -> None:
        waits.set()
        time.sleep(seconds)

    running.server.workers.overrides["edits_grow_poll"] = poll
    monkeypatch.setattr(reserve_commands, "time", SimpleNamespace(sleep=sleep))


def test_a_reservation_is_shown_before_and_after_it_has_grown(running: Running) -> None:
    before = running.run("reserve", "show")
    assert before.exit_code == 0
    assert "reserved: gate at 1 site(s) up to rank 1; offset at 1 site(s) up to rank 1; 1 scopes; " in before.stdout
    assert "for all slots; grow: ask\nit has not grown since the server started\n" in before.stdout
    small = running.shown()
    assert (small["grow"], small["last"], small["growing"], small["failed"]) == ("ask", None, False, {})
    version = running.server.store.publish(version_of("polite", edit=WIDE))
    ran = running.run("reserve", "grow", f"polite@{version[:12]}", "--reserve", ENTRY, "--scopes", "3")
    assert ran.exit_code == 0, ran.stderr
    after = running.run("reserve", "show").stdout
    assert "low_rank at 1 site(s) up to rank 2; offset at 3 site(s)" in after
    assert f"for polite@{version[:12]}, explicit entries, 3 scopes: done (planned " in after
    assert "longest pause 2 ms)" in after
    large = running.shown()
    assert large["bytes"] > small["bytes"]
    assert (large["scopes"], large["last"]["error"], large["last"]["phase"]) == (3, "", "done")
    again = running.run("reserve", "grow", f"polite@{version}", "--reserve", ENTRY, "--scopes", "3")
    assert (again.exit_code, again.stdout.startswith("it fits into what is reserved already\nreserved: ")) == (0, True)
    assert running.shown()["last"]["at"] == large["last"]["at"], "no further growth"


@pytest.mark.usefixtures("compiling")
def test_waiting_tells_each_phase_and_not_waiting_returns_at_once(running: Running) -> None:
    ran = running.run("reserve", "grow", "--reserve", ENTRY, "--no-wait")
    assert ran.exit_code == 0, ran.stderr
    assert "waiting to grow for explicit entries" in ran.stdout
    scripted = running.run("reserve", "grow", "--scopes", "2", "--no-wait", "--json")
    assert (json.loads(scripted.stdout)["growing"], json.loads(scripted.stdout)["wanted"]) == (True, "2 scopes")
    status = running.run("status")
    assert status.exit_code == 0, status.stderr
    assert "the reservation grows for explicit entries, phase compiling" in status.stdout
    assert json.loads(running.run("status", "--json").stdout)["reservation"]["growing"]
    assert "explicit entries: compiling (" in running.run("reserve", "show").stdout
    waited = running.run("reserve", "grow", "--scopes", "3")
    assert waited.exit_code == 0, waited.stderr
    assert waited.stdout.startswith("compiling …\n")
    assert running.shown()["scopes"] == 3
    assert "the reservation grows" not in running.run("status").stdout


@pytest.mark.parametrize("script", [True, False])
def test_a_growth_that_fails_is_told_with_its_reason(running: Running, script: bool) -> None:
    before = running.shown()
    running.server.workers.overrides["edits_grow"] = refuse
    ran = running.run("reserve", "grow", "--reserve", ENTRY, *(["--json"] if script else []))
    assert ran.exit_code == 1
    assert "vllm-edits: the reservation did not grow: explicit entries is refused" in ran.stderr
    assert "in phase planned: tensor x holds NaN [not_finite]" in ran.stderr
    if script:
        found = json.loads(ran.stdout)
        assert (found["last"]["phase"], list(found["failed"])) == ("planned", ["explicit entries"])
    else:
        assert "failed in phase planned: the install is refused" in ran.stdout
    after = running.shown()
    assert [after[key] for key in ("bytes", "holds", "scopes")] == [before[key] for key in ("bytes", "holds", "scopes")]
    # The old failure is not told of a later growth, waited for or not, nor of capacity that is there.
    running.server.workers.overrides = {}
    held = running.server.store.publish(version_of("polite"))
    for words in (("--scopes", "2", "--no-wait"), (f"polite@{held}",), ("--reserve", ENTRY)):
        later = running.run("reserve", "grow", *words)
        assert (later.exit_code, later.stderr) == (0, "")
    assert running.shown()["failed"] == {}


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("first", ["3 scopes", "explicit entries"])
def test_of_two_growths_only_the_one_that_failed_is_an_error(running: Running, first: str) -> None:
    """They are tried together and then one after the other, so the last growth may be another's."""
    assert running.run("reserve", "grow", "--scopes", "2", "--no-wait").exit_code == 0
    running.server.core.growth._limit_bytes = running.server.workers.workers[0].edited.bytes_reserved + 2000
    big = [f'{{"kind":"low_rank","site":"layers.*.{at}","rank":8}}' for at in ("mlp.out", "attn.out")]
    grows = {"3 scopes": ["--scopes", "3"], "explicit entries": ["--reserve", big[0], "--reserve", big[1]]}
    assert running.run("reserve", "grow", *grows.pop(first), "--no-wait").exit_code == 0
    ((second, words),) = grows.items()
    waited = running.run("reserve", "grow", *words)
    assert waited.exit_code == (0 if second == "3 scopes" else 1)
    assert ("bytes are allowed" in waited.stderr) == (second == "explicit entries")
    found = running.shown()
    assert (list(found["failed"]), found["scopes"], found["last"]["wanted_by"]) == (["explicit entries"], 3, [second])


@pytest.mark.parametrize("text", ["{", "5", "[]", "offset", "", "Standard"])
def test_what_is_neither_a_profile_nor_a_json_object_is_refused_before_the_server_is_asked(text: str) -> None:
    ran = CliRunner().invoke(app, ["reserve", "grow", "--reserve", text, "--url", "http://127.0.0.1:9"])
    assert (ran.exit_code, ran.stderr) == (
        1,
        f"vllm-edits: --reserve: expected a profile (promoted, standard, all) or a JSON object, found {text!r}\n",
    )


def test_nothing_to_grow_for_is_refused_before_the_server_is_asked() -> None:
    ran = CliRunner().invoke(app, ["reserve", "grow", "--url", "http://127.0.0.1:9"])
    assert ran.exit_code == 1
    assert "nothing to make capacity for: name a version, or give --reserve or --scopes" in ran.stderr


@either_form
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["polit"], 404, "polit"),
        (["polite@ffffff"], 404, "no version ffffff"),
        (["--reserve", '{"kind":"offset","site":"layers.9.resid"}'], 422, "fits no site"),
        (["--reserve", SIGHT], 422, "edits.reserve.0.sight: unknown setting. Did you mean 'site'?"),
        (["--reserve", '{"site":"layers.1.resid"}'], 422, "edits.reserve.0.kind: Field required"),
        (["--reserve", "promoted"], 422, "Name the versions to make capacity for"),
    ],
)
def test_the_reason_of_a_refusal_is_told(running: Running, words: list[str], status: int, said: str) -> None:
    running.server.store.publish(version_of("polite"))
    ran = running.run("reserve", "grow", *words)
    assert ran.exit_code == 1
    assert f"{running.url}/v1/edits/reservation answered {status}: " in ran.stderr
    assert said in ran.stderr
    assert '"detail"' not in ran.stderr, "no JSON is shown to people"
    assert '"error"' not in ran.stderr
    assert running.shown()["last"] is None


@either_form
def test_without_the_admin_token_nothing_grows(running: Running, tmp_path: Path) -> None:
    ran = running.run("reserve", "grow", "--reserve", ENTRY, token=False)
    assert ran.exit_code == 1
    assert "answered 401: missing or wrong admin token" in ran.stderr
    assert ran.stderr.endswith("Give the file with the token as --admin-token-file\n")
    wrong, none, there = tmp_path / "wrong", tmp_path / "none", ["--admin-token-file", str(running.token)]
    wrong.write_bytes("schlüssel\n".encode())
    none.write_text("\n")
    for path, said in (
        (wrong, "missing or wrong admin token"), (none, f"{none} is empty"), (tmp_path, "cannot be read"),
        (tmp_path / "absent", f"{tmp_path / 'absent'} cannot be read: No such file or directory"),
    ):  # fmt: skip
        ran = running.run("reserve", "grow", "--reserve", ENTRY, "--admin-token-file", str(path), token=False)
        assert ran.exit_code == 1
        assert said in ran.stderr
        assert "--admin-token-file" not in ran.stderr
    assert running.shown()["last"] is None
    assert running.run("reserve", "grow", "--reserve", ENTRY, *there, token=False).exit_code == 0, "positive control"


def test_a_server_that_may_not_grow_says_how_to_allow_it(running: Running) -> None:
    running.server.core.growth.policy = "never"
    ran = running.run("reserve", "grow", "--reserve", ENTRY)
    assert ran.exit_code == 1
    assert "answered 422: explicit entries is refused" in ran.stderr
    assert "edits.grow is never. Set it to ask or auto, and restart" in ran.stderr


@pytest.mark.parametrize("words", [["reserve", "show"], ["reserve", "grow", "--reserve", ENTRY], ["status"]])
@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1", "http://[", "http://127.0.0.1:port"])
def test_a_server_that_does_not_answer_is_told_with_its_address(words: list[str], url: str) -> None:
    ran = CliRunner().invoke(app, [*words, "--url", url])
    assert ran.exit_code == 1, ran.exception
    assert ran.stderr.startswith(f"vllm-edits: no answer from {url}: ")
    assert ran.stderr.endswith("Check that the server runs, or name its address with --url\n")


@pytest.mark.parametrize("words", [["reserve", "show"], ["reserve", "grow", "--reserve", ENTRY], ["status"]])
def test_another_kind_of_server_is_told_from_ours(words: list[str], tmp_path: Path) -> None:
    """It has no such page, or answers with a page for people."""
    other = FastAPI()
    made = Running(other, Server(f"memory://{tmp_path}"), tmp_path / "token")
    made.token.write_text("x")
    try:
        assert "answered 404: Not Found" in made.run(*words).stderr

        @other.api_route("/v1/edits{rest:path}", methods=["GET", "POST"])
        def page() -> HTMLResponse:
            return HTMLResponse("<h1>Welcome</h1>")

        ran = made.run(*words)
        assert (ran.exit_code, "answered something else than JSON" in ran.stderr) == (1, True)
    finally:
        made.close()
