"""What a decoding step calls, with and without edits: torch's operators, and on a GPU kernels and graph launches.

Counts do not depend on what else the machine does. Two runs of different length are subtracted, so what a batch costs
once (its prefill, sampling parameters, the profiler's own work) falls out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from loadtests.bench.engine import Calls
from loadtests.bench.parts.side_by_side import Engines
from loadtests.bench.rounds import Side, Stage
from loadtests.bench.run import Measured, Run
from vllm_edits.edit_store.kinds import served_per_request

COUNTED: Mapping[str, Callable[[str], bool]] = {
    "operators": lambda call: call.startswith("CPU aten::"),
    "copies": lambda call: call in ("CPU aten::copy_", "CPU cudaMemcpyAsync"),
    "kernel launches": lambda call: "LaunchKernel" in call,
    "graph launches": lambda call: call == "CPU cudaGraphLaunch",
    "kernels": lambda call: call.startswith("CUDA ") and not call.startswith(("CUDA Mem", "CUDA aten::")),
}
"""What is counted, by torch's names for what it calls: `<device> <name>`."""


@dataclass(frozen=True)
class LaunchPlan:
    """What shapes the counts; written beside them."""

    dtype: str
    requests: int = 8
    prompt_tokens: int = 16
    short: int = 8
    long: int = 24


def measure_launches(run: Run) -> Measured:
    """Count in engines that differ in what is reserved and who is asked."""
    plan, progress = LaunchPlan(run.dtype), run.progress
    task = progress.add_task("starting engines (a first start compiles for minutes)", total=None)
    engines = Engines.of(run, lambda _: None)
    short, long = (Stage("", plan.requests, plan.prompt_tokens, tokens) for tokens in (plan.short, plan.long))
    sides = {"plain": engines.plain()["plain"]}
    for label, kinds in (("low_rank", ["low_rank"]), ("all kinds", served_per_request())):
        engine, variants = engines.edited(run.inputs.everywhere(kinds), label.replace(" ", "_"), plan.requests)
        sides[f"{label}, base"] = Side("reserved at every layer, no edited request", engine, [None])
        sides[label] = Side("at every layer, each request on its own variant", engine, variants)
    counted: dict[str, dict[str, int]] = {}
    with ExitStack() as running:
        for number, (name, side) in enumerate(sides.items()):
            progress.update(task, description=f"counting: {name}")
            engine = running.enter_context(side.engine)
            engine.run(side.batch(long, run.inputs, [number, 0]))  # once without being counted
            few, many = (engine.calls(side.batch(each, run.inputs, [number, each.tokens])) for each in (short, long))
            counted[name] = dict(_counts(many) - _counts(few))
    progress.remove_task(task)
    return Measured(asdict(plan), counted, summarise(plan, {name: side.what for name, side in sides.items()}, counted))


def _counts(calls: Calls) -> Counter[str]:
    return Counter({call: count for call, (count, _) in calls.items()})


def summarise(plan: LaunchPlan, sides: Mapping[str, str], counted: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """How many of each a step takes, by side."""
    steps = plan.long - plan.short
    return {
        "launches": {
            side: {
                "what": what,
                **{name: sum(count for call, count in counted[side].items() if counts(call)) / steps
                   for name, counts in COUNTED.items()},
            }
            for side, what in sides.items()
        }
    }  # fmt: skip
