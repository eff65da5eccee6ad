"""The commands `serve` and `run-batch`, which start vLLM's server with the plugin."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vllm_edits.edit_store.cli import JsonOption, StoreOption, app, as_script, counted, explained, plain
from vllm_edits.edit_store.errors import EditsError, SettingsError
from vllm_edits.plugin.cli import gpu_driver, serve_arguments
from vllm_edits.plugin.cli import run_batch as batch
from vllm_edits.plugin.cli.setting_option import SettingOption, assigned
from vllm_edits.plugin.cli_client import ApiKeyOption
from vllm_edits.plugin.open_store import open_reader
from vllm_edits.server_config.settings import KEY, read_settings

_SHORT = re.compile(r"-[A-Za-z]{2}")
_NOT_ON_A_SOCKET = ("--headless", "--uds", "--ssl-certfile", "--ssl-keyfile")
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_PASSED_ON)
@explained
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The base model: a folder, or the name of a model repository.")],
    store: StoreOption,
    setting: SettingOption = None,
) -> None:
    """Start `vllm serve MODEL` with the plugin.

    The server serves the base model and every variant that the store promotes,
    and follows later promotions. All other flags are passed to vLLM.

    \b
    Examples:
      vllm-edits serve ./model --store ./store
      vllm-edits serve ./model --store s3://bucket/edits --set slots=32 --port 8001
    """
    command, words, environment = _vllm(model, store, setting, list(context.args))
    os.execve(command, [command, *words], environment)  # noqa: S606  the user asked for this very command


class _LongFlags(TyperCommand):
    """Refuses short flags other than its own, because click would read `-o` in vLLM's `-cc.mode=0`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if short := [word for word in args if _SHORT.match(word)]:
            raise typer.BadParameter(f"{short[0]}: write vLLM's flags in full, e.g. --compilation-config for -cc")
        return super().parse_args(ctx, args)


@app.command(name="run-batch", cls=_LongFlags, context_settings=_PASSED_ON)
@explained
def run_batch(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The base model: a folder, or the name of a model repository.")],
    *,
    store: StoreOption,
    requests: Annotated[
        Path, typer.Option("--input", "-i", help="File of requests in OpenAI's batch format: one JSON object per line.")
    ],
    answers: Annotated[Path, typer.Option("--output", "-o", help="File for the answers: one JSON object per line.")],
    at_once: Annotated[int, typer.Option(min=1, help="Number of requests to send at the same time.")] = 256,
    setting: SettingOption = None,
    api_key: ApiKeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Answer a file of requests, then end.

    The command starts a server for this file, sends the requests to it, writes
    the answers, and stops the server. Requests may name the base model and any
    variant. All other flags are passed to vLLM.

    \b
    Example:
      vllm-edits run-batch ./model --store ./store -i requests.jsonl -o answers.jsonl

    \b
    A line of the file of requests; its body is the request itself:
      {"custom_id": "1", "url": "/v1/completions",
       "body": {"model": "polite", "prompt": "Dear customer,"}}
    """
    lines = batch.read(requests)
    command, words, environment = _vllm(model, store, setting, context.args, on_socket=True)
    part = answers.with_name(f"{answers.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with (
        part.open("w") as out,
        batch.server([command, *words], environment) as path,
        counted("answering", total=len(lines)) as update,
    ):
        failed = asyncio.run(
            batch.answer(path, lines, out, at_once=at_once, api_key=api_key, progress=lambda: update(advance=1))
        )
    part.replace(answers)
    if as_json:
        as_script({"requests": len(lines), "failed": failed, "output": str(answers)})
    else:
        plain(f"{len(lines) - failed} of {len(lines)} requests answered, in {answers}")
    if failed:
        raise EditsError(f"{failed} requests failed. See the field `error` in {answers}")


def _vllm(
    model: str, store: str, setting: list[str] | None, words: Sequence[str], *, on_socket: bool = False
) -> tuple[str, list[str], dict[str, str]]:
    """The `vllm` command, its arguments and its environment. Errors are found here, before minutes of loading."""
    settings = assigned(store, setting)
    open_reader(read_settings({KEY: settings}), signs=True)  # store, trust file and key
    flags = serve_arguments.Flags(words)
    if not on_socket:
        _require_free_port(flags)
    elif elsewhere := [flag for flag in _NOT_ON_A_SOCKET if flags.get(flag) not in (None, False)]:
        raise SettingsError(
            f"{', '.join(elsewhere)}: the server of a batch answers on its own socket. Leave this flag out"
        )
    if reasons := list(gpu_driver.faults(gpu_driver.cuda_of_torch())):
        raise EditsError("; ".join(reasons))
    command = shutil.which("vllm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if command is None:
        raise EditsError("no `vllm` command found for this Python. Install vLLM 0.26 to 0.33")
    arguments = serve_arguments.arguments(model, settings, flags)
    chosen = serve_arguments.plugins(os.environ.get(serve_arguments.VARIABLE))
    for remark in chosen.remarks:
        plain(f"vllm-edits: {remark}", err=True)
    return command, arguments, {**os.environ, serve_arguments.VARIABLE: ",".join(chosen.names)}


def _require_free_port(flags: serve_arguments.Flags) -> None:
    """EditsError if the address is in use. It is checked before minutes of loading."""
    if flags.get("--uds") is not None:
        return
    host, port = flags.get("--host") or "", flags.get("--port") or 8000
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, (address, _, *more) = found[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, int(port), *more))
    except (OSError, ValueError, OverflowError) as error:
        where = f"port {port}" + (f" of {host}" if host else "")
        raise EditsError(f"{where} cannot be used: {error}. Choose another with --port") from None
