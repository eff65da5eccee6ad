"""Engines side by side: they stay loaded and take turns in rounds, one at work at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf
from statistics import harmonic_mean

from rich.progress import Progress

from loadtests.bench.inputs import Inputs
from loadtests.bench.report import Comparison, Rates, decode_rate, prefill_rate, rate_of_steps
from loadtests.bench.sides import Batch, Engine

WARM_UP_ROUNDS, LEAST_ROUNDS = 2, 3
PREFILLS = 4
"""How often a round measures a prefill where engines take turns step by step: it is one step only."""


@dataclass(frozen=True)
class Stage:
    """A batch that is timed: with `tokens` of 1 its prefill, in tokens of prompts per second, else its decoding."""

    name: str
    requests: int
    prompt_tokens: int
    tokens: int = 1


@dataclass(frozen=True)
class Side:
    """What is compared: an engine, and who answers. Each request of a batch takes the next of `names` (None: base)."""

    what: str
    engine: Engine
    names: Sequence[str | None]
    reads: int = 0
    """bytes of memory that each step reads besides; only where engines take turns step by step"""

    def batch(self, phase: Stage, inputs: Inputs, seed: Sequence[int]) -> Batch:
        """The phase's requests, with prompts that no other seed gives. `seed` begins with the round: where it begins
        among the names."""
        prompts, first = inputs.random_prompts(seed, phase.requests, phase.prompt_tokens), seed[0] * phase.requests
        names = [self.names[(first + index) % len(self.names)] for index in range(phase.requests)]
        return Batch(prompts, names, phase.tokens, self.reads)


@dataclass(frozen=True)
class Trial:
    """Sides and phases, and what is to be made of their rates."""

    what: str
    sides: Mapping[str, Side]
    phases: Sequence[Stage]
    comparisons: Sequence[Comparison]

    def once(self) -> Trial:
        """The same without the sides that are there a second time, to show the noise: for when memory is short."""
        sides = {name: side for name, side in self.sides.items() if not name.endswith(" again")}
        comparisons = [
            replace(each, under=under)
            for each in self.comparisons
            if each.over in sides and (under := tuple(side for side in each.under if side in sides))
        ]
        return replace(self, sides=sides, comparisons=comparisons)

    def heats(self) -> list[list[str]]:
        """Sides that can work at the same time: of each engine one, and in every heat those that others are held
        against."""
        of_engine: dict[int, list[str]] = {}
        for name, side in self.sides.items():
            of_engine.setdefault(id(side.engine), []).append(name)
        always = {name for each in self.comparisons for name in each.under}
        if clash := next((names for names in of_engine.values() if len(names) > 1 and always & {*names}), None):
            raise ValueError(f"sides of one engine cannot be held against each other: {', '.join(clash)}")
        return [
            [name for names in of_engine.values() for name in (names if always & {*names} else names[heat : heat + 1])]
            for heat in range(max(map(len, of_engine.values())))
        ]


def rates_by_round(
    experiment: Trial,
    rounds: int,
    inputs: Inputs,
    progress: Progress,
    *,
    in_step: bool,
    seconds: float = inf,
    at_the_end: Callable[[list[Rates]], None] = lambda _: None,
) -> list[Rates]:
    """Tokens per second by side and phase, for every round that counts.

    in_step: engines take turns step by step, not batch by batch; then a round holds one side of each. Otherwise they
    are on a GPU, and start side by side. seconds: after so many no further round begins, if there are enough.
    at_the_end: is told the rates while the engines still run
    """
    counted, measure = list[Rates](), _in_step if in_step else _one_by_one
    end = time.monotonic() + seconds
    with ExitStack() as running:
        engines = list({id(side.engine): side.engine for side in experiment.sides.values()}.values())
        starting = progress.add_task("starting engines (a first start compiles for minutes)", total=len(engines))
        with ThreadPoolExecutor(1 if in_step else len(engines)) as pool:
            for started in as_completed([pool.submit(running.enter_context, engine) for engine in engines]):
                started.result()
                progress.advance(starting)
        progress.remove_task(starting)
        heats = experiment.heats() if in_step else [list(experiment.sides)]
        total = (WARM_UP_ROUNDS + rounds) * len(experiment.phases) * len(heats)
        task = progress.add_task("", total=total)
        for number in range(WARM_UP_ROUNDS + rounds):
            if number >= WARM_UP_ROUNDS + LEAST_ROUNDS and time.monotonic() > end:
                break
            what = "warm-up" if number < WARM_UP_ROUNDS else f"round {number + 1 - WARM_UP_ROUNDS}"
            for turn, heat in enumerate(heats):
                rates: dict[str, dict[str, float]] = {name: {} for name in heat}
                for index, phase in enumerate(experiment.phases):
                    progress.update(task, description=f"{what}: {phase.name}")
                    sides = {name: experiment.sides[name] for name in turns(heat, number)}
                    for name, rate in measure(sides, phase, inputs, (number, index, turn)).items():
                        rates[name][phase.name] = rate
                    progress.advance(task)
                if number >= WARM_UP_ROUNDS:
                    counted.append(rates)
        progress.remove_task(task)
        at_the_end(counted)
    return counted


def _one_by_one(sides: Mapping[str, Side], phase: Stage, inputs: Inputs, seed: Sequence[int]) -> dict[str, float]:
    """Each side runs its batch to the end before the next begins."""
    rate = prefill_rate if phase.tokens == 1 else decode_rate
    return {name: rate(side.engine.run(side.batch(phase, inputs, seed))) for name, side in sides.items()}


def _in_step(sides: Mapping[str, Side], phase: Stage, inputs: Inputs, seed: Sequence[int]) -> dict[str, float]:
    """All take a step each, then the next: what disturbs the machine for longer than a step disturbs all alike."""
    several = list[dict[str, float]]()
    for again in range(PREFILLS if phase.tokens == 1 else 1):
        order = turns(list(sides), again)
        batches = {name: sides[name].batch(phase, inputs, (*seed, again)) for name in order}
        steps = _steps({name: sides[name].engine for name in order}, batches)
        several.append({
            name: rate_of_steps(seconds, phase.requests, phase.prompt_tokens, phase.tokens)
            for name, seconds in steps.items()
        })  # fmt: skip
    return {name: harmonic_mean(each[name] for each in several) for name in sides}


def _steps(engines: Mapping[str, Engine], batches: Mapping[str, Batch]) -> dict[str, Sequence[float]]:
    """The seconds of each step of every engine's batch, taken in turns; another engine goes first each time."""
    for name, engine in engines.items():
        engine.begin(batches[name])
    steps, waiting = dict[str, Sequence[float]](), list(engines)
    while waiting:
        for name in waiting:
            if (seconds := engines[name].step()) is not None:
                steps[name] = seconds
        waiting = [name for name in [*waiting[1:], waiting[0]] if name not in steps]
    return steps


def turns(sides: Sequence[str], number: int) -> list[str]:
    """The order of a round: each time another side begins, and after all have begun once, backwards."""
    start = number % len(sides)
    order = [*sides[start:], *sides[:start]]
    return order[::-1] if number // len(sides) % 2 else order
