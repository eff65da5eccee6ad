"""What a rehearsal says in the end: the steps, what a decoding step asks, what of a GPU's lines was never reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.places import PLACES, ROOT, UNREACHED, functions

_NEVER = "never reached, and nobody says why"


def coverage_settings(folder: Path, step: str) -> Path:
    """A configuration of coverage for a step and all processes that it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step.replace(' ', '-').replace(',', '')}.rc"
    path.write_text(
        f"[run]\nsource = {ROOT.resolve()}\nparallel = true\ndata_file = {folder / 'data'}\ncontext = {step}\n"
        "core = sysmon\nsigterm = true\npatch = subprocess, execv, _exit\ndisable_warnings = no-data-collected\n"
    )
    return path


def reached(folder: Path) -> dict[str, dict[int, set[str]]]:
    """By file of the plugin and line, the steps that ran it."""
    from coverage import CoverageData

    found: dict[str, dict[int, set[str]]] = {}
    for path in folder.glob("data.*"):
        data = CoverageData(str(path))
        data.read()
        for file in data.measured_files():
            lines = found.setdefault(str(Path(file).relative_to(ROOT.resolve())), {})
            for line, steps in data.contexts_by_lineno(file).items():
                lines.setdefault(line, set()).update(steps)
    return found


def written(
    ended: Mapping[str, tuple[int, float]], facts: Sequence[Mapping[str, Any]],
    ran: Mapping[str, Mapping[int, set[str]]], *, complete: bool,
) -> str:  # fmt: skip
    """The report, in Markdown."""
    lines = [_HEAD, "## Steps", "", "| step | result |", "|---|---|"]
    lines += [f"| {step} | {'ok' if code == 0 else f'failed ({code})'} |" for step, (code, _) in ended.items()]
    lines += ["", *_costs(facts), *_places(ran, list(ended), complete=complete)]
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
        "| room at every layer for | versions | more than vLLM alone | host time over that | of it the plugin's |",
    )
    yield "|---|---|---|---|---|"
    for fact in steps[1:]:
        more = ", ".join(f"{count:+g} {name}" for name, count in fact["more"].items()) or "nothing"
        yield f"| {fact['side']} | {fact['versions']} | {more} | {fact['host_over_alone']} | {fact['filling']:.0f} µs |"
    yield ""


def _places(ran: Mapping[str, Mapping[int, set[str]]], steps: Sequence[str], *, complete: bool) -> Iterator[str]:
    yield from (
        "## What only a GPU reaches",
        "",
        "| place | what matters there | run by | never reached |",
        "|---|---|---|---|",
    )
    by_place = {each.place: each for each in functions()}
    for place, why in PLACES.items():
        function = by_place[place]
        at = ran.get(function.file, {})
        by = [step for step in steps if any(step in at.get(line, ()) for line in function.lines())]
        missed = [f"`{text}`: {_reason(place, text)}" for line, text in function.lines().items() if line not in at]
        told = "<br>".join(missed) if complete else f"{len(missed)} lines"
        yield f"| `{place}` | {why} | {_shortly(by, steps)} | {told} |"


def _shortly(by: Sequence[str], steps: Sequence[str]) -> str:
    if len(by) > 4 and len(by) >= len(steps) - 4:
        return f"all but {', '.join(step for step in steps if step not in by)}" if len(by) < len(steps) else "all"
    return ", ".join(by) or "no step"


def _reason(place: str, text: str) -> str:
    return UNREACHED.get(f"{place}: {text}", _NEVER)


def unexplained(text: str) -> int:
    """How many lines the report says were never reached, without a reason."""
    return text.count(_NEVER)


_HEAD = """# The last rehearsal

Written by `make rehearse-gpu`: vLLM's build for GPUs and the plugin, on a CUDA driver that accepts every call and
computes nothing ([how](README.md)). Nothing here was measured on a GPU.
"""
