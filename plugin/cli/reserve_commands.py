"""The commands `reserve show` and `reserve grow`: what a running server has reserved, and growth before a promotion."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from vllm_edits.edit_store.cli import JsonOption, app, as_script, explained, plain
from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.cli.admin_call import TokenFileOption, changed
from vllm_edits.plugin.cli_client import DEFAULT_URL, ApiKeyOption, UrlOption, answered, authorization
from vllm_edits.server_config.settings import PROFILES

_POLL_SECONDS = 0.5
_PATH = "/v1/edits/reservation"

reserve = typer.Typer(help="Show and grow what a running server has reserved for edits.", no_args_is_help=True)
app.add_typer(reserve, name="reserve")


@reserve.command()
@explained
def show(url: UrlOption = DEFAULT_URL, api_key: ApiKeyOption = "", as_json: JsonOption = False) -> None:
    """Show the reservation of a server, its device memory, and the last growth.

    \b
    Example:
      vllm-edits reserve show --url http://127.0.0.1:8000
    """
    found = answered("GET", f"{url}{_PATH}", authorization(api_key))
    if as_json:
        as_script(found)
    else:
        _show(found)


@reserve.command()
@explained
def grow(
    versions: Annotated[
        list[str] | None, typer.Argument(help="Versions to make capacity for: name, name@tag or name@version.")
    ] = None,
    *,
    items: Annotated[
        list[str] | None,
        typer.Option(
            "--reserve",
            help="Profile (standard, all), or an entry as JSON, as in the setting reserve: "
            '\'{"kind":"offset","site":"layers.*.resid"}\'. May be given again.',
        ),
    ] = None,
    scopes: Annotated[int, typer.Option(min=0, max=64, help="Largest number of scopes in one version.")] = 0,
    wait: Annotated[bool, typer.Option(help="Wait until the growth has ended.")] = True,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = "",
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make capacity on a running server for versions, profiles or entries.

    The server keeps serving meanwhile. Use this ahead of a promotion, at a
    quiet hour: the server compiles the model once more, which takes a minute
    or more of one core.

    \b
    Examples:
      vllm-edits reserve grow polite@staging --admin-token-file token
      vllm-edits reserve grow --reserve standard --admin-token-file token
      vllm-edits reserve grow --reserve '{"kind":"offset","site":"layers.*.resid"}' --admin-token-file token
    """
    body = {"versions": versions or [], "reserve": list(map(_item, items or [])), "scopes": scopes}
    if not any(body.values()):
        raise EditsError("nothing to make capacity for: name a version, or give --reserve or --scopes")
    address, sent = f"{url}{_PATH}", authorization(api_key)
    found = changed(address, sent, token_file, body)
    wanted = found["wanted"]
    if wait and found["growing"]:
        for phase in _phases(address, sent):
            if not as_json:
                plain(phase)
        found = answered("GET", address, sent)
    elif not found["growing"] and not as_json:
        plain("it fits into what is reserved already")
    if as_json:
        as_script(found)
    else:
        _show(found)
    if wanted in found["failed"]:
        raise EditsError(f"the reservation did not grow: {found['failed'][wanted]}")


def _item(text: str) -> Any:
    """A profile's name, or an entry."""
    if text in PROFILES:
        return text
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise EditsError(f"--reserve: expected a profile ({', '.join(PROFILES)}) or a JSON object, found {text!r}")
    return found


def _phases(address: str, sent: dict[str, str]) -> Iterator[str]:
    """A line for each phase of a growth that runs."""
    told = ""
    while (found := answered("GET", address, sent))["growing"]:
        phase = found["last"]["phase"] if found["last"] else "planned"
        if phase != told:
            told = phase
            yield f"{phase} …"
        time.sleep(_POLL_SECONDS)


def _show(found: dict[str, Any]) -> None:
    plain(f"reserved: {found['holds']}; {found['scopes']} scopes; {found['size']} for all slots; grow: {found['grow']}")
    last = found["last"]
    if last is not None:
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in last["seconds"].items())
        ended = f"failed in phase {last['phase']}: {last['error']}" if last["error"] else last["phase"]
        plain(f"last growth at {last['at']} for {', '.join(last['wanted_by'])}: {ended} ({phases}; longest pause "
              f"{last['longest_pause_seconds'] * 1000:.0f} ms)")  # fmt: skip
    elif not found["growing"]:
        plain("it has not grown since the server started")
    if found["waiting"]:
        plain(f"waiting to grow for {', '.join(found['waiting'])}")
