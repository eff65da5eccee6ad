"""A GPU's part of the product, run without one: `make rehearse-gpu`, or `python -m tests.gpu.rehearse --help`.

vLLM's build for GPUs is installed in a folder of its own, and meets a CUDA driver that accepts every call and computes
nothing (null_gpu.py). All of vLLM's and the plugin's Python for a GPU runs: the V2 runner, CUDA graphs captured and
replayed, torch's compiler and Triton writing machine code for an H100. Numbers mean nothing; errors, launches, copies
and what is run are real. Each step is a process of its own with a time limit, and the next one runs whatever happens.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loadtests.harness.model import ensure_model
from tests.gpu import null_gpu, report, served, steps
from tests.gpu.facts import RESULTS
from tests.gpu.first_light import PIECEWISE, V1
from tests.gpu.steps import Step

WORK = Path(".cache/rehearsal").resolve()
HERE = Path(__file__).parent
READBACK, REPORT = "tests/gpu/readback", HERE / "REHEARSAL.md"
QUIET = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles kernels where it runs
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # they want GPUs that see each other
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1", "CUDA_MODULE_LOADING": "LAZY",
}  # fmt: skip
LATE = {"NULL_GPU_LATE": "1"}
EAGER = {"enforce_eager": True}
NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}


def story(name: str, machine: Mapping[str, str] | None = None, **way: Any) -> Step:
    return Step(name, ["tests.gpu.story", json.dumps(way)], environment={**LATE, **(machine or {})})


STEPS = (
    story("V2, full graphs", expect={"runner": "V2", "graphs": "FULL_AND_PIECEWISE", "dtype": "bfloat16"}),
    story("V2, full graphs, started again", expect={"compiled before": True}),
    story("V2, piecewise graphs", arguments=PIECEWISE, expect={"runner": "V2", "graphs": "PIECEWISE"}),
    story("V1, piecewise graphs", environment=V1, arguments=PIECEWISE, expect={"runner": "V1", "graphs": "PIECEWISE"}),
    story("V2, not compiled ahead of time", environment={"VLLM_USE_AOT_COMPILE": "0"},
          expect={"graphs": "FULL_AND_PIECEWISE"}),
    story("V2, eager, float32", arguments={**EAGER, "dtype": "float32"}, expect={"runner": "V2", "compiled": False}),
    story("V1, eager", environment=V1, arguments=EAGER, expect={"runner": "V1", "compiled": False}),
    story("n-gram guesses", arguments={**EAGER, **NGRAM}),
    story("two GPUs", arguments={**EAGER, "tensor_parallel_size": 2}, machine={"NULL_GPU_COUNT": "2"}),
    Step("server", ["tests.gpu.served", json.dumps({"parts": ["server", "server, in the weights"]})], 480, LATE),
    Step("server, growing", ["tests.gpu.served", json.dumps({"parts": ["server, growing"]})], 600, LATE),
    Step("refusals", ["tests.gpu.refusals"], 720),
    Step("costs of a step", ["tests.gpu.costs"], 600, covered=False),
    Step("first look", ["tests.gpu.look"], 120),
    Step("exactness, but for the numbers", ["tests.gpu.exact", "bfloat16"], 480),
    # Swaps are not measured here: on a GPU they take streams that are longer than the tiny model's positions.
    Step("bench, at tiny sizes", ["loadtests.bench", "--quick", "--once", "--model", str(served.MODEL), "--batch", "8",
                                  "--rank", "2", "--all-kinds", "--only", "distinct"], 600),
)  # fmt: skip
OF_A_KIT = (
    Step("first light", ["tests.gpu.first_light", "--shape", str(served.MODEL), "--beside", "2", "--seconds", "1700",
                         "--out", "found"], 1750, covered=False),
)  # fmt: skip
"""What a host without a network does first."""
app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Host:
    """Where the steps run: a checkout, its Python, and what a process there needs."""

    checkout: Path
    python: Path
    environment: Mapping[str, str]
    kept: Path
    """the folder for what its steps tell"""


@app.command()
def main(
    *,
    only: Annotated[list[str] | None, typer.Option(help="name of a step, given again for each further one")] = None,
    python: Annotated[str, typer.Option(help="Python that the environment for GPUs is made with")] = sys.executable,
    kit: Annotated[
        Path | None, typer.Option(help="rehearse this kit instead, as a host without a network has it (Python 3.12)")
    ] = None,
    slower: Annotated[float, typer.Option(min=0.1, help="factor on every step's time limit")] = 1.0,
    write: Annotated[bool, typer.Option("--write", help=f"write {REPORT.name}, if every step was run")] = False,
) -> None:
    """Run the product on a GPU that is not there, and say what ran, what a step costs, and what was never reached.

    Of each step the last run counts, so that a rehearsal can be taken in parts.
    """
    there_are = [*STEPS, *(OF_A_KIT if kit else ())]
    if unknown := set(only or ()) - {step.name for step in there_are}:
        raise typer.BadParameter(f"no step {sorted(unknown)}; there are: {', '.join(step.name for step in there_are)}")
    ensure_model()
    with console.status("installing vLLM for GPUs (some GiB, once)"):
        host = host_of(kit.resolve(), python) if kit else this_checkout(python)
    for step in there_are:
        if not only or step.name in only:
            run(replace(step, seconds=step.seconds * slower), host)
    runs = {step.name: report.LastRun.of(host.kept / step.name, host.checkout) for step in STEPS}
    text = report.written(runs)
    print(text)
    whole = all(runs.values())
    if write and kit is None and whole:
        REPORT.write_text(text)
    failed = any(each.code for each in runs.values() if each)
    raise typer.Exit(1 if failed or (whole and report.unexplained(text)) else 0)


def this_checkout(python: str) -> Host:
    """This checkout, with vLLM for GPUs as `make setup` installs it where there is one."""
    venv, pins = WORK / "venv", Path("tests/requirements/gpu.txt")
    if _install(venv, python, pins, known=pins.read_text() + Path("pyproject.toml").read_text()):
        _uv("pip", "install", "--python", str(venv), "--no-deps", "--no-build-isolation", "--editable", ".")
    served.model()  # the bench asks for it at once
    return _host(Path.cwd(), venv, [venv], WORK / "steps")


def host_of(kit: Path, python: str) -> Host:
    """A copy of this checkout on a host that has what tests/gpu/kit/host.txt says, and a kit."""
    venv, pins = WORK / "host", HERE / "kit/host.txt"
    _install(venv, python, pins, known=pins.read_text())
    # These a host has too, of other versions than the kit's: the kit must bring what it needs.
    _uv("pip", "uninstall", "--python", str(venv), "annotated-types", "pydantic", "pydantic-core", "typing-inspection")
    checkout = WORK / "host-checkout"
    shutil.rmtree(checkout, ignore_errors=True)
    shutil.copytree(Path.cwd(), checkout, ignore=shutil.ignore_patterns(".venv", ".cache", ".git", "__pycache__"))
    shutil.copytree(ensure_model(), checkout / ensure_model())
    subprocess.run([str(venv / "bin/python"), str(HERE / "kit/unpack.py"), str(kit), str(checkout)], check=True)
    return _host(checkout, checkout / ".venv", [venv, checkout / ".venv"], WORK / "kit-steps")


def _install(venv: Path, python: str, pins: Path, *, known: str) -> bool:
    """Make an environment, unless it is there as known; whether it was made."""
    stamp = venv / ".installed"
    if stamp.exists() and stamp.read_text() == known:
        return False
    # By uv, since pip may be set up to prefer a build of torch for CPUs.
    _uv("venv", "--clear", "--python", python, str(venv))
    _uv("pip", "install", "--python", str(venv), "-r", str(pins))
    stamp.write_text(known)
    return True


def _uv(*words: str) -> None:
    subprocess.run([str(Path(sys.executable).with_name("uv")), *words, "--quiet"], check=True)


def _host(checkout: Path, venv: Path, environments: Sequence[Path], kept: Path) -> Host:
    packages = [path for each in environments for path in each.glob("lib/python3.*/site-packages")]
    driver = null_gpu.build(packages, WORK / "driver")
    caches = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    environment = {
        **os.environ, **QUIET, **driver,
        "PATH": os.pathsep.join([str(venv / "bin"), driver["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(checkout / READBACK), str(checkout)]),
        **{name: str(kept.with_name(f"{kept.name}-caches") / folder) for name, folder in caches.items()},
    }  # fmt: skip
    return Host(checkout, venv / "bin/python", environment, kept)


def run(step: Step, host: Host) -> None:
    """Run a step, and keep what it told, how it ended, and what it ran of the plugin."""
    folder = host.kept / step.name
    shutil.rmtree(folder, ignore_errors=True)
    settings = report.coverage_settings(folder / "coverage", host.checkout)
    measured = ["-m", "coverage", "run", f"--rcfile={settings}"] if step.covered else []
    command = [str(host.python), *measured, "-m", *step.command]
    log, results = folder / "log.txt", folder / "results.jsonl"
    environment = {**host.environment, RESULTS: str(results)}
    with console.status(f"{step.name} (at most {step.seconds:.0f} s)"):
        ended = steps.run(step, command, environment, log=log, results=results, folder=host.checkout)
    report.LastRun.keep(folder, ended)
    where = "" if ended.code == 0 else f" ({log})"
    console.print(f"{ended.result}: {step.name}, {ended.seconds:.0f} s{where}")


if __name__ == "__main__":
    app()
