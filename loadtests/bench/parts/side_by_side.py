"""The experiments of the benchmark: which engines stand side by side, and what they are held against."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Self

from loadtests.bench.inputs import Inputs
from loadtests.bench.parts.kernels import kernels_of_a_step
from loadtests.bench.parts.swap import IN_WEIGHTS
from loadtests.bench.report import Comparison, Rates, summarise_rates
from loadtests.bench.rounds import Side, Stage, Trial, rates_by_round
from loadtests.bench.run import Measured, NotMeasured, Run
from loadtests.bench.sides import Engine
from loadtests.harness.record import gpu
from vllm_edits.edit_store.kinds import served_per_request
from vllm_edits.server_config.settings import Profile

MAX_MODEL_LEN = 2048
LARGEST_BLOCK = {False: 128, True: 64}
"""Tokens of KV cache that vLLM gives a request at once, on a CPU and on a GPU: as many as a short request fills."""
PLAIN = ("plain", "plain again")
IDLE, DECODE, PREFILL, HIGH_RANK, CHECKPOINT, OF_LORA = 0.99, 0.97, 0.95, 0.93, 0.98, 3.0
"""The least that is asked for, relative to the other side."""


@dataclass(frozen=True)
class Engines:
    """Makes engines that differ in nothing but what is compared."""

    inputs: Inputs
    dtype: str
    cores: Sequence[int]
    batches: Sequence[int]
    ranks: Sequence[int]
    all_kinds: bool
    say: Callable[[str], None]
    """is told what takes long before the engines start"""
    also: Mapping[str, Any]
    """arguments of every engine besides"""
    reserve: Sequence[Profile] = ("standard",)

    @classmethod
    def of(cls, run: Run, say: Callable[[str], None], also: Mapping[str, Any] = MappingProxyType({})) -> Self:
        return cls(run.inputs, run.dtype, run.cores, run.batches, run.ranks, run.all_kinds, say, also, run.reserve)

    def plain(self) -> dict[str, Side]:
        """vLLM without the plugin, twice: how far apart the two are is the noise."""
        return {
            "plain": Side("vLLM without the plugin", self._engine(self.inputs, "plain", {}), [None]),
            "plain again": Side("the same once more: the noise", self._engine(self.inputs, "plain_again", {}), [None]),
        }

    def checkpoint(self, inputs: Inputs) -> Side:
        """vLLM without the plugin and the edits in its weights: one variant, at no cost at all."""
        engine = self._engine(inputs, "checkpoint", {"model": str(inputs.make_checkpoint())})
        return Side("one variant, in the weights of a checkpoint", engine, [None])

    def edited(self, inputs: Inputs, label: str, variants: int) -> tuple[Engine, list[str]]:
        """vLLM with the plugin, and the names of so many variants, no two alike."""
        names, store = inputs.make_store("store", variants)
        settings = {"store": str(store), "slots": variants, "cache_folder": str(inputs.node)}
        extra = {"load_format": "edits", "additional_config": {"edits": settings}}
        return self._engine(inputs, label, extra, plugins="edits"), names

    def reserving(self, profile: Profile, label: str) -> Side:
        """vLLM with the plugin and a reservation profile, on a store that promotes nothing."""
        store = self.inputs.store_of("empty-store", [])
        settings = {"store": str(store), "slots": 16, "cache_folder": str(self.inputs.node), "reserve": profile}
        extra = {"load_format": "edits", "additional_config": {"edits": settings}}
        engine = self._engine(self.inputs, label, extra, plugins="edits")
        return Side(f"profile {profile} reserved, nothing promoted, no edited request", engine, [None])

    def in_weights(self, inputs: Inputs) -> Side:
        """vLLM with the plugin and the edits in its weights: one variant, and nothing set apart for others."""
        (name,), store = inputs.make_store("weights-store", 1)
        settings = {"store": str(store), "slots": 1, "cache_folder": str(inputs.node), "weights": name}
        extra = {"load_format": "edits", "additional_config": {"edits": settings}}
        engine = self._engine(inputs, "in_weights", extra, plugins="edits")
        return Side("one variant, in the engine's weights", engine, [name])

    def lora(self, inputs: Inputs, adapters_at_once: int = 8) -> dict[str, Side]:
        """vLLM's LoRA with the low-rank edits as so many adapters, all at once: it never has to page one in."""
        adapters = inputs.make_adapters(adapters_at_once)
        wide = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": inputs.lora_rank}
        narrow = {**wide, "lora_target_modules": ["down_proj"]}
        what = "vLLM's LoRA, the same updates, one adapter per request"
        return {
            "lora": Side(what, self._engine(inputs, "lora", wide, adapters=adapters), list(adapters)),
            "lora narrow": Side("the same, told to look at down_proj only",
                                self._engine(inputs, "lora_narrow", narrow, adapters=adapters), list(adapters)),
        }  # fmt: skip

    def reading_alone(self, inputs: Inputs, engine: Engine, variants: int) -> Side:
        """The limit: no edited request, but each step reads as much from memory as so many variants hold."""
        what = f"no edited request, but as much is read as {variants} versions hold"
        return Side(what, engine, [None], reads=variants * inputs.slot_bytes(self.dtype))

    def _kv_cache_bytes(self) -> int:
        """Room for the largest batch of short requests, or one prompt of the greatest length."""
        widths = self.inputs.base.widths
        tokens = MAX_MODEL_LEN + LARGEST_BLOCK[bool(gpu())] * max(self.batches)
        return tokens * 2 * widths.layers * widths.kv_heads * widths.head_dim * (4 if self.dtype == "float32" else 2)

    def _engine(self, inputs: Inputs, label: str, extra: Mapping[str, Any], **options: Any) -> Engine:
        arguments = {
            "model": str(inputs.model), "dtype": self.dtype, "seed": 0, "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": MAX_MODEL_LEN, "kv_cache_memory_bytes": self._kv_cache_bytes(),
            "gpu_memory_utilization": 0.05,  # on a GPU vLLM asks for that much free memory, and takes the line above
            **self.also,
            **extra,
        }  # fmt: skip
        return Engine(label, arguments, inputs.folder / f"{label}.log", self.cores, **options)


def batch(requests: int) -> list[Stage]:
    """Decoding and prefill of that many requests at once, the prefill of each in one step."""
    room, tokens = MAX_MODEL_LEN // requests, 16 if requests > 16 else 64
    return [
        Stage(f"decode x{requests}", requests, min(16, room), tokens),
        Stage(f"prefill x{requests}", requests, min(256, room)),
    ]


def against(
    over: str, under: Sequence[str], phases: Sequence[Stage], decode: float | None, prefill: float | None
) -> list[Comparison]:
    """One side over others in every phase, with the least that is asked for."""
    return [Comparison(over, tuple(under), phase.name, prefill if phase.tokens == 1 else decode) for phase in phases]


def demo(engines: Engines) -> Trial:
    """The demo's edits: what the plugin costs idle and at work, and LoRA with the same redirections."""
    inputs, phases = engines.inputs.of_the_demo(engines.say), batch(8)
    engine, variants = engines.edited(inputs, "plugin", 16)
    return Trial(
        "The demo's nine edits, eight requests at once",
        {
            **engines.plain(),
            "plugin": Side("plugin on, no edited request", engine, [None]),
            "edited": Side("every request on a different variant", engine, variants),
            **engines.lora(inputs),
        },
        phases,
        [
            *against("plain again", ["plain"], phases, None, None),
            *against("plugin", PLAIN, phases, IDLE, IDLE),
            *against("edited", PLAIN, phases, DECODE, PREFILL),
            *against("edited", ["lora"], phases, OF_LORA, None),
            *against("edited", ["lora narrow"], phases, None, None),
        ],
    )


def kinds(engines: Engines) -> Trial:
    """Each kind of edit at every layer, and all of them, every request on a variant of its own."""
    phases = batch(8)
    sides = engines.plain()
    for label, chosen in {**{kind: [kind] for kind in served_per_request()}, "all kinds": served_per_request()}.items():
        engine, variants = engines.edited(engines.inputs.everywhere(chosen), label.replace(" ", "_"), 16)
        sides[label] = Side("at every layer, each request on its own variant", engine, variants)
    compared = [each for side in sides if not side.startswith("plain")
                for each in against(side, PLAIN, phases, DECODE, PREFILL)]  # fmt: skip
    noise = against("plain again", ["plain"], phases, None, None)
    return Trial("Each kind at every layer, eight requests at once", sides, phases, [*noise, *compared])


def idle(engines: Engines) -> Trial:
    """What it costs to leave the plugin on, with all kinds reserved at every layer and no edited request."""
    phases = [phase for requests in engines.batches for phase in batch(requests)]
    sides, inputs = engines.plain(), engines.inputs.everywhere(served_per_request())
    comparisons = against("plain again", ["plain"], phases, None, None)
    for side in ("idle", "idle again"):
        engine, _ = engines.edited(inputs, side.replace(" ", "_"), 16)
        sides[side] = Side("all kinds reserved at every layer, no edited request", engine, [None])
        comparisons += against(side, PLAIN, phases, IDLE, IDLE)
    return Trial("Plugin on, no edited request, by batch size", sides, phases, comparisons)


def profiles(engines: Engines) -> Trial:
    """What it costs to leave the plugin on with a reservation profile and nothing promoted, so no edited request."""
    phases = [phase for requests in engines.batches for phase in batch(requests)]
    sides, comparisons = engines.plain(), against("plain again", ["plain"], phases, None, None)
    for profile in engines.reserve:
        for side in (profile, f"{profile} again"):
            sides[side] = engines.reserving(profile, side.replace(" ", "_"))
            comparisons += against(side, PLAIN, phases, IDLE, IDLE)
    return Trial("Reservation profiles, no edited request, by batch size", sides, phases, comparisons)


def distinct(engines: Engines) -> Trial:
    """The largest batch on K distinct versions, for ranks 1, 4 and 16 at every layer, and for all kinds; or for what
    was asked for. Beside each, where engines take turns step by step, what reading alone costs."""
    requests = max(engines.batches)
    phases, sides = batch(requests), engines.plain()
    comparisons = against("plain again", ["plain"], phases, None, None)
    some = [count for count in (0, 1, 8, 32, 64, 128) if count < requests]
    fewer = {1: some, 16: [1]}

    def add(name: str, side: Side, least: tuple[float | None, float | None] = (None, None)) -> None:
        sides[name] = side
        comparisons.extend(against(name, PLAIN, phases, *least))

    for rank in engines.ranks or (1, 4, 16):
        inputs = engines.inputs.everywhere(["low_rank"], rank)
        engine, variants = engines.edited(inputs, f"rank_{rank}", requests)
        for count in (*fewer.get(rank, ()), requests):
            side = Side(f"low rank at every layer, {count} versions", engine, variants[:count] or [None])
            add(f"rank {rank}, K={count}", side, (HIGH_RANK, HIGH_RANK) if rank > 4 else (DECODE, PREFILL))
        if not gpu():
            add(f"rank {rank}, reading alone", engines.reading_alone(inputs, engine, requests))
    if engines.all_kinds:
        inputs = engines.inputs.everywhere(served_per_request())
        engine, variants = engines.edited(inputs, "all_kinds", requests)
        if gpu():
            add("all kinds, K=0", Side("every kind reserved at every layer, no version", engine, [None]), (IDLE, IDLE))
        every = Side(f"every kind at every layer, {requests} versions", engine, variants)
        add(f"all kinds, K={requests}", every, (DECODE, PREFILL))
        if not gpu():
            add("all kinds, reading alone", engines.reading_alone(inputs, engine, requests))
    return Trial(f"{requests} requests at once, on K distinct versions", sides, phases, comparisons)


def alternatives(engines: Engines) -> Trial:
    """Rank one at every layer: the plugin, LoRA with the same updates, and a checkpoint with one of them in it."""
    sizes = sorted({8, max(engines.batches)})
    phases = [phase for requests in sizes for phase in batch(requests)]
    inputs = engines.inputs.everywhere(["low_rank"])
    engine, variants = engines.edited(inputs, "low_rank", sizes[-1])
    return Trial(
        f"Rank one at every layer, {' and '.join(map(str, sizes))} requests at once",
        {
            "checkpoint": engines.checkpoint(inputs),
            **engines.plain(),
            "edited": Side("every request on a different variant", engine, variants),
            **engines.lora(inputs, sizes[-1]),
        },
        phases,
        [
            *against("plain", ["checkpoint"], phases, None, None),
            *against("edited", ["checkpoint", *PLAIN], phases, CHECKPOINT, None),
            *against("edited", ["lora"], phases, OF_LORA, None),
            *against("edited", ["lora narrow"], phases, None, None),
        ],
    )


def weights(engines: Engines) -> Trial:
    """Rank one and factors at every layer, in the weights: no step should cost more than without the plugin."""
    phases = [phase for requests in engines.batches[:2] for phase in batch(requests)]
    sides = {**engines.plain(), "in weights": engines.in_weights(engines.inputs.everywhere(IN_WEIGHTS))}
    noise = against("plain again", ["plain"], phases, None, None)
    return Trial("A variant in the weights", sides, phases, [*noise, *against("in weights", PLAIN, phases, IDLE, IDLE)])


EXPERIMENTS: Mapping[str, Callable[[Engines], Trial]] = {
    "demo": demo, "kinds": kinds, "idle": idle, "profiles": profiles, "distinct": distinct,
    "alternatives": alternatives, "weights": weights,
}  # fmt: skip
"""By the name that --only takes."""


def measure(name: str, run: Run) -> Measured:
    """Run one of the experiments."""
    task = run.progress.add_task("", total=None)
    experiment = EXPERIMENTS[name](Engines.of(run, lambda step: run.progress.update(task, description=step)))
    run.progress.remove_task(task)
    if run.once:
        experiment = experiment.once()
    kernels: dict[str, Any] = {}

    def look(rates: list[Rates]) -> None:
        """On a GPU also at what its kernels take, which no clock outside tells apart."""
        if gpu():
            (run.inputs.folder / f"{name}.json").write_text(json.dumps(rates))  # should the time end meanwhile
            try:
                kernels["kernels"] = kernels_of_a_step(experiment.sides, experiment.phases[0], run.inputs)
            except NotMeasured as error:  # a driver without a profiler ends the engine; the rates are measured
                kernels["kernels"] = f"not measured: {error}"[:300]

    rounds = rates_by_round(
        experiment, 3 if run.quick else run.rounds, run.inputs, run.progress,
        in_step=not gpu(),  # where a step is sent to the GPU while the last one runs, no step has a time of its own
        seconds=run.seconds, at_the_end=look,
    )  # fmt: skip
    sides = {side: found.what for side, found in experiment.sides.items()}
    phases = [asdict(phase) for phase in experiment.phases]
    return Measured(
        {"dtype": run.dtype, "cores": run.cores, "phases": phases, **kernels}, rounds,
        summarise_rates(experiment.what, sides, experiment.comparisons, rounds),
    )  # fmt: skip
