"""Where a decoding step's time goes, with and without edits: products, attention, compiled loops, the graph's inputs.

Microseconds by inductor's and torch's profilers, which themselves cost some (of a long prefill several times what its
loops take alone, so only decoding is measured). As with launches two runs of different length are subtracted, so what a
batch costs once falls out; over several turns, of which the median counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from loadtests.bench.engine import Calls
from loadtests.bench.parts.side_by_side import Engines
from loadtests.bench.rounds import Side, Stage
from loadtests.bench.run import Measured, Run
from vllm_edits.edit_store.kinds import served_per_request

EVERY_LOOP = {"compilation_config": {"inductor_compile_config": {"cpp.enable_kernel_profile": True}}}
"""What makes compiled loops visible to torch's profiler on a CPU."""
PARTS: Mapping[str, Callable[[str], Any]] = {
    "compiled loops": re.compile(r"cpp_fused|triton_").search,
    "products": re.compile(r"onednn_mm|aten::(add|b)?mm$|gemm|cutlass", re.IGNORECASE).search,
    "attention": re.compile(r"attn|attention|kv_cache|flash", re.IGNORECASE).search,
    "edits in C++": re.compile(r"vllm_edits::").search,
    "graph's inputs": re.compile(r"Pregraph bytecode").search,
    "graph's Python": re.compile(r"Call CompiledFxGraph").search,
    "rest": lambda _: True,
}
"""What a call belongs to, by torch's name for it: the first that knows it."""


@dataclass(frozen=True)
class ProfilePlan:
    """What shapes the figures; written beside them."""

    dtype: str
    many: int = 64
    rank: int = 16
    prompt_tokens: int = 16
    short: int = 8
    long: int = 40
    turns: int = 5


def measure_profile(run: Run) -> Measured:
    """One request with everything reserved, and many on as many versions of all kinds and of a larger rank."""
    plan, progress = ProfilePlan(run.dtype, **({"turns": 1} if run.quick else {})), run.progress
    engines = Engines.of(run, lambda _: None, EVERY_LOOP)
    plain = engines.plain()["plain"].engine
    reserved, mixed = engines.edited(run.inputs.everywhere(served_per_request()), "profiled_all", plan.many)
    ranked, names = engines.edited(run.inputs.everywhere(["low_rank"], plan.rank), "profiled_rank", plan.many)
    alone = Side("vLLM without the plugin", plain, [None])
    nobody = Side("every kind reserved at every layer, no edited request", reserved, [None])
    everybody = Side("every kind at every layer, each request on its own version", reserved, mixed)
    base = Side(f"rank {plan.rank} reserved at every layer, no edited request", ranked, [None])
    one = Side(f"rank {plan.rank} at every layer, all requests on one version", ranked, names[:1])
    distinct = Side("the same, each request on its own version", ranked, names)
    sides = {
        "plain x1": (alone, 1), "reserved x1": (nobody, 1),
        f"plain x{plan.many}": (alone, plan.many), f"reserved x{plan.many}": (nobody, plan.many),
        f"all kinds x{plan.many}": (everybody, plan.many),
        "rank reserved": (base, plan.many), "rank, one version": (one, plan.many),
        "rank, distinct": (distinct, plan.many),
    }  # fmt: skip
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    with ExitStack() as running:
        task = progress.add_task("starting engines (a first start compiles for minutes)", total=plan.turns * len(sides))
        for engine in (plain, reserved, ranked):
            running.enter_context(engine)
        for turn in range(-1, plan.turns):  # the first warms up
            for name, (side, requests) in sides.items():
                progress.update(task, description=f"turn {turn + 1}: {name}")
                few, many = (
                    side.engine.calls(side.batch(Stage("", requests, plan.prompt_tokens, tokens), run.inputs,
                                                 [turn + 1, tokens]))
                    for tokens in (plan.short, plan.long)
                )  # fmt: skip
                if turn >= 0:
                    samples[name].append(parts(few, many, plan.long - plan.short))
                    progress.advance(task)
        progress.remove_task(task)
    return Measured(asdict(plan), samples, summarise({name: side.what for name, (side, _) in sides.items()}, samples))


def parts(few: Calls, many: Calls, steps: int) -> dict[str, float]:
    """Microseconds of a step by part, of what was called in a short run and in one of so many steps more."""
    taken = dict.fromkeys(PARTS, 0.0)
    for name in {*few, *many}:
        part = next(part for part, knows in PARTS.items() if knows(name))
        taken[part] += (many.get(name, (0, 0.0))[1] - few.get(name, (0, 0.0))[1]) / steps
    return taken


def summarise(sides: Mapping[str, str], samples: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """The median of each part over the turns, by side."""
    return {
        "profile": {
            side: {"what": what, **{part: median(turn[part] for turn in samples[side]) for part in PARTS}}
            for side, what in sides.items()
        }
    }
