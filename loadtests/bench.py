"""How fast edited variants are served, and what a swap costs: `make bench`, or `python -m loadtests.bench --help`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from demo.model import ensure_model
from loadtests.bench_experiments import EXPERIMENTS, Engines
from loadtests.bench_inputs import Inputs
from loadtests.bench_paging import PagingPlan, measure_paging
from loadtests.bench_report import show, summarise_rates, summarise_swaps
from loadtests.bench_rounds import run
from loadtests.bench_sides import SideFailed
from loadtests.bench_swap import SwapFailed, SwapPlan, measure_swaps
from loadtests.server import ServerFailed

RESULTS = Path(__file__).parent / "results"
WORK = Path(".cache/bench")  # always the same paths: the store's is part of the compile cache's key
BUSY = 0.5  # one-minute load above which something else is running
console = Console(stderr=True, highlight=False)
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


PARTS = [*EXPERIMENTS, "swaps", "paging"]
USUAL = ["demo", "swaps"]
QUICK_PAGING = {"versions": 30, "slots": 8, "single": 5, "requests": 60}


def _parts(asked: list[str] | None) -> list[str]:
    """The parts to measure. A word that names none is refused with what there is."""
    if unknown := [part for part in asked or () if part not in PARTS]:
        raise typer.BadParameter(f"{unknown[0]!r} is no part; there are {', '.join(PARTS)}")
    return asked or USUAL


@app.command()
def main(
    *,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            help=f"parts to measure: {', '.join(PARTS)}",
            show_default=" and ".join(USUAL),
            callback=_parts,
            autocompletion=lambda: PARTS,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="few rounds, nothing written: does the bench itself work?")
    ] = False,
    rounds: Annotated[int, typer.Option(min=3, help="rounds that count; each runs every side once")] = 16,
    swaps: Annotated[int, typer.Option(min=3, help="swaps to measure")] = 15,
    threads: Annotated[
        int, typer.Option(min=0, help="cores of each engine; 0: all but one, as vLLM's own server takes on a CPU")
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="of the model", show_default="bfloat16 where the device computes in it, else float32")
    ] = "",
    model: Annotated[
        Path | None, typer.Option(help="checkpoint folder of the demo's model", show_default="converted if need be")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="file to write", show_default="loadtests/results/<date>-<device>.json")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the record instead of the tables")] = False,
) -> None:
    """Measure what the plugin costs, side by side in one run, and what a hot swap does to running requests.

    [bold]demo.[/bold] Engines stay loaded side by side and take turns: vLLM without the plugin, the same again (the
    noise floor), with the plugin (first no request edited, then every request on a different variant), and vLLM's LoRA
    with the same rank-one redirections. What counts is the ratio between sides within a round.

    [bold]swaps.[/bold] A real server, running streams, a promotion in the store: time to the first answer on the new
    version, and the longest time between two tokens with and without a swap.

    [bold]idle, distinct, kinds, alternatives.[/bold] Only when asked for, as `--only idle`: the plugin left on, at
    batch 1, 8 and 64; 64 requests on up to 64 versions, of ranks 1, 4 and 16; each kind of edit at every layer; LoRA
    and an edited checkpoint beside rank one at every layer.

    [bold]paging.[/bold] A thousand variants and 64 slots: what a version that is not on the device costs, and how often
    that happens.

    A missed target is shown and written, and does not fail the run. Nothing else should run on the machine meanwhile.
    """
    swapping = SwapPlan(swaps=3 if quick else swaps, dtype=dtype or native_dtype())
    signal.signal(signal.SIGTERM, _stopped)
    load = os.getloadavg()[0]
    if load > BUSY:
        console.print(f"[yellow]The machine is busy (load {load:.1f}): the figures will be noisy.[/yellow]")
    record: dict[str, Any] = {**about(), "load_at_start": round(load, 2), "parameters": {}, "rounds": {}, "summary": {}}
    try:
        with _progress() as progress:
            inputs = _prepare(model or ensure_model(), progress)
            record["edits"] = inputs.described()
            for part in (part for part in parts or USUAL if part in EXPERIMENTS):
                experiment = EXPERIMENTS[part](Engines(inputs, dtype or native_dtype(), cores_for(threads)))
                found = run(experiment, 3 if quick else rounds, inputs, progress)
                what = {name: side.what for name, side in experiment.sides.items()}
                record["parameters"][part] = {"dtype": dtype or native_dtype(), "cores": cores_for(threads),
                                              "phases": [asdict(phase) for phase in experiment.phases]}  # fmt: skip
                record["rounds"][part] = found
                record["summary"][part] = summarise_rates(experiment.what, what, experiment.comparisons, found)
            if "swaps" in (parts or USUAL):
                record["parameters"]["swaps"] = asdict(swapping)
                measured = measure_swaps(swapping, inputs, progress)
                record["swaps"] = [asdict(swap) for swap in measured]
                record["summary"]["swaps"] = summarise_swaps(measured)
            if "paging" in (parts or USUAL):
                paging = PagingPlan(dtype or native_dtype(), **(QUICK_PAGING if quick else {}))
                record["parameters"]["paging"] = asdict(paging)
                record["summary"]["paging"] = measure_paging(paging, inputs.everywhere(["low_rank"]), progress)
    except (SideFailed, ServerFailed, SwapFailed) as failure:
        console.print("[red]Not measured.[/red]")
        console.print(str(failure), markup=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        show(record["summary"], Console(highlight=False))
    if output is not None or not quick:
        path = output or free_path(RESULTS, record)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"written: {path}")


def _progress() -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True)


def _stopped(number: int, _frame: object) -> None:
    """End as by Ctrl-C does, so that no engine is left running."""
    console.print("[red]stopped[/red]")
    sys.exit(128 + number)


def _prepare(model: Path, progress: Progress) -> Inputs:
    task = progress.add_task("the model's digests", total=None)

    def say(step: str) -> None:
        progress.update(task, description=step)

    inputs = Inputs.prepare(model, WORK, say)
    progress.remove_task(task)
    return inputs


# -- the record --------------------------------------------------------------------------------------------------------


def about() -> dict[str, Any]:
    """When, on what device and with which versions."""
    packages = ("vllm-edits", "vllm", "torch", "numpy")
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _device(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
            "commit": _output("git", "describe", "--always", "--dirty"),
        },
    }


def _device() -> dict[str, Any]:
    gpu, cpu, cores = _gpu(), _of_cpu("model name") or platform.machine(), len(os.sched_getaffinity(0))
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return {"name": gpu or f"{cpu} {cores} cores", "cpu": cpu, "cores": cores, "memory_gib": memory}


def _gpu() -> str:
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").partition("\n")[0]


def _of_cpu(field: str) -> str:
    found = re.search(rf"^{field}\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else ""


def native_dtype() -> str:
    """A CPU without bfloat16 instructions computes in it ten times slower than in float32: nobody serves that way."""
    return "bfloat16" if _gpu() or {"avx512_bf16", "amx_bf16"} & set(_of_cpu("flags").split()) else "float32"


def cores_for(threads: int) -> list[int]:
    """The cores of each engine: the last ones, for the first have the system's own work to do."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[-(threads or max(1, len(cores) - 1)) :]


def _output(*command: str) -> str:
    """What a command prints, '' when it is not there or fails."""
    path = shutil.which(command[0])
    if path is None:
        return ""
    return subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False).stdout.strip()


def free_path(folder: Path, record: dict[str, Any]) -> Path:
    """`<date>-<device>.json`, numbered from the second run of a day on: no run overwrites another."""
    device = re.sub(r"[^a-z0-9]+", "-", record["device"]["name"].lower()).strip("-")
    stem, number = f"{record['at'][:10]}-{device}", 1
    path = folder / f"{stem}.json"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


if __name__ == "__main__":
    app()
