"""What a decoding step computes on a GPU: microseconds of its kernels, by name, for sides whose engines are running.

Two batches of different length are subtracted, so that what a batch costs once (its prefill) falls out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loadtests.bench.engine import Calls
from loadtests.bench.inputs import Inputs
from loadtests.bench.rounds import Side, Stage

SHORT, LONG, MOST = 4, 12, 40
ALL, LONGEST_NAME = "all kernels", 140


def kernels_of_a_step(sides: Mapping[str, Side], phase: Stage, inputs: Inputs) -> dict[str, dict[str, float]]:
    """Microseconds of the kernels of a step by side, the longest first, and of all together."""
    found = {}
    for number, (name, side) in enumerate(sides.items()):
        batches = (
            side.batch(replace(phase, tokens=tokens), inputs, (10**6 + number, tokens)) for tokens in (SHORT, LONG)
        )
        few, many = (_on_device(side.engine.calls(batch)) for batch in batches)
        step = {kernel: (taken - few.get(kernel, 0)) / (LONG - SHORT) for kernel, taken in many.items()}
        longest = sorted(step.items(), key=lambda each: -each[1])[:MOST]
        found[name] = {
            ALL: round(sum(step.values()), 1),
            **{_short(kernel): round(took, 1) for kernel, took in longest},
        }
    return found


def _on_device(calls: Calls) -> dict[str, float]:
    """Of what torch calls, kernels and copies on the device; operators are told a second time there."""
    own = {call: taken for call, (_, taken) in calls.items() if call.startswith("CUDA ")}
    return {call.removeprefix("CUDA "): taken for call, taken in own.items() if not call.startswith("CUDA aten::")}


def _short(kernel: str) -> str:
    """A name of C++ or of the compiler, told apart from others by both of its ends."""
    return kernel if len(kernel) < LONGEST_NAME else f"{kernel[: LONGEST_NAME - 40]}…{kernel[-40:]}"
