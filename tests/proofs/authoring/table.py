"""The table of all proofs, as the page on authoring shows it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.proofs.authoring.measuring import spread

RECORDS = Path(__file__).parent
PAGE = Path("edit_store/authoring/README.md")
TITLES = {"smollm2-135m-instruct": "SmolLM2-135M-Instruct", "gemma-3-270m": "Gemma-3-270M"}
BEGIN, END = "<!-- table of the proofs: begin -->", "<!-- table of the proofs: end -->"
HEAD = (
    "| method | measure | base | edited | negated | control | further figures, base → edited "
    "| side effects: KL, perplexity | served, difference | time, memory, size |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def record_of(model: str) -> Path:
    """The file with one model's figures."""
    return RECORDS / f"{model}.json"


def kept(model: str) -> dict[str, Any]:
    """The figures of a model so far, by row."""
    path = record_of(model)
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def written(page: str, models: Mapping[str, str]) -> str:
    """A page with the tables in it, one for each model with figures, by its title."""
    parts = [f"{title}:\n\n{HEAD}{''.join(_rows(kept(model)))}" for model, title in models.items() if kept(model)]
    before, _, rest = page.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return f"{before}{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}{behind}"


def _rows(figures: Mapping[str, Any]) -> Iterator[str]:
    for name, of in figures.items():
        if "refused" in of:
            yield f"| {name} | not built: {of['refused']} | | | | | | | | |\n"
            continue
        served = "" if of["served"] is None else f"{of['served']:.1e}"
        negated = "" if of["negated"] is None else number(of["negated"])
        side = f"{of['side_effects']['kl']:.3f}, {of['side_effects']['perplexity']:.2f}"
        cost = f"{of['seconds']:.0f} s, {of['memory_gib']:.1f} GiB, {of['megabytes']:.2g} MB"
        control = f"{ranged(of['control'])} ({of['control_is']})"
        parts = [f"{each} {number(a)} → {number(b)}" for each, (a, b) in of["more"].items()]
        more = "; ".join([*parts, *filter(None, [of.get("told")])])
        yield (
            f"| {name} | {of['measure']} | {number(of['base'])} | {ranged(of['edited'])} | {negated} | {control} "
            f"| {more} | {side} | {served} | {cost} |\n"
        )


def ranged(values: list[float]) -> str:
    """A mean with its range, or one value."""
    middle, least, most = spread(values)
    return number(middle) if len(values) == 1 else f"{number(middle)} ({number(least)} to {number(most)})"


def number(value: float) -> str:
    """A figure with two digits behind the point."""
    return f"{value:.2f}"
