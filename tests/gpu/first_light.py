"""Everything that one call on a GPU can tell in nine minutes, most valuable first: `make test-gpu`.

    python -m tests.gpu.first_light [--out FOLDER] [--seconds N] [--only STEP …] [--shape NAME]

Each step is a process of its own with a time limit, and the next one runs whatever happens; each fact is written as it
comes, to OUT/results.jsonl, and what each step printed beside it. `make bench-gpu` is the second call, which measures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loadtests.shapes import SHAPES
from tests.gpu import steps
from tests.gpu.facts import RESULTS
from tests.gpu.steps import Step

PIECEWISE = {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
WAYS = (
    ("as served by default", {}),
    ("with Triton's attention", {"arguments": {"attention_config": {"backend": "TRITON_ATTN"}}}),
    ("with piecewise graphs", {"arguments": PIECEWISE}),
    ("V1, piecewise graphs", {"arguments": PIECEWISE, "environment": V1}),
    ("not compiled", {"arguments": {"enforce_eager": True}}),
    ("V1, not compiled", {"arguments": {"enforce_eager": True}, "environment": V1}),
)
"""How an engine is started: the next way only where the one before did not do."""
LAST = 20
"""Seconds of the budget that are left at the end; a step that would have less than so many is left out."""


def story(name: str, way: object, seconds: float) -> Step:
    return Step(f"engine, {name}", ["tests.gpu.story", json.dumps(way)], seconds)


def figures(shape: str, out: Path, seconds: float) -> Step:
    """Decoding on K versions over vLLM alone, of rank 1 and 16; a round is a fact."""
    bench = ["loadtests.bench", "--model", shape, "--only", "distinct", "--rank", "1", "--rank", "16", "--batch", "256",
             "--rounds", "8", "--seconds", str(seconds * 0.75), "--output", str(out / "distinct.json")]  # fmt: skip
    return Step("256 requests on K versions", bench, seconds)


def chosen(shape: str, out: Path) -> Iterator[Step | Sequence[Step]]:
    """Steps, most valuable first; of several in one place the first that works is enough."""
    yield Step("first look", ["tests.gpu.look"], 90)
    yield [story(name, way, 150 if not way else 100) for name, way in WAYS]
    yield Step("exact in bfloat16", ["tests.gpu.exact", "bfloat16"], 150)
    yield figures(shape, out, 200)
    yield Step("exact in float32", ["tests.gpu.exact", "float32"], 110)
    yield Step("exact at every site", ["tests.gpu.exact", "bfloat16", "--everywhere"], 90)
    yield story("V1, piecewise graphs, too", WAYS[3][1], 100)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.first_light", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path(".cache/first-light"), help="folder for what is found")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD", help="steps whose name contains one of these")
    parser.add_argument("--shape", default="llama-1b", choices=list(SHAPES), help="what speed is measured on")
    asked = parser.parse_args(arguments)
    out, end = asked.out.resolve(), time.monotonic() + asked.seconds
    out.mkdir(parents=True, exist_ok=True)
    results, failed = out / "results.jsonl", 0
    environment = {**os.environ, RESULTS: str(results), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    for place in chosen(asked.shape, out):
        for step in [place] if isinstance(place, Step) else place:
            if asked.only and not any(word in step.name for word in asked.only):
                continue
            left = end - time.monotonic() - LAST
            if left < LAST:
                print(f"left out for want of time: {step.name}", flush=True)
                continue
            limited = replace(step, seconds=min(step.seconds, left))
            command = [sys.executable, "-m", *step.command]
            log = out / f"{step.name}.log"
            ended = steps.run(limited, command, environment, log=log, results=results)
            print(f"{ended.result}: {step.name}, {ended.seconds:.0f} s", flush=True)
            if ended.code == 0:
                break
            failed += 1
    print("\n".join(line[:400] for line in results.read_text().splitlines()))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
