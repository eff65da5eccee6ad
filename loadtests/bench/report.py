"""The benchmark's figures: computed from what was timed, held against the targets, and told. Pure but for `show`.

Machines drift and neighbours interfere, so sides are compared within a round, a step or a batch apart, and the median
of these ratios counts. Its 95 % interval comes from resampling the rounds; a verdict that the interval does not carry
says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

Points = npt.NDArray[np.float64]
Rates = Mapping[str, Mapping[str, float]]
"""Tokens per second of a round, by side, then phase; of the sides that were in it."""


@dataclass(frozen=True)
class RequestTimes:
    """The engine's own stamps of one request, in seconds on one clock."""

    scheduled: float
    first_token: float
    last_token: float
    prompt_tokens: int
    output_tokens: int


def decode_rate(requests: Sequence[RequestTimes]) -> float:
    """Tokens per second after the first ones, over requests whose first tokens came out of one step."""
    first = {request.first_token for request in requests}
    if len(first) != 1:
        raise ValueError(f"expected one step to prefill all {len(requests)} requests, found {len(first)}")
    tokens = sum(request.output_tokens - 1 for request in requests)
    return tokens / (max(request.last_token for request in requests) - first.pop())


def prefill_rate(requests: Sequence[RequestTimes]) -> float:
    """Prompt tokens per second, from the first request scheduled to the last first token."""
    seconds = max(request.first_token for request in requests) - min(request.scheduled for request in requests)
    return sum(request.prompt_tokens for request in requests) / seconds


def rate_of_steps(seconds: Sequence[float], requests: int, prompt_tokens: int, tokens: int) -> float:
    """One of the two, by what each step took: with one token for each request the rate of prefill, which is the first
    step; with more, the rate of decoding in all others."""
    if len(seconds) != tokens:
        raise ValueError(f"expected {tokens} steps, one to prefill all {requests} requests, found {len(seconds)}")
    return requests * prompt_tokens / seconds[0] if tokens == 1 else requests * (tokens - 1) / sum(seconds[1:])


@dataclass(frozen=True)
class Figure:
    """The median of some samples, with the interval that holds it with 95 % confidence, and the samples' range."""

    median: float
    low: float
    high: float
    smallest: float
    largest: float
    n: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Figure:
        values = np.asarray(list(samples), dtype=float)
        resampled = np.random.default_rng(0).choice(values, size=(4000, len(values)))
        low, high = np.quantile(np.median(resampled, axis=1), (0.025, 0.975))
        return cls(
            float(np.median(values)), float(low), float(high), float(values.min()), float(values.max()), len(values)
        )

    @classmethod
    def of_slope(cls, xs: Sequence[float], ys: Sequence[float]) -> Figure:
        """How much y grows for every x: the median slope between two points (Theil and Sen), points resampled.

        smallest and largest are of the slopes between neighbours, and n is the number of points.
        """
        points = np.column_stack([xs, ys]).astype(float)
        chosen = np.random.default_rng(0).integers(len(points), size=(400, len(points)))
        low, high = np.quantile([_median_slope(points[each]) for each in chosen], (0.025, 0.975))
        steps = np.diff(points[:, 1]) / np.diff(points[:, 0])
        return cls(_median_slope(points), float(low), float(high), float(steps.min()), float(steps.max()), len(points))


def _median_slope(points: Points) -> float:
    first, second = np.triu_indices(len(points), 1)
    run, rise = (points[second] - points[first]).T
    return float(np.median(rise[run != 0] / run[run != 0]))


@dataclass(frozen=True)
class Comparison:
    """One side's rate over the mean of others', round by round; `target` is the least that is asked for, if anything.

    Two processes that differ in nothing differ in speed by some percent for their whole life: by where their memory
    lies. So what others are held against should be several such processes.
    """

    over: str
    under: tuple[str, ...]
    phase: str
    target: float | None = None

    def of(self, rounds: Sequence[Rates]) -> Figure:
        return Figure.of(
            each[self.over][self.phase] / statistics.mean(each[side][self.phase] for side in self.under)
            for each in rounds
            if each.keys() >= {self.over, *self.under}
        )


def verdict(figure: Figure, target: float | None, *, at_most: bool = False) -> str:
    """'met' or 'missed', and 'within noise' when the interval reaches over the target; '' without one."""
    if target is None:
        return ""
    sign = -1 if at_most else 1
    ends = [sign * (end - target) >= 0 for end in (figure.low, figure.high)]
    word = "met" if sign * (figure.median - target) >= 0 else "missed"
    return word if ends[0] == ends[1] else f"{word}, within noise"


def summarise_rates(
    what: str, sides: Mapping[str, str], comparisons: Iterable[Comparison], rounds: Sequence[Rates]
) -> dict[str, Any]:
    """Rates by side and phase, and every comparison; `sides` says of each what it is."""
    phases = {side: sorted(rates) for each in rounds for side, rates in each.items()}
    return {
        "what": what,
        "sides": dict(sides),
        "tokens_per_second": {
            side: {
                phase: asdict(Figure.of(each[side][phase] for each in rounds if side in each)) for phase in phases[side]
            }
            for side in sides
        },
        "ratios": [
            {**asdict(compared), **asdict(figure), "verdict": verdict(figure, compared.target)}
            for compared in comparisons
            for figure in [compared.of(rounds)]
        ],
    }


# -- swaps -------------------------------------------------------------------------------------------------------------


def gaps_within(token_times: Sequence[Sequence[float]], begin: float, end: float) -> list[float]:
    """Every time between two tokens of one stream that ended in [begin, end]."""
    return [gap for gap, _ in gaps_with_begins(token_times, begin, end)]


def gaps_with_begins(token_times: Sequence[Sequence[float]], begin: float, end: float) -> list[tuple[float, float]]:
    """The same, each with the moment at which it began."""
    return [
        (later - earlier, earlier) for times in token_times for earlier, later in pairwise(times)
        if begin <= later <= end
    ]  # fmt: skip


@dataclass(frozen=True)
class SwapTiming:
    """One swap under load, in seconds. The calm window has the same length and the same requests, but no swap."""

    promote: float
    """appending to the store"""
    sync: float
    """POST /v1/edits/sync: everything until the name is switched"""
    first_answer: float
    """from before the promotion to the first token on the new version"""
    phases: dict[str, float]
    """the server's own account of the sync"""
    stall: float
    """longest time between two tokens that any running stream saw in the swap's window"""
    calm_stall: float
    """the same in the calm window"""
    step: float
    """median time between two tokens in the calm window"""


def summarise_swaps(swaps: Sequence[SwapTiming]) -> dict[str, Any]:
    """Medians of every figure, and the stall's target: at most one ordinary step more than without a swap."""
    extra = Figure.of(swap.stall - swap.calm_stall for swap in swaps)
    step = statistics.median(swap.step for swap in swaps)
    timed = ("promote", "sync", "first_answer", "stall", "calm_stall", "step")
    return {
        "seconds": {name: asdict(Figure.of(getattr(swap, name) for swap in swaps)) for name in timed},
        "phases": {name: asdict(Figure.of(swap.phases[name] for swap in swaps)) for name in swaps[0].phases},
        "extra_stall": {**asdict(extra), "target": step, "verdict": verdict(extra, step, at_most=True)},
    }


# -- telling -----------------------------------------------------------------------------------------------------------


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print a run's summary as tables."""
    for name, found in summary.items():
        _SHOWN.get(name, _show_rates)(found, console)


def _show_rates(part: Mapping[str, Any], console: Console) -> None:
    phases = list(dict.fromkeys(phase for rates in part["tokens_per_second"].values() for phase in rates))
    table = Table("side", "", *phases, title=f"{part['what']}: median tokens per second (range)")
    for side, rates in part["tokens_per_second"].items():
        cells = (
            f"{rates[phase]['median']:.0f} ({rates[phase]['smallest']:.0f}–{rates[phase]['largest']:.0f})"
            if phase in rates else ""
            for phase in phases
        )  # fmt: skip
        table.add_row(side, part["sides"][side], *cells)
    console.print(table)
    table = Table("", "", "ratio", "95 %", "target", "", title="Medians of the ratios within a round")
    for row in part["ratios"]:
        target = f"≥ {row['target']:g}" if row["target"] is not None else ""
        interval = f"{row['low']:.3f}–{row['high']:.3f}"
        compared = f"{row['over']} / {' & '.join(row['under'])}"
        table.add_row(compared, row["phase"], f"{row['median']:.3f}", interval, target, _coloured(row["verdict"]))
    console.print(table)


def _show_swaps(swaps: Mapping[str, Any], console: Console) -> None:
    seconds, extra = swaps["seconds"], swaps["extra_stall"]
    table = Table("", "median", "range", "target", "", title=f"{extra['n']} swaps under load, in milliseconds")

    def add(label: str, row: Mapping[str, Any], target: str = "", word: str = "") -> None:
        spread = f"{row['smallest'] * 1000:.1f}–{row['largest'] * 1000:.1f}"
        table.add_row(label, f"{row['median'] * 1000:.1f}", spread, target, _coloured(word))

    add("promote to first answer on the new version", seconds["first_answer"])
    add("  append to the store", seconds["promote"])
    add("  sync: until the name is switched", seconds["sync"])
    for phase, row in swaps["phases"].items():
        add(f"    {phase}", row)
    add("median time between two tokens", seconds["step"])
    add("longest time between two tokens, no swap", seconds["calm_stall"])
    add("longest time between two tokens, swap", seconds["stall"])
    add("  how much longer with a swap", extra, f"≤ {extra['target'] * 1000:.1f}", extra["verdict"])
    console.print(table)


def _show_paging(paging: Mapping[str, Any], console: Console) -> None:
    seconds, miss = paging["singles"]["seconds"], paging["singles"]["miss"]
    table = Table("to the first token, one request at a time", "median", "range", "target", "", title="In milliseconds")
    for label, row in seconds.items():
        table.add_row(label, f"{row['median'] * 1e3:.1f}", f"{row['smallest'] * 1e3:.1f}–{row['largest'] * 1e3:.1f}")
    spread = f"{miss['low'] * 1e3:.1f}–{miss['high'] * 1e3:.1f} (95 %)"
    target, word = f"≤ {miss['target'] * 1e3:.1f}", _coloured(miss["verdict"])
    table.add_row("  what a miss adds", f"{miss['median'] * 1e3:.1f}", spread, target, word)
    console.print(table)
    table = Table("traffic", "requests", "found on the device", "mean wait for the others, ms", title="Paging")
    for label in (label for label in paging if label != "singles"):
        row = paging[label]
        waits = ", ".join(f"{found} {wait * 1e3:.0f}" for found, wait in row["mean_wait"].items())
        table.add_row(label, str(row["requests"]), f"{row['hit_rate']:.1%}", waits)
    console.print(table)


def _show_endurance(found: Mapping[str, Any], console: Console) -> None:
    table = Table("", "per swap", "95 %", "target", "", title=f"{found['swaps']} swaps in a row under load")
    memory = found["memory"]["bytes_per_swap"]
    rows = [
        ("memory, bytes", memory, f"≤ {memory['target']}", memory["verdict"]),
        ("with what the engine's steps leave", found["memory"]["bytes_per_swap_with_its_steps"], "", ""),
        ("memory per step, without a swap", found["memory"]["bytes_per_step"], "", ""),
        ("open files", found["files_per_swap"], "", ""),
        ("threads", found["threads_per_swap"], "", ""),
    ]
    for label, row, target, word in rows:
        table.add_row(label, f"{row['median']:.3g}", f"{row['low']:.3g}–{row['high']:.3g}", target, _coloured(word))
    for label, seconds in found["seconds"].items():
        table.add_row(f"{label}: promote to first answer, ms", f"{seconds * 1e3:.0f}")
    console.print(table)


def _show_growth(found: Mapping[str, Any], console: Console) -> None:
    growths, restart, targets = found["growths"], found["restart"], found["targets"]
    title = f"A growth of the reservation under {found['streams']} streams, in seconds"
    table = Table("", *growths, "a restart instead", "target", "", title=title)

    def add(label: str, name: str, form: str, instead: float | None = None) -> None:
        told, target, word = "" if instead is None else format(instead, form), "", ""
        if name in targets:
            held = targets[name]
            word = _coloured(held["verdict"])
            if held["target"] is not None:
                target = f"{held['growth']}: {'≤' if held['at_most'] else '≥'} {held['target']:g}"
        table.add_row(label, *(format(row[name], form) for row in growths.values()), told, target, word)

    add("promotion to first answer on the new version", "first_answer", ".1f", restart["first_answer"])
    for phase in next(iter(growths.values()))["phases"]:
        table.add_row(f"  {phase}", *(f"{row['phases'][phase]:.2f}" for row in growths.values()))
    add("longest pause of a worker, as the server reports", "longest_pause", ".3f")
    add("longest time between two pieces of a stream before", "calm_gap", ".3f")
    add("  while it grows", "gap", ".3f", restart["first_answer"])
    add("  which began after the promotion", "gap_at", ".1f")
    add("tokens per second before", "calm_rate", ".1f")
    add("  while it grows", "rate", ".1f", 0)
    add("  ratio", "throughput", ".2f", 0)
    add("models compiled", "compiled", "d")
    console.print(table)


def _show_traffic(found: Mapping[str, Any], console: Console) -> None:
    names = list(next(iter(found["traffic"].values()))["figures"])
    table = Table("", "", *names, title="vllm bench serve: medians over the runs (relative to vLLM alone)")
    for side, row in found["traffic"].items():
        cells = [
            f"{row['figures'][name]['median']:.4g}"
            + (f" ({row['relative'][name]['median']:.2f})" if row["relative"] else "")
            for name in names
        ]
        table.add_row(side, row["what"], *cells)
    console.print(table)


def _show_launches(found: Mapping[str, Any], console: Console) -> None:
    console.print(_by_side(found["launches"], "What a decoding step calls", ".1f"))


def _show_profile(found: Mapping[str, Any], console: Console) -> None:
    console.print(_by_side(found["profile"], "Where a decoding step's time goes: microseconds", ".0f"))


def _by_side(rows: Mapping[str, Any], title: str, form: str) -> Table:
    """What each side is, and its figures."""
    names = [name for name in next(iter(rows.values())) if name != "what"]
    table = Table("", "", *names, title=title)
    for side, row in rows.items():
        table.add_row(side, row["what"], *(format(row[name], form) for name in names))
    return table


def _show_guesses(found: Mapping[str, Any], console: Console) -> None:
    table = Table("", "strength", "guesses kept", title="Speculative decoding with an unedited draft model")
    for name, row in found["guesses"].items():
        table.add_row(name, f"{row['strength']:.2f}", f"{row['kept']:.1%}")
    console.print(table)


_SHOWN: Mapping[str, Callable[[Mapping[str, Any], Console], None]] = {
    "swaps": _show_swaps, "weight_swaps": _show_swaps, "paging": _show_paging, "endurance": _show_endurance,
    "traffic": _show_traffic, "launches": _show_launches, "profile": _show_profile, "guesses": _show_guesses,
    "growth": _show_growth,
}  # fmt: skip
"""How a part of the summary is told, unless it compares the rates of sides."""


def _coloured(word: str) -> str:
    colour = {"met": "green", "missed": "red"}.get(word.partition(",")[0])
    return f"[{colour}]{word}[/{colour}]" if colour else word
