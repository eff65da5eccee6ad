"""What a rehearsal says in the end: the steps, what a decoding step asks, what of a GPU's lines was never reached."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from loadtests.harness.record import about
from tests.gpu.places import PLACES, ROOT, UNREACHED, functions
from tests.gpu.steps import Ended

_NEVER = "never reached, and nobody says why"


def coverage_settings(folder: Path, checkout: Path) -> Path:
    """A configuration of coverage for a step in a checkout, and for all processes that it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.rc"
    path.write_text(
        f"[run]\nsource = {checkout / ROOT}\nparallel = true\ndata_file = {folder / 'data'}\n"
        "sigterm = true\npatch = subprocess, execv, _exit\ndisable_warnings = no-data-collected\n"
    )
    return path


@dataclass(frozen=True)
class LastRun(Ended):
    """How a step ended when it was run last, at which commit, what it told, and which lines of the plugin it ran."""

    commit: str
    facts: Sequence[Mapping[str, Any]]
    ran: Mapping[str, AbstractSet[int]]
    """by file"""

    @staticmethod
    def keep(folder: Path, ended: Ended) -> None:
        """Write down how a step ended."""
        commit = about()["versions"]["commit"]
        (folder / "ended.json").write_text(json.dumps({**asdict(ended), "commit": commit}))

    @classmethod
    def of(cls, folder: Path, checkout: Path) -> Self | None:
        """What is left of a step in its folder, that ran in a checkout; None where it was not run."""
        if not (folder / "ended.json").exists():
            return None
        facts = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        return cls(
            **json.loads((folder / "ended.json").read_text()), facts=facts, ran=_ran(folder / "coverage", checkout)
        )


def _ran(folder: Path, checkout: Path) -> dict[str, set[int]]:
    from coverage import CoverageData

    found: dict[str, set[int]] = {}
    for path in folder.glob("data.*"):
        data = CoverageData(str(path))
        data.read()
        for file in data.measured_files():
            found.setdefault(str(Path(file).relative_to(checkout / ROOT)), set()).update(data.lines(file) or ())
    return found


def written(runs: Mapping[str, LastRun | None]) -> str:
    """The report, in Markdown."""
    done = {step: each for step, each in runs.items() if each is not None}
    lines = [_HEAD, "## Steps", "", "| step | result | commit |", "|---|---|---|"]
    lines += [f"| {step} | {each.result if each else 'not run'} | {each.commit if each else ''} |"
              for step, each in runs.items()]  # fmt: skip
    facts = [fact for each in done.values() for fact in each.facts]
    lines += ["", *_costs(facts), *_places({step: each.ran for step, each in done.items() if each.ran})]
    return "\n".join(lines) + "\n"


def _costs(facts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    steps = [fact for fact in facts if fact["what"] == "step"]
    if not steps:
        return
    alone = steps[0]
    yield from ("## What a decoding step of 256 requests asks of the driver", "")
    kept = ("kernels", "launches", "graph launches", "copies to the device", "copies to the host", "waits for an event")
    yield f"vLLM alone: {', '.join(f'{alone[name]:g} {name}' for name in kept)}."
    yield from (
        "",
        "| reserved at every layer | versions | more than vLLM alone | host time over that | of it the plugin's |",
    )
    yield "|---|---|---|---|---|"
    for fact in steps[1:]:
        more = ", ".join(f"{count:+g} {name}" for name, count in fact["more"].items()) or "nothing"
        yield f"| {fact['side']} | {fact['versions']} | {more} | {fact['host_over_alone']} | {fact['filling']:.0f} µs |"
    yield ""


def _places(ran: Mapping[str, Mapping[str, AbstractSet[int]]]) -> Iterator[str]:
    """By step and file, the lines that ran."""
    yield from ("## What only a GPU reaches", "", "| place | what matters there | run by | never reached |")
    yield "|---|---|---|---|"
    by_group = {each.place: each for each in functions()}
    for place, why in PLACES.items():
        function = by_group[place]
        lines = function.lines()
        by = {step: lines.keys() & files.get(function.file, set()) for step, files in ran.items()}
        reached = set[int]().union(*by.values())
        missed = [f"`{text}`: {UNREACHED.get(f'{place}: {text}', _NEVER)}" for line, text in lines.items()
                  if line not in reached]  # fmt: skip
        steps = _shortly([step for step in by if by[step]], list(ran))
        yield f"| `{place}` | {why} | {steps} | {'<br>'.join(missed)} |"


def _shortly(some: Sequence[str], every: Sequence[str]) -> str:
    """The steps, or but which, in the fewer words."""
    others = [step for step in every if step not in some]
    if len(others) < len(some):
        return f"all but {', '.join(others)}" if others else "all"
    return ", ".join(some) or "no step"


def unexplained(text: str) -> int:
    """How many lines the report says were never reached, without a reason."""
    return text.count(_NEVER)


_HEAD = """# The last rehearsal

Written by `make rehearse-gpu`: vLLM's build for GPUs and the plugin, on a CUDA driver that accepts every call and
computes nothing ([how](README.md)). Nothing here was measured on a GPU.
"""
