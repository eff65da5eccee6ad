"""Traffic as vLLM's own benchmark makes it, `vllm bench serve`: for each variant, and for all of them mixed.

Two real servers, vLLM alone and with the plugin, one at work at a time. Every run has the same prompts and answers of
random lengths, as many in flight as `at_once`. Nothing of ours is between the client and the server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtests.bench.report import Figure
from loadtests.bench.rounds import turns
from loadtests.bench.run import Measured, NotMeasured, Run
from loadtests.harness.server import ENVIRONMENT, Server
from vllm_edits.edit_store.kinds import served_per_request

ALONE = "vLLM alone"
QUICK = {"rounds": 2, "requests": 8}
FIGURES = {
    "tokens per second": "output_throughput",
    "time to first token, ms": "median_ttft_ms",
    "time per output token, ms": "median_tpot_ms",
    "99 % between tokens, ms": "p99_itl_ms",
}
"""What is taken from the result of `vllm bench serve`, by what it is called here."""


@dataclass(frozen=True)
class TrafficPlan:
    """What shapes the figures; written beside them."""

    dtype: str
    rounds: int = 4
    requests: int = 48
    at_once: int = 8
    prompt_tokens: int = 96
    answer_tokens: int = 32
    spread: float = 0.5
    """prompts and answers are this share shorter to longer"""


@dataclass(frozen=True)
class AskedModels:
    """Who is asked: one model of one server, or several in turns."""

    what: str
    server: Server
    models: Sequence[str]


def measure_traffic(run: Run) -> Measured:
    """Start both servers, and let `vllm bench serve` ask each side once a round."""
    plan = TrafficPlan(run.dtype, **(QUICK if run.quick else {}))
    inputs = run.inputs.everywhere(served_per_request())
    variants = {kind.replace("_", "-"): run.inputs.everywhere([kind]) for kind in served_per_request()}
    variants["all-kinds"] = inputs
    store = inputs.store_of("traffic-store", [made.version(name, 1) for name, made in variants.items()])
    flags = ("--dtype", plan.dtype, "--max-model-len", "512")
    settings = {"poll_seconds": 3600, "cache_folder": str(inputs.node)}
    plain = Server.plain(inputs.model, inputs.folder / "plain-server.log", *flags)
    edited = Server.with_edits(inputs.model, store, inputs.folder / "traffic.log", *flags, settings=settings)
    sides = {
        ALONE: AskedModels("", plain, ["base"]),
        "base": AskedModels("plugin on, no edited request", edited, ["base"]),
        **{name: AskedModels("at every layer", edited, [name]) for name in variants},
        "mixed": AskedModels("every request on another of them", edited, list(variants)),
    }
    task = run.progress.add_task("starting two servers (a first start compiles for minutes)", total=None)
    with plain, edited:
        rounds = []
        run.progress.update(task, description="vllm bench serve", total=(1 + plan.rounds) * len(sides), completed=0)
        for number in range(1 + plan.rounds):  # the first does not count
            found = {}
            for name in turns(list(sides), number):
                found[name] = _serve(plan, inputs.model, sides[name], inputs.folder / "traffic.json", seed=number)
                run.progress.advance(task)
            rounds.append(found)
    run.progress.remove_task(task)
    return Measured(asdict(plan), rounds[1:], summarise({name: side.what for name, side in sides.items()}, rounds[1:]))


def _serve(plan: TrafficPlan, model: Path, side: AskedModels, result: Path, *, seed: int) -> dict[str, float]:
    """One run of `vllm bench serve`; NotMeasured when a request was not answered."""
    command = [
        str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--base-url", side.server.url,
        "--model", str(model), "--served-model-name", side.models[0],
        "--dataset-name", "random", "--random-input-len", str(plan.prompt_tokens),
        "--random-output-len", str(plan.answer_tokens), "--random-range-ratio", str(plan.spread), "--ignore-eos",
        "--num-prompts", str(plan.requests), "--max-concurrency", str(plan.at_once), "--seed", str(seed),
        "--disable-tqdm", "--save-result", "--result-dir", str(result.parent), "--result-filename", result.name,
    ]  # fmt: skip
    if len(side.models) > 1:  # the flag for adapters only says which model names to ask for
        command += ["--lora-modules", *side.models, "--lora-assignment", "round-robin"]
    ran = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False, timeout=600
    )
    found = json.loads(result.read_text()) if ran.returncode == 0 else {}
    result.unlink(missing_ok=True)
    if found.get("completed") != plan.requests:
        raise NotMeasured(
            f"vllm bench serve: {found.get('completed')} of {plan.requests} answered\n{ran.stderr[-2000:]}"
        )
    return {name: found[key] for name, key in FIGURES.items()}


def summarise(sides: Mapping[str, str], rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Every figure of every side, and relative to vLLM alone in the same round."""

    def figures(side: str, *, relative: bool) -> dict[str, Any]:
        return {
            name: asdict(Figure.of(each[side][name] / (each[ALONE][name] if relative else 1) for each in rounds))
            for name in FIGURES
        }

    return {
        "traffic": {
            side: {"what": what, "figures": figures(side, relative=False),
                   "relative": {} if side == ALONE else figures(side, relative=True)}
            for side, what in sides.items()
        }
    }  # fmt: skip
