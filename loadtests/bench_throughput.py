"""Throughput of every side, in rounds: engines stay loaded and take turns, one at work at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress

from loadtests.bench_inputs import Inputs
from loadtests.bench_report import PHASES, decode_rate, prefill_rate
from loadtests.bench_sides import Batch, Engine

VARIANTS = 16
KV_CACHE_BYTES = 1 << 28
MAX_MODEL_LEN = 2048
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class ThroughputPlan:
    """What shapes the figures; written beside them."""

    rounds: int
    concurrency: int
    dtype: str
    cores: Sequence[int]
    noise_floor: bool
    decode_prompt_tokens: int = 16
    decode_tokens: int = 64
    prefill_prompt_tokens: int = 256


@dataclass(frozen=True)
class _Side:
    engine: Engine
    names: Sequence[str | None]
    """who answers: each request of a batch takes the next"""


def measure_throughput(
    plan: ThroughputPlan, inputs: Inputs, progress: Progress, kinds: Sequence[str] = ()
) -> list[dict[str, dict[str, float]]]:
    """Tokens per second by side and phase, for every round that counts. With `kinds`, one side for each of them."""
    sides, rounds = _sides_by_kind(plan, inputs, kinds) if kinds else _sides(plan, inputs), []
    with ExitStack() as running:
        engines = list({id(side.engine): side.engine for side in sides.values()}.values())
        starting = progress.add_task("", total=len(engines))
        for engine in engines:
            progress.update(starting, description=f"starting {engine.label} (a first start compiles for minutes)")
            running.enter_context(engine)
            progress.advance(starting)
        progress.remove_task(starting)
        running_rounds = progress.add_task("", total=(WARM_UP_ROUNDS + plan.rounds) * len(sides) * len(PHASES))
        for number in range(WARM_UP_ROUNDS + plan.rounds):
            rates: dict[str, dict[str, float]] = {name: {} for name in sides}
            for phase in PHASES:
                for name in turns(list(sides), number):
                    what = "warm-up" if number < WARM_UP_ROUNDS else f"round {number + 1 - WARM_UP_ROUNDS}"
                    progress.update(running_rounds, description=f"{what}: {phase}, {name}")
                    rates[name][phase] = _rate(plan, inputs, sides[name], phase, number)
                    progress.advance(running_rounds)
            if number >= WARM_UP_ROUNDS:
                rounds.append(rates)
        progress.remove_task(running_rounds)
    return rounds


def turns(sides: Sequence[str], number: int) -> list[str]:
    """The order of a round: each time another side begins, and after all have begun once, backwards."""
    start = number % len(sides)
    order = [*sides[start:], *sides[:start]]
    return order[::-1] if number // len(sides) % 2 else order


def _rate(plan: ThroughputPlan, inputs: Inputs, side: _Side, phase: str, number: int) -> float:
    decode = phase == "decode"
    length, tokens = (plan.decode_prompt_tokens, plan.decode_tokens) if decode else (plan.prefill_prompt_tokens, 1)
    prompts = inputs.random_prompts((number, PHASES.index(phase)), plan.concurrency, length)
    first = number * plan.concurrency
    names = [side.names[(first + index) % len(side.names)] for index in range(plan.concurrency)]
    times = side.engine.run(Batch(prompts, names, tokens))
    return decode_rate(times) if decode else prefill_rate(times)


def _sides(plan: ThroughputPlan, inputs: Inputs) -> dict[str, _Side]:
    """Engines that differ in nothing but what is compared. The idle and the active plugin are one engine."""
    edits, variants = _edited(plan, inputs, "plugin")
    adapters = inputs.make_adapters(plan.concurrency)  # no more than fit at once: LoRA never has to page one in
    lora = {"enable_lora": True, "max_loras": plan.concurrency, "max_lora_rank": inputs.lora_rank}
    narrow = {**lora, "lora_target_modules": ["down_proj"]}
    sides = _plain_sides(plan, inputs)
    sides["plugin"] = _Side(edits, [None])
    sides["edited"] = _Side(edits, variants)
    sides["lora"] = _Side(_engine(plan, inputs, "lora", lora, adapters=adapters), list(adapters))
    sides["lora_narrow"] = _Side(_engine(plan, inputs, "lora_narrow", narrow, adapters=adapters), list(adapters))
    return sides


def _sides_by_kind(plan: ThroughputPlan, inputs: Inputs, kinds: Sequence[str]) -> dict[str, _Side]:
    """One kind at every layer in each engine, and all of them in one; every request on its own variant."""
    sides = _plain_sides(plan, inputs)
    for label, chosen in {**{kind: [kind] for kind in kinds}, "all kinds": kinds}.items():
        engine, variants = _edited(plan, inputs.everywhere(chosen), label.replace(" ", "_"))
        sides[label] = _Side(engine, variants)
    return sides


def _plain_sides(plan: ThroughputPlan, inputs: Inputs) -> dict[str, _Side]:
    labels = ["plain", "plain_again"] if plan.noise_floor else ["plain"]
    return {label: _Side(_engine(plan, inputs, label, {}), [None]) for label in labels}


def _edited(plan: ThroughputPlan, inputs: Inputs, label: str) -> tuple[Engine, list[str]]:
    variants, store = inputs.make_store("store", VARIANTS)
    settings = {"store": str(store), "slots": VARIANTS, "cache_folder": str(inputs.node)}
    extra = {"load_format": "edits", "additional_config": {"edits": settings}}
    return _engine(plan, inputs, label, extra, plugins="edits"), variants


def _engine(plan: ThroughputPlan, inputs: Inputs, label: str, extra: Mapping[str, Any], **options: Any) -> Engine:
    arguments = {
        "model": str(inputs.model), "dtype": plan.dtype, "seed": 0, "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": MAX_MODEL_LEN, "kv_cache_memory_bytes": KV_CACHE_BYTES, **extra,
    }  # fmt: skip
    return Engine(label, arguments, inputs.folder / f"{label}.log", plan.cores, **options)
