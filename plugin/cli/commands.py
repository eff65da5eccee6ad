"""The `vllm-edits` command: the store's commands, and `serve`, `run-batch`, `plan` and `status` for servers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from typer.core import TyperCommand

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.base_model import identify, weight_files
from vllm_edits.edit_store.byte_sizes import bytes_of, sized
from vllm_edits.edit_store.cli import JsonOption, StoreOption, app, as_script, counted, explained, plain, show
from vllm_edits.edit_store.errors import EditsError, SettingsError
from vllm_edits.plugin.cli import gpu_driver, serve_command
from vllm_edits.plugin.cli import run_batch as batch
from vllm_edits.plugin.cli_client import DEFAULT_URL, ApiKeyOption, UrlOption, authorization, no_answer
from vllm_edits.plugin.experiments.analysis import cli as _experiments  # noqa: F401  importing it registers its command
from vllm_edits.plugin.open_store import open_reader
from vllm_edits.server_config.settings import KEY, read_settings

SettingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A setting, as name=value; the value may be JSON. Can be repeated, e.g. --set slots=32."
    ),
]
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
    settings = {"store": store, **dict(_assignment(text) for text in setting or [])}
    open_reader(read_settings({KEY: settings}), signs=True)  # store, trust file and key
    flags = serve_command.Flags(words)
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
    arguments = serve_command.arguments(model, settings, flags)
    chosen = serve_command.plugins(os.environ.get(serve_command.VARIABLE))
    for remark in chosen.remarks:
        plain(f"vllm-edits: {remark}", err=True)
    return command, arguments, {**os.environ, serve_command.VARIABLE: ",".join(chosen.names)}


@app.command()
@explained
def plan(
    model: Annotated[Path, typer.Argument(help="Folder of the base model's checkpoint.", exists=True, file_okay=False)],
    *,
    store: StoreOption,
    setting: SettingOption = None,
    dtype: Annotated[
        str, typer.Option(help="Data type, as for vLLM's --dtype.", show_default="as vLLM chooses")
    ] = "auto",
    memory: Annotated[str, typer.Option(help="Device memory for slots, e.g. 8GiB. Shows how many slots fit.")] = "",
    workers: Annotated[
        int,
        typer.Option("--tensor-parallel-size", min=1, help="Number of workers, as for vLLM. Figures are per worker."),
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Show the reservation that `serve` would make with these settings, and its
    device memory.

    Use it before `serve`, to choose `slots` and `reserve`. It reads the
    checkpoint and the store, and does not load the model. It also lists
    promoted versions that the server would refuse.

    \b
    Examples:
      vllm-edits plan ./model --store ./store
      vllm-edits plan ./model --store ./store --set slots=32 --memory 8GiB
    """
    from vllm_edits.plugin import plan as planning  # brings torch
    from vllm_edits.plugin.graph.slot_bytes import slot_bytes
    from vllm_edits.plugin.weights import weights_reservation
    from vllm_edits.plugin.weights.weight_form import formless

    settings = read_settings({KEY: {"store": store, **dict(_assignment(text) for text in setting or [])}})
    room = bytes_of(memory) if memory else None
    with counted("hashing the model", in_bytes=True) as update:
        update(total=sum(path.stat().st_size for path in weight_files(model)))
        base = identify(model, progress=lambda size: update(advance=size))
    promoted = planning.promoted(settings, base)
    reservation = planning.reserve(settings, base, promoted)
    kind = planning.dtype_of(model, dtype)
    if workers > 1 and (why := supported(base.architecture).undivided):
        raise SettingsError(
            f"{base.architecture} cannot be divided among {workers} workers: {why}. Use --tensor-parallel-size 1"
        )
    if base.widths.heads % workers:
        raise SettingsError(
            f"{base.widths.heads} heads cannot be divided among {workers} workers. Choose another "
            "--tensor-parallel-size"
        )
    capacity_bytes = slot_bytes(base.widths, kind, workers)
    found = planning.Plan.of(reservation, capacity_bytes)
    rows = planning.rows(found, reservation)
    refused = {
        manifest.name: [reason.message for reason in missing]
        for manifest in promoted.per_request
        if (missing := reservation.missing(manifest, capacity_bytes))
    }
    patched = planning.reserve_weights(settings, base, promoted)
    mine = base.widths.per_worker(workers)
    patch = weights_reservation.bytes_kept(patched, supported(base.architecture), mine, kind.itemsize)
    if promoted.in_weights and (missing := formless(promoted.in_weights.edits, supported(base.architecture))):
        refused[promoted.in_weights.name] = [reason.message for reason in missing]
    fits = None if room is None else found.most(room)
    if as_json:
        as_script({"rooms": rows, "bytes_per_slot": found.slot, "slots": settings.slots,
                   "bytes": found.total(settings.slots), "fit": fits, "refused": refused,
                   "weights": {"projections": len(patched), "bytes": patch}})  # fmt: skip
        return
    columns = {"kind": "kind", "point": "at", "reads": "reads", "rank": "rank", "features": "with", "sites": "layers"}
    show([{**row, "size": sized(row["bytes"])} for row in rows], {**columns, "size": "bytes per slot"}, False)
    plain(f"one slot: {sized(found.slot)}; {settings.slots} slots and the base model's slot: "
          f"{sized(found.total(settings.slots))}")  # fmt: skip
    if room is not None:
        plain(f"{fits} slots fit into {sized(room)}")
    if patched:
        plain(f"{settings.weights} in the weights: {len(patched)} projections, up to {sized(patch)}; the same host "
              "memory for each prepared version, and on a CPU once more")  # fmt: skip
    for name, reasons in refused.items():
        plain(f"{name} would be refused: {'; '.join(reasons)}")


@app.command()
@explained
def status(
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show the state of a running server: variants, versions, slots, requests in
    flight, the last swap.

    \b
    Example:
      vllm-edits status --url http://127.0.0.1:8000
    """
    try:
        answer = httpx.get(f"{url}/v1/edits", headers=authorization(api_key), timeout=10)
    except httpx.HTTPError as error:
        raise no_answer(url, error) from None
    if answer.status_code != httpx.codes.OK:
        raise EditsError(f"{url}/v1/edits answered {answer.status_code}: {answer.text[:200]}")
    found: dict[str, Any] = answer.json()
    if as_json:
        as_script(found)
        return
    _show_status(found)


def _show_status(found: dict[str, Any]) -> None:
    rows = [{**row, "digits": row["version"][:12], "resident": _place(row)} for row in found["variants"]]
    columns = {
        "name": "variant", "tag": "tag", "digits": "version", "sequence": "#", "resident": "on device",
        "in_flight": "in flight",
    }  # fmt: skip
    show(rows, columns, as_json=False)
    base, slots, swap, store = found["base"], found["slots"], found["last_swap"], found["store"]
    plain(f"base {', '.join(base['names'])}, {base['in_flight']} in flight")
    plain(
        f"slots {slots['used']} of {slots['total']}; store {store['url']}, read {_age(store)}, "
        f"signatures {found['signatures']}"
    )
    if slots["waiting"]:
        requests = sum(row["requests"] for row in slots["waiting"])
        longest = max(row["seconds"] for row in slots["waiting"])
        plain(
            f"{requests} requests wait for a slot, the first for {longest:.1f} s. If that happens often, raise "
            "edits.slots"
        )
    if found["weights"]["variant"]:
        held = (found["weights"]["version"] or "the base model")[:14]
        plain(f"the weights serve {found['weights']['variant']}, and now hold {held}")
    if found["weights"]["doubt"]:
        plain(f"the content of the weights is unknown, so no request is answered: {found['weights']['doubt']}")
    if swap:
        phases = ", ".join(f"{phase} {seconds * 1000:.0f} ms" for phase, seconds in swap["seconds"].items())
        ended = swap["error"] or phases or "nothing to install"
        version = (swap["to_version"] or "none")[:12]
        plain(f"last swap {swap['variant']}@{swap['tag']} to {version} at {swap['at']}: {ended}")
    for refused in found["refused"]:
        plain(f"refused {refused['name']}@{refused['tag']}: {refused['error']}")
    for trouble in found["troubles"]:
        plain(f"broken history of {trouble['name']}@{trouble['tag']}: {trouble['error']}")


def _place(row: dict[str, Any]) -> str:
    return "in weights" if row["in_weights"] else "yes" if row["resident"] else "paged out"


def _age(store: dict[str, Any]) -> str:
    seconds = store["head_age_seconds"]
    return "never" if seconds is None else f"{seconds:.1f} s ago"


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"--set {text}: expected name=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _require_free_port(flags: serve_command.Flags) -> None:
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


def main() -> None:
    """Entry point of the command."""
    app()
