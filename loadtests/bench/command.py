"""How fast edited variants are served, and what a swap costs: `make bench`, or `python -m loadtests.bench --help`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from loadtests.bench.inputs import Inputs
from loadtests.bench.parts import side_by_side
from loadtests.bench.parts.endurance import measure_endurance
from loadtests.bench.parts.growth import measure_growth
from loadtests.bench.parts.guesses import measure_guesses
from loadtests.bench.parts.launches import measure_launches
from loadtests.bench.parts.paging import measure_paging
from loadtests.bench.parts.profile import measure_profile
from loadtests.bench.parts.swap import measure_swaps
from loadtests.bench.parts.traffic import measure_traffic
from loadtests.bench.plot import draw
from loadtests.bench.report import show
from loadtests.bench.run import Measured, NotMeasured, Run
from loadtests.bench.shapes import SHAPES, ensure_shape
from loadtests.harness.model import MODEL_FOLDER, ensure_model
from loadtests.harness.record import about, cores_for, gpu, native_dtype, write
from loadtests.harness.server import ServerFailed
from vllm_edits.edit_store.base_model import CONFIG_FILE
from vllm_edits.edit_store.errors import nearest
from vllm_edits.server_config.settings import PROFILES

WORK = Path(".cache/bench")  # always the same paths: the store's is part of the compile cache's key
BUSY = 0.5  # one-minute load above which something else is running
BATCHES = {False: (1, 8, 64), True: (1, 8, 64, 256)}
"""How many requests at once, on a CPU and on a GPU."""
console = Console(stderr=True, highlight=False)
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


PARTS: Mapping[str, Callable[[Run], Measured]] = {
    **{name: partial(side_by_side.measure, name) for name in side_by_side.EXPERIMENTS},
    "swaps": measure_swaps, "weight_swaps": partial(measure_swaps, weights=True), "endurance": measure_endurance,
    "paging": measure_paging, "traffic": measure_traffic, "launches": measure_launches, "profile": measure_profile,
    "guesses": measure_guesses, "growth": measure_growth,
}  # fmt: skip
USUAL = ["demo", "swaps"]


def _parts(asked: list[str] | None) -> list[str]:
    """The parts to measure. A word that names none is refused with what there is."""
    if unknown := [part for part in asked or () if part not in PARTS]:
        raise typer.BadParameter(f"{unknown[0]!r} is no part; there are {', '.join(PARTS)}")
    return asked or USUAL


def _profiles(asked: list[str] | None) -> list[str]:
    """Profiles of which the part profiles measures the cost. A word that names none is refused with what there is."""
    if unknown := [profile for profile in asked or () if profile not in PROFILES]:
        raise typer.BadParameter(
            f"{unknown[0]!r} is no profile.{nearest(unknown[0], PROFILES)} There are {', '.join(PROFILES)}"
        )
    return asked or ["standard"]


def _model(asked: str) -> str:
    """A shape or a checkpoint. What is neither is refused with what there is."""
    if asked and asked not in SHAPES and not Path(asked, CONFIG_FILE).is_file():
        raise typer.BadParameter(
            f"{asked!r} is neither a shape ({', '.join(SHAPES)}) nor a folder with a {CONFIG_FILE}"
        )
    return asked


@app.command()
def main(
    *,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            help=f"Part to measure. Can be repeated. Parts: {', '.join(PARTS)}.",
            show_default=" and ".join(USUAL),
            callback=_parts,
            autocompletion=lambda: list(PARTS),
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run few rounds and write nothing, to test the bench itself.")
    ] = False,
    once: Annotated[
        bool,
        typer.Option(
            "--once", help="Start no second engine of each kind, to save memory. The noise is not measured then."
        ),
    ] = False,
    rounds: Annotated[int, typer.Option(min=3, help="Number of rounds. Each round runs every side once.")] = 16,
    swaps: Annotated[int, typer.Option(min=3, help="Number of swaps to measure.")] = 15,
    batches: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            min=1,
            max=side_by_side.MAX_MODEL_LEN,
            help="Number of requests at once. Can be repeated. The part distinct takes the largest.",
            show_default="1, 8 and 64, on a GPU also 256",
        ),
    ] = None,
    ranks: Annotated[
        list[int] | None,
        typer.Option(
            "--rank",
            min=1,
            help="Rank for the part distinct. Can be repeated. Use fewer ranks to save memory.",
            show_default="1, 4 and 16, and all kinds",
        ),
    ] = None,
    reserve: Annotated[
        list[str] | None,
        typer.Option(
            "--reserve",
            help=f"Reservation profile for the part profiles: {', '.join(PROFILES)}. Can be repeated; each takes two "
            "engines.",
            show_default="standard",
            callback=_profiles,
            autocompletion=lambda: list(PROFILES),
        ),
    ] = None,
    all_kinds: Annotated[
        bool, typer.Option("--all-kinds", help="With --rank: the part distinct also measures versions of all kinds.")
    ] = False,
    threads: Annotated[
        int, typer.Option(min=0, help="Cores of each engine. 0: all cores except one, as vLLM's server on a CPU.")
    ] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="Data type of the model.", show_default="bfloat16 where the device computes in it, else float32"
        ),
    ] = "",
    seconds: Annotated[
        float,
        typer.Option(min=1, help="Time after which a part ends, if it has run three rounds.", show_default="no limit"),
    ] = inf,
    model: Annotated[
        str,
        typer.Option(
            help=f"Checkpoint folder, or a shape with random weights: {', '.join(SHAPES)}.",
            show_default="the demo's model",
            callback=_model,
            autocompletion=lambda: list(SHAPES),
        ),
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="loadtests/results/<date>-<device>.json")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record instead of the tables.")] = False,
) -> None:
    """Measure the cost of the plugin, and the effect of a swap on running
    requests.

    Without --only, the parts demo and swaps run. Run nothing else on the
    machine meanwhile. A missed target is shown and written to the record; the
    command does not fail because of it.

    [bold]demo.[/bold] Compares throughput. Several engines stay loaded and take
    turns: vLLM without the plugin, a second one (the noise), vLLM with the
    plugin (no request edited, then every request on its own variant), and
    vLLM's LoRA with the same rank-one edits. The result is the ratio between
    them within a round.

    [bold]swaps.[/bold] A server with running streams, and a promotion in the
    store. Measures the time to the first answer of the new version, and the
    longest pause between two tokens, with and without a swap.

    [bold]idle.[/bold] The plugin with no edited request, at batch 1, 8 and 64.

    [bold]profiles.[/bold] The plugin with a reservation profile (--reserve),
    nothing promoted and no edited request, at batch 1, 8 and 64.

    [bold]distinct.[/bold] 64 requests (or the largest --batch) on up to as many
    versions, of ranks 1, 4 and 16.

    [bold]kinds.[/bold] Each kind of edit at every layer.

    [bold]alternatives.[/bold] LoRA, and a checkpoint with edited weights,
    compared with rank one at every layer.

    [bold]endurance.[/bold] A thousand swaps in a row under load. Shows growth
    of memory and time.

    [bold]paging.[/bold] A thousand variants and 64 slots. Measures the delay of
    a version that is not on the device, and how often it occurs.

    [bold]growth.[/bold] A version for which nothing is reserved, promoted under
    load: the time to its first answer, and what running streams notice, with
    the code compiled, with the code cached, and with a restart instead.

    [bold]traffic.[/bold] `vllm bench serve` on each variant and on a mix of
    all, compared with vLLM alone.

    [bold]launches.[/bold] Counts the calls of a decoding step: operators, and
    on a GPU kernels and graph launches.

    [bold]profile.[/bold] Shows where the time of a decoding step goes.

    [bold]guesses.[/bold] The share of guesses of an unedited draft model that a
    variant accepts.

    [bold]weights, weight_swaps.[/bold] A variant in the engine's weights: the
    cost of a step, and the effect of a swap on running streams.

    \b
    Examples:
      python -m loadtests.bench --only idle --only swaps
      python -m loadtests.bench --only profiles --reserve standard
      python -m loadtests.bench --quick
    """
    signal.signal(signal.SIGTERM, _stopped)
    load = round(os.getloadavg()[0], 2)
    if load > BUSY:
        console.print(f"[yellow]The machine is busy (load {load}): the figures will be noisy.[/yellow]")
    record: dict[str, Any] = {
        **about(),
        "model": Path(model or MODEL_FOLDER).name,
        "load_at_start": load,
        "parameters": {},
        "samples": {},
        "summary": {},
    }
    failed: BaseExceptionGroup[Exception] | None = None
    try:
        with _progress() as progress:
            task = progress.add_task("the model's digests", total=None)
            checkpoint = _checkpoint(model)
            inputs = Inputs.prepare(checkpoint, WORK / checkpoint.name)
            progress.remove_task(task)
            run = Run(
                inputs, dtype or native_dtype(), cores_for(threads), sorted(batches or BATCHES[bool(gpu())]), progress,
                rounds=rounds, swaps=swaps, quick=quick, ranks=ranks or (), all_kinds=all_kinds or not ranks, once=once,
                reserve=[each for each in PROFILES if each in (reserve or ())], seconds=seconds,
            )  # fmt: skip
            for part in parts or USUAL:
                measured = PARTS[part](run)
                record["parameters"][part] = measured.parameters
                record["samples"][part] = measured.samples
                record["summary"][part] = measured.summary
                if output is not None or not quick:  # as it comes: a later part may fail, or time run out
                    output = write(record, output)
    except* (NotMeasured, ServerFailed) as failures:  # alone, or out of a group of tasks
        failed = failures
    if failed is not None:
        console.print("[red]Not measured.[/red]")
        console.print("\n".join(map(str, failed.exceptions)), markup=False)
        raise typer.Exit(1)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        show(record["summary"], Console(highlight=False))
    if output is not None:
        console.print(f"written: {output}, {draw(record, output.with_suffix('.svg')) or 'no picture'}")


def _checkpoint(model: str) -> Path:
    return ensure_shape(model, ensure_model()) if model in SHAPES else Path(model) if model else ensure_model()


def _progress() -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True)


def _stopped(number: int, _frame: object) -> None:
    """End as by Ctrl-C does, so that no engine is left running."""
    console.print("[red]stopped[/red]")
    sys.exit(128 + number)
