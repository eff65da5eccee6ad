"""Reports the evidence of an experiment: verdicts, a table, a page, a picture. Pure, except `picture`.

It first tests whether the shares of units in the arms are as declared. If they are not, something else than the hash
chose the arms. Then differences between arms may have other causes than the variant, and the report draws no
conclusion.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from vllm_edits.edit_store.errors import EditsError, nearest
from vllm_edits.edit_store.experiments.document import BUILT_IN
from vllm_edits.plugin.experiments.analysis.evidence import Caveats, Evidence
from vllm_edits.plugin.experiments.analysis.sequences import ArmMean, Interval, SampleRatio, difference, sample_ratio

Goal = Literal["increase", "decrease"]
GOALS: Mapping[str, Goal] = {name: goal for name, goal in BUILT_IN.items() if goal}
"""The better direction of the built-in metrics. More output is neither better nor worse."""

CONTROL, BETTER, WORSE, DIFFERS = "control", "better", "worse", "differs"
NO_DIFFERENCE, TOO_FEW, MISMATCH = "no difference seen yet", "too few units", "sample ratio mismatch"
COLUMNS = {
    "metric": "metric", "arm": "arm", "mean": "mean", "units": "units", "requests": "requests",
    "difference": "difference", "lift": "relative", "verdict": "verdict",
}  # fmt: skip
_COLOURS = {BETTER: "#2ca02c", WORSE: "#d62728", MISMATCH: "#d62728", DIFFERS: "#1f77b4"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left }
svg { max-width: 100%; height: auto }
"""


class NoMatplotlib(EditsError):
    """A picture needs matplotlib, which is not installed."""


@dataclass(frozen=True)
class ArmShare:
    """An arm of the experiment. share: its declared share of the units, at any scale, above 0."""

    name: str
    share: float
    is_control: bool = False


@dataclass(frozen=True)
class ReportLine:
    """One metric in one arm. mean: None without requests. difference: to the control, None with too few requests."""

    metric: str
    arm: str
    mean: float | None
    units: int
    requests: int
    difference: Interval | None
    lift: float | None
    """the difference divided by the control's mean"""
    verdict: str

    def as_row(self) -> dict[str, Any]:
        """The fields for a table, with rounded numbers."""
        found = self.difference
        shown = "" if found is None else f"{found.estimate:+.3g} ({found.low:+.3g} to {found.high:+.3g})"
        return {
            **{name: getattr(self, name) for name in COLUMNS},
            "mean": "" if self.mean is None else f"{self.mean:.4g}",
            "difference": shown,
            "lift": "" if self.lift is None else f"{self.lift:+.1%}",
        }


@dataclass(frozen=True)
class Report:
    """The report on one phase. Each single interval is valid at all looks with probability 1 - alpha."""

    experiment: str
    phase: int
    alpha: float
    arms: tuple[ArmShare, ...]
    units: Mapping[str, int]
    versions: Mapping[str, str]
    sample_ratio: SampleRatio
    lines: tuple[ReportLine, ...]
    caveats: Caveats


def summarise(
    evidence: Evidence, arms: Sequence[ArmShare], *,
    goals: Mapping[str, Goal] | None = None, alpha: float = 0.05, tuned_for: int = 5000,
) -> Report:  # fmt: skip
    """Compare every arm with the control, metric by metric.

    goals: better directions of metrics by name, in addition to GOALS. tuned_for: expected number of requests, or of
    feedback values, in the control and one arm together at the time of the decision.
    """
    names = [arm.name for arm in arms]
    controls = [arm.name for arm in arms if arm.is_control]
    if len(controls) != 1:
        raise EditsError(f"expected one control among the arms {', '.join(names)}, found {len(controls)}")
    if unknown := [name for name in evidence.units if name not in names]:
        known = f"Its arms: {', '.join(names)}.{nearest(unknown[0], names)}"
        raise EditsError(
            f"the logs contain an arm {unknown[0]!r} that experiment {evidence.experiment!r} does not have. {known}"
        )
    units = {name: evidence.units.get(name, 0) for name in names}
    ratio = sample_ratio(list(units.values()), [arm.share for arm in arms])
    wished = {**GOALS, **(goals or {})}

    def line(metric: str, arm: str, mean: ArmMean | None, control: ArmMean | None) -> ReportLine:
        found: Interval | None = None
        lift: float | None = None
        enough = mean is not None and control is not None and mean.is_enough and control.is_enough
        if mean and control and arm not in controls:
            found = difference(control, mean, alpha=alpha, tuned_for=tuned_for)
            lift = found.estimate / abs(control.mean) if found and control.mean else None
        verdict = _verdict(found, wished.get(metric)) if enough else TOO_FEW
        verdict = CONTROL if arm in controls else MISMATCH if ratio.mismatch else verdict
        counted: tuple[float | None, int, int] = (mean.mean, mean.units, mean.requests) if mean else (None, 0, 0)
        return ReportLine(metric, arm, *counted, found, lift, verdict)

    lines = []
    for metric, sums in evidence.metrics.items():
        means = {name: ArmMean.of(each.sums, each.counts) for name, each in sums.items()}
        lines += [line(metric, name, means.get(name), means.get(controls[0])) for name in names]
    return Report(
        evidence.experiment, evidence.phase, alpha, tuple(arms), units, evidence.versions, ratio, tuple(lines),
        evidence.caveats,
    )  # fmt: skip


def _verdict(found: Interval | None, goal: Goal | None) -> str:
    if found is None or found.low <= 0 <= found.high:
        return NO_DIFFERENCE
    if goal is None:
        return DIFFERS
    return BETTER if (found.estimate > 0) == (goal == "increase") else WORSE


# -- output ------------------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain data."""
    return asdict(report)


def table(report: Report) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows and columns for `show`."""
    return [line.as_row() for line in report.lines], COLUMNS


def remarks(report: Report) -> list[str]:
    """Remarks before the table: units per arm, the meaning of the intervals, and excluded records."""
    caveats, ratio = report.caveats, report.sample_ratio
    whole = sum(arm.share for arm in report.arms)
    came = (f"{arm.name} {report.units[arm.name]} ({arm.share / whole:.3g} declared)" for arm in report.arms)
    told = [f"units: {', '.join(came)}"]
    if ratio.mismatch:
        told.append(f"sample ratio mismatch (p {ratio.p_value:.2g}): find the cause before you draw conclusions")
    if compared := sum(line.difference is not None for line in report.lines):
        told.append(
            f"{compared} differences. Each interval is valid at all looks with probability {1 - report.alpha:.0%}: if "
            f"no arm has an effect, at most {compared * report.alpha:.2g} of the intervals are expected to be wrong"
        )
    counted = {
        "requests whose arm was not chosen by hash, left out": caveats.not_by_hash,
        **{
            f"requests of {arm} from the time of another version, left out": n
            for arm, n in caveats.other_versions.items()
        },
        "repeated lines, left out": caveats.repeated,
        "repeated lines with other content": caveats.contradicting,
        "feedback without a request in the logs, included": caveats.feedback_alone,
        "units in two arms, although a unit should have one arm": caveats.units_in_two_arms,
        "logs that end with an incomplete line": caveats.half_lines,
    }
    return told + [f"{number} {what}" for what, number in counted.items() if number]


def html(report: Report) -> str:
    """A self-contained HTML page: remarks, table, and the picture if matplotlib is installed."""
    title = escape(f"{report.experiment}, phase {report.phase}")
    told = "".join(f"<li>{escape(remark)}</li>\n" for remark in remarks(report))
    head = "".join(f"<th>{escape(heading)}</th>" for heading in COLUMNS.values())
    body = ""
    for line in report.lines:
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in line.as_row().values())
        body += f'<tr style="color: {_COLOURS.get(line.verdict, "inherit")}">{cells}</tr>\n'
    drawing = io.StringIO()
    with suppress(NoMatplotlib):
        picture(report, drawing)
    svg = "".join(drawing.getvalue().partition("<svg")[1:])  # without the XML prologue
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head>\n<body><h1>{title}</h1>\n<ul>\n{told}</ul>\n<table><tr>{head}</tr>\n{body}</table>\n{svg}</body></html>\n"
    )


def picture(report: Report, where: Path | io.StringIO) -> bool:
    """Draw every difference with its interval: one panel per metric, one row per arm. False if there is no difference.

    where: a file (.png or .svg), or a text stream for SVG.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise NoMatplotlib("drawing needs matplotlib, which is not installed: pip install matplotlib") from None
    compared = [(line, line.difference) for line in reversed(report.lines) if line.difference is not None]
    panels = {line.metric: [pair for pair in compared if pair[0].metric == line.metric] for line, _ in compared[::-1]}
    if not panels:
        return False
    figure = Figure(figsize=(8, 0.3 * len(compared) + 0.8 * len(panels)), layout="constrained")
    heights = [len(rows) for rows in panels.values()]
    axes = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, (metric, rows) in zip(axes[:, 0], panels.items(), strict=True):
        for height, (line, found) in enumerate(rows):
            colour = _COLOURS.get(line.verdict, "grey")
            axis.plot([found.low, found.high], [height, height], color=colour)
            axis.plot(found.estimate, height, "o", color=colour, markersize=4)
        axis.axvline(0, color="lightgrey", zorder=0)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_yticks(range(len(rows)), [line.arm for line, _ in rows], fontsize="x-small")
        axis.set_title(f"{metric}: difference to the control", fontsize="small", parse_math=False)
        for label in axis.get_yticklabels():  # a dollar sign in a name is no formula
            label.set_parse_math(False)
    kind = where.suffix[1:] if isinstance(where, Path) else "svg"
    with mpl.rc_context({"svg.hashsalt": "vllm-edits", "svg.fonttype": "none"}):  # the same report gives the same file
        figure.savefig(where, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return True
