"""Everything that one call on a GPU can tell in nine minutes, most valuable first: `make test-gpu`.

    python -m tests.gpu.first_light [--out FOLDER] [--seconds N] [--only STEP …] [--shape NAME]

Each step is a process of its own with a time limit, and the next one runs whatever happens; each fact is written as it
comes, to OUT/results.jsonl, and what each step printed beside it. Steps that measure nothing run beside each other, for
most of a small engine's life is its start, on one core. `make bench-gpu` is the second call, which measures more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadtests.bench.shapes import SHAPES
from tests.gpu import steps
from tests.gpu.facts import RESULTS
from tests.gpu.steps import Step
from tests.proofs.parity import BESIDE_OTHERS

PIECEWISE = {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
OTHER_WAYS: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("with Triton's attention", {"arguments": {"attention_config": {"backend": "TRITON_ATTN"}}}),
    ("with piecewise graphs", {"arguments": PIECEWISE}),
    ("not compiled", {"arguments": {"enforce_eager": True}}),
    ("V1, not compiled", {"arguments": {"enforce_eager": True}, "environment": V1}),
)
"""How else an engine is started: the next way only where the one before did not do."""
LAST = 20
"""Seconds of the budget that are left at the end; a step that would have less than so many is left out."""


@dataclass(frozen=True)
class Place:
    """Steps that take one place in the order: all of them beside each other, or the first that works."""

    steps: Sequence[Step]
    beside: bool = False
    fall_back_from: str = ""
    """the step that must not have worked for these to be wanted"""


@dataclass(frozen=True)
class Call:
    """One call: the time it has, and where it writes."""

    end: float
    out: Path
    beside: int
    """so many steps at a time, where they run beside each other"""

    @property
    def results(self) -> Path:
        """The facts, a line each."""
        return self.out / "results.jsonl"

    def works(self, step: Step) -> bool:
        """Run a step in what is left of the time."""
        left = self.end - time.monotonic() - LAST
        if left < LAST:
            print(f"left out for want of time: {step.name}", flush=True)
            return False
        environment = {**os.environ, RESULTS: str(self.results), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        ended = steps.run(
            replace(step, seconds=min(step.seconds, left)), [sys.executable, "-m", *step.command], environment,
            log=self.out / f"{step.name}.log", results=self.results,
        )  # fmt: skip
        print(f"{ended.result}: {step.name}, {ended.seconds:.0f} s", flush=True)
        return ended.code == 0

    def take(self, place: Place) -> dict[str, bool]:
        """Whether each step that was run worked."""
        if place.beside:
            with ThreadPoolExecutor(self.beside) as pool:
                return dict(zip((step.name for step in place.steps), pool.map(self.works, place.steps), strict=True))
        worked: dict[str, bool] = {}
        for step in place.steps:
            worked[step.name] = self.works(step)
            if worked[step.name]:
                break
        return worked


def story(name: str, way: Mapping[str, Any], seconds: float) -> Step:
    """An engine's life, started that way, with memory for others beside it."""
    way = {**way, "arguments": {**BESIDE_OTHERS, **way.get("arguments", {})}}
    return Step(f"engine, {name}", ["tests.gpu.story", json.dumps(way)], seconds)


def served(part: str, seconds: float) -> Step:
    """A part of a server's life, with memory for others beside it."""
    flags = [word for name, value in BESIDE_OTHERS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return Step(part, ["tests.gpu.served", json.dumps({"flags": flags, "parts": [part]})], seconds)


def figures(shape: str, out: Path, seconds: float) -> Step:
    """Decoding on K versions over vLLM alone, of rank 1, of rank 16, and of all kinds; a round is a fact."""
    bench = ["loadtests.bench", "--model", shape, "--only", "distinct", "--rank", "1", "--rank", "16", "--all-kinds",
             "--batch", "256", "--rounds", "16", "--seconds", str(seconds * 0.75),
             "--output", str(out / "distinct.json")]  # fmt: skip
    return Step("256 requests on K versions", bench, seconds)


def chosen(shape: str, out: Path) -> Iterator[Place]:
    """Where steps are taken, most valuable first."""
    default = story("as served by default", {}, 200)
    yield Place([Step("first look", ["tests.gpu.look"], 90)])
    correct = [
        default,
        Step("exact in bfloat16", ["tests.gpu.exact", "bfloat16"], 200),
        Step("exact in float32", ["tests.gpu.exact", "float32"], 200),
        Step("exact at every site", ["tests.gpu.exact", "bfloat16", "--everywhere"], 200),
        Step("exact in the weights", ["tests.gpu.exact", "bfloat16", "--weights"], 200),
        served("server", 240),
        served("server, in the weights", 240),
        served("server, growing", 300),
        story("V1, piecewise graphs", {"arguments": PIECEWISE, "environment": V1}, 200),
    ]
    yield Place(correct, beside=True)
    yield Place([story(name, way, 100) for name, way in OTHER_WAYS], fall_back_from=default.name)
    yield Place([Step("products of several ranks", ["tests.gpu.products"], 60)])
    yield Place([figures(shape, out, 300)])


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.first_light", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path(".cache/first-light"), help="folder for what is found")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD", help="steps whose name contains one of these")
    parser.add_argument("--beside", type=int, default=8, help="so many small engines at a time")
    parser.add_argument("--shape", default="llama-1b", metavar="SHAPE",
                        help=f"what speed is measured on: {', '.join(SHAPES)}, or a folder")  # fmt: skip
    asked = parser.parse_args(arguments)
    call = Call(time.monotonic() + asked.seconds, asked.out.resolve(), asked.beside)
    call.out.mkdir(parents=True, exist_ok=True)
    worked: dict[str, bool] = {}
    for place in chosen(asked.shape, call.out):
        wanted = [step for step in place.steps if not asked.only or any(word in step.name for word in asked.only)]
        if not worked.get(place.fall_back_from):
            worked |= call.take(replace(place, steps=wanted))
    print("\n".join(line[:400] for line in call.results.read_text().splitlines()))
    return 0 if all(worked.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
