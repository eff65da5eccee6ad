"""The command `plan`: the reservation of a server and its device memory, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.base_model import identify, weight_files
from vllm_edits.edit_store.byte_sizes import bytes_of, sized
from vllm_edits.edit_store.cli import JsonOption, StoreOption, app, as_script, counted, explained, plain, show
from vllm_edits.edit_store.errors import Reason, SettingsError
from vllm_edits.plugin.cli.setting_option import SettingOption, assigned
from vllm_edits.plugin.graph.reservation import is_growable
from vllm_edits.server_config.settings import KEY, EditSettings, Grow, read_settings


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
    promoted versions that the server would grow for or refuse, and what each
    profile for `reserve` would take.

    \b
    Examples:
      vllm-edits plan ./model --store ./store
      vllm-edits plan ./model --store ./store --set slots=32 --memory 8GiB
      vllm-edits plan ./model --store ./store --set reserve=standard
    """
    from vllm_edits.plugin import plan as planning  # brings torch
    from vllm_edits.plugin.graph.slot_bytes import slot_bytes
    from vllm_edits.plugin.weights import weights_reservation
    from vllm_edits.plugin.weights.weight_form import formless

    settings = read_settings({KEY: assigned(store, setting)})
    memory_bytes = bytes_of(memory) if memory else None
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
    missing = {manifest.name: reservation.missing(manifest, capacity_bytes) for manifest in promoted.per_request}
    grows, refused = _misfits(missing, settings.grow)
    patched = planning.reserve_weights(settings, base, promoted)
    mine = base.widths.per_worker(workers)
    patch = weights_reservation.bytes_kept(patched, supported(base.architecture), mine, kind.itemsize)
    if promoted.in_weights and (reasons := formless(promoted.in_weights.edits, supported(base.architecture))):
        refused[promoted.in_weights.name] = [reason.message for reason in reasons]
    fits = None if memory_bytes is None else found.most(memory_bytes)
    profiles = planning.profile_rows(settings, base, promoted, capacity_bytes)
    if as_json:
        as_script({"groups": rows, "bytes_per_slot": found.slot, "slots": settings.slots,
                   "bytes": found.total(settings.slots), "fit": fits, "grows": grows, "refused": refused,
                   "profiles": profiles, "weights": {"projections": len(patched), "bytes": patch}})  # fmt: skip
        return
    columns = {"kind": "kind", "point": "at", "reads": "reads", "rank": "rank", "features": "with", "sites": "layers"}
    if rows:
        show([{**row, "size": sized(row["bytes"])} for row in rows], {**columns, "size": "bytes per slot"}, False)
    else:
        plain(
            "nothing is reserved. With --set reserve=standard a server holds what nearly every published method needs"
        )
    plain(f"one slot: {sized(found.slot)}; {settings.slots} slots and the base model's slot: "
          f"{sized(found.total(settings.slots))}")  # fmt: skip
    if memory_bytes is not None and rows:
        plain(f"{fits} slots fit into {sized(memory_bytes)}")
    if patched:
        plain(f"{settings.weights} in the weights: {len(patched)} projections, up to {sized(patch)}; the same host "
              "memory for each prepared version, and on a CPU once more")  # fmt: skip
    for outcome, names in (("make the reservation grow after the start", grows), ("be refused", refused)):
        for name, messages in names.items():
            plain(f"{name} would {outcome}: {'; '.join(messages)}")
    _show_profiles(profiles, settings)


def _misfits(missing: Mapping[str, list[Reason]], grow: Grow) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The versions that do not fit, with their reasons: those that a server grows for, and those that it refuses."""
    grows: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for name, reasons in missing.items():
        may_grow = grow == "auto" and is_growable(reasons)
        if reasons:
            (grows if may_grow else refused)[name] = [reason.message for reason in reasons]
    return grows, refused


def _show_profiles(profiles: list[dict[str, Any]], settings: EditSettings) -> None:
    """A row for each profile, then a line for each measurement. Speeds are relative to vLLM alone."""
    plain("\nprofiles for reserve; with the base model's slot; decode and prefill at rest, where vLLM alone is 1:")
    in_use = "and entries" if settings.entries else "yes"
    lines = [
        {
            "profile": row["profile"], "in_use": in_use if row["in_use"] else "", "slot": sized(row["bytes_per_slot"]),
            "all": sized(row["bytes"]), "decode": _range(row["measured"], "decode"),
            "prefill": _range(row["measured"], "prefill"),
        }
        for row in profiles
    ]  # fmt: skip
    columns = {"profile": "profile", "in_use": "in use", "slot": "one slot", "all": f"{settings.slots} slots"}
    show(lines, {**columns, "decode": "decode", "prefill": "prefill"}, False)
    for row in profiles:
        for cost in row["measured"]:
            plain(f"{row['profile']} on {cost['device']}, {cost['shape']}, {cost['reserved']}: "
                  f"decode {_range([cost], 'decode')}, prefill {_range([cost], 'prefill')}")  # fmt: skip


def _range(measured: list[dict[str, Any]], phase: str) -> str:
    """The lowest and the highest measured speed."""
    speeds = sorted({f"{cost[phase]:.3f}" for cost in measured if cost[phase] is not None})
    return "–".join(dict.fromkeys([speeds[0], speeds[-1]])) if speeds else "not measured"
