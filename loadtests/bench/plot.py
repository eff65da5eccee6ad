"""A record of the benchmark as a picture beside it. `python -m loadtests.bench.plot FILE...` draws it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import typer
from matplotlib.axes import Axes

app = typer.Typer(add_completion=False)
HEIGHT = 0.28
"""of a row, in inches"""


@app.command()
def main(files: Annotated[list[Path], typer.Argument(help="Records in loadtests/results/.", exists=True)]) -> None:
    """Draw the picture of each record again, and write it beside the record."""
    for file in files:
        typer.echo(draw(json.loads(file.read_text()), file.with_suffix(".svg")) or f"nothing to draw in {file}")


def draw(record: Mapping[str, Any], path: Path) -> Path | None:
    """Write the picture of a record, a panel for each part that has one; None when no part has."""
    found = [(part, *PANELS[shape]) for part in record["summary"].values() for shape in PANELS if shape in part]
    if not found:
        return None
    heights = [rows(part) for part, rows, _ in found]
    plt.rcParams.update({"svg.hashsalt": "vllm-edits", "svg.fonttype": "none"})  # the same record is the same file
    figure, axes = plt.subplots(
        len(found), figsize=(9, sum(heights) * HEIGHT + 1.2 * len(found)), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, (part, _, panel) in zip(axes[:, 0], found, strict=True):
        panel(axis, part)
    figure.suptitle(f"{record['device']['name']}, {record['at'][:10]}", fontsize="medium")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def _ratios(axis: Axes, found: Mapping[str, Any]) -> None:
    """Every ratio with its interval; the least that is asked for as a tick; red where it is missed."""
    rows = found["ratios"][::-1]
    for height, row in enumerate(rows):
        colour = "tab:red" if row["verdict"].startswith("missed") else "tab:green" if row["verdict"] else "tab:grey"
        axis.plot([row["low"], row["high"]], [height, height], color=colour)
        axis.plot(row["median"], height, "o", color=colour, markersize=4)
        if row["target"] is not None:
            axis.plot(row["target"], height, "|", color="black", markersize=10)
    names = [f"{row['over']} / {' & '.join(row['under'])}, {row['phase']}" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize="x-small")
    axis.axvline(1, color="lightgrey", zorder=0)
    axis.set_title(f"{found['what']}: ratios within a round, 95 %", fontsize="small")


def _traffic(axis: Axes, found: Mapping[str, Any]) -> None:
    """Tokens per second and times of every side, relative to vLLM alone."""
    sides = [side for side, row in found["traffic"].items() if row["relative"]]
    names = list(found["traffic"][sides[0]]["relative"])
    for number, name in enumerate(names):
        rows = [found["traffic"][side]["relative"][name] for side in sides]
        heights = [len(sides) - 1 - height + 0.15 * (number - 1.5) for height in range(len(sides))]
        medians = [row["median"] for row in rows]
        spread = [[row["median"] - row["low"] for row in rows], [row["high"] - row["median"] for row in rows]]
        axis.errorbar(medians, heights, xerr=spread, fmt="o", markersize=3, label=name, linewidth=1)
    axis.set_yticks(range(len(sides)), sides[::-1], fontsize="x-small")
    axis.axvline(1, color="lightgrey", zorder=0)
    axis.legend(fontsize="x-small", loc="best")
    axis.set_title("vllm bench serve, relative to vLLM alone", fontsize="small")


PANELS: Mapping[str, tuple[Callable[[Any], int], Callable[[Axes, Any], None]]] = {
    "ratios": (lambda part: len(part["ratios"]), _ratios),
    "traffic": (lambda part: 2 * len(part["traffic"]), _traffic),
}
"""By what a part's summary holds: how many rows its panel has, and how to draw it."""


if __name__ == "__main__":
    app()
