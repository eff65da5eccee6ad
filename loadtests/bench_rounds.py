"""Engines side by side: they stay loaded and take turns in rounds, one at work at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from rich.progress import Progress

from loadtests.bench_inputs import Inputs
from loadtests.bench_report import Comparison, Rates, decode_rate, prefill_rate
from loadtests.bench_sides import Batch, Engine

WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Phase:
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

    def batch(self, phase: Phase, inputs: Inputs, seed: Sequence[int]) -> Batch:
        """The phase's requests, with prompts that no other seed gives. `seed` begins with the round: where it begins
        among the names."""
        prompts, first = inputs.random_prompts(seed, phase.requests, phase.prompt_tokens), seed[0] * phase.requests
        names = [self.names[(first + index) % len(self.names)] for index in range(phase.requests)]
        return Batch(prompts, names, phase.tokens)


@dataclass(frozen=True)
class Experiment:
    """Sides and phases, and what is to be made of their rates."""

    what: str
    sides: Mapping[str, Side]
    phases: Sequence[Phase]
    comparisons: Sequence[Comparison]

    def once(self) -> Experiment:
        """The same without the sides that are there a second time, to show the noise: for when memory is short."""
        sides = {name: side for name, side in self.sides.items() if not name.endswith(" again")}
        comparisons = [
            replace(each, under=under)
            for each in self.comparisons
            if each.over in sides and (under := tuple(side for side in each.under if side in sides))
        ]
        return replace(self, sides=sides, comparisons=comparisons)


def rates_by_round(experiment: Experiment, rounds: int, inputs: Inputs, progress: Progress) -> list[Rates]:
    """Tokens per second by side and phase, for every round that counts."""
    sides, counted = experiment.sides, list[Rates]()
    with ExitStack() as running:
        engines = list({id(side.engine): side.engine for side in sides.values()}.values())
        starting = progress.add_task("", total=len(engines))
        for engine in engines:
            progress.update(starting, description=f"starting {engine.label} (a first start compiles for minutes)")
            running.enter_context(engine)
            progress.advance(starting)
        progress.remove_task(starting)
        total = (WARM_UP_ROUNDS + rounds) * len(experiment.phases) * len(sides)
        task = progress.add_task("", total=total)
        for number in range(WARM_UP_ROUNDS + rounds):
            rates: dict[str, dict[str, float]] = {name: {} for name in sides}
            what = "warm-up" if number < WARM_UP_ROUNDS else f"round {number + 1 - WARM_UP_ROUNDS}"
            for index, phase in enumerate(experiment.phases):
                for name in turns(list(sides), number):
                    progress.update(task, description=f"{what}: {phase.name}, {name}")
                    times = sides[name].engine.run(sides[name].batch(phase, inputs, (number, index)))
                    rates[name][phase.name] = prefill_rate(times) if phase.tokens == 1 else decode_rate(times)
                    progress.advance(task)
            if number >= WARM_UP_ROUNDS:
                counted.append(rates)
        progress.remove_task(task)
    return counted


def turns(sides: Sequence[str], number: int) -> list[str]:
    """The order of a round: each time another side begins, and after all have begun once, backwards."""
    start = number % len(sides)
    order = [*sides[start:], *sides[:start]]
    return order[::-1] if number // len(sides) % 2 else order
