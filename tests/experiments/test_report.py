"""What a report concludes and, as important, when it concludes nothing."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.experiments.analysis.evidence import Caveats, Evidence, UnitSums
from vllm_edits.plugin.experiments.analysis.report import (
    BETTER,
    COLUMNS,
    CONTROL,
    DIFFERS,
    MISMATCH,
    NO_DIFFERENCE,
    TOO_FEW,
    WORSE,
    ArmShare,
    Goal,
    Report,
    ReportLine,
    as_json,
    html,
    picture,
    remarks,
    summarise,
    table,
)

ARMS = (ArmShare("plain", 1, is_control=True), ArmShare("polite", 1))
NOTHING_STRANGE = Caveats(0, {}, 0, 0, 0, 0)


def sums(mean: float, units: int, seed: int, spread: float = 1.0) -> UnitSums:
    """Units that asked one to five times."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, units)
    return UnitSums(rng.normal(mean * counts, spread * np.sqrt(counts)), counts)


def evidence(metrics: Mapping[str, tuple[float, float]], units: tuple[int, int] = (2000, 2000)) -> Evidence:
    """Of each metric the mean in plain and in polite."""
    names = ("plain", "polite")
    return Evidence(
        "rollout", 1, dict(zip(names, units, strict=True)),
        {
            metric: {name: sums(mean, n, n + len(name)) for name, mean, n in zip(names, means, units, strict=True)}
            for metric, means in metrics.items()
        },
        {"plain": "base", "polite": "b" * 64}, NOTHING_STRANGE,
    )  # fmt: skip


def verdicts(report: Report, arm: str = "polite") -> dict[str, str]:
    return {line.metric: line.verdict for line in report.lines if line.arm == arm}


def of(report: Report, metric: str, arm: str = "polite") -> ReportLine:
    [line] = [line for line in report.lines if (line.metric, line.arm) == (metric, arm)]
    return line


PLANTED = {
    "error": (1.0, 1.5),
    "looping": (1.0, 0.5),
    "empty": (1.0, 1.0),
    "output_tokens": (1.0, 2.0),
    "thumbs": (1.0, 2.0),
}


def test_planted_effects_are_judged_by_what_is_wished_of_the_metric() -> None:
    report = summarise(evidence(PLANTED), ARMS, goals={"thumbs": "increase"})
    assert verdicts(report) == {
        "error": WORSE, "looping": BETTER, "empty": NO_DIFFERENCE, "output_tokens": DIFFERS, "thumbs": BETTER,
    }  # fmt: skip
    assert set(verdicts(report, "plain").values()) == {CONTROL}
    line = of(report, "error")
    assert line.difference is not None
    assert line.difference.low < 0.5 < line.difference.high
    assert line.lift == pytest.approx(0.5, abs=0.1)
    assert line.units == 2000
    assert line.requests > 2 * line.units
    assert of(report, "error", "plain").difference is None


@pytest.mark.parametrize(("goal", "verdict"), [("increase", WORSE), ("decrease", BETTER)])
def test_a_goal_given_counts_instead_of_the_built_in_one(goal: Goal, verdict: str) -> None:
    report = summarise(evidence({"looping": (1.0, 0.5)}), ARMS, goals={"looping": goal})
    assert verdicts(report) == {"looping": verdict}


def test_a_metric_without_a_goal_only_differs() -> None:
    assert verdicts(summarise(evidence({"thumbs": (1.0, 2.0)}), ARMS)) == {"thumbs": DIFFERS}


def test_a_sample_ratio_mismatch_suppresses_every_verdict() -> None:
    """The same evidence with the shares it came in is judged."""
    found = evidence(PLANTED, (2000, 2400))
    report = summarise(found, ARMS)
    assert report.sample_ratio.mismatch
    assert set(verdicts(report).values()) == {MISMATCH}
    assert any("mismatch" in remark for remark in remarks(report))
    fair = summarise(found, [ARMS[0], replace(ARMS[1], share=1.2)])
    assert not fair.sample_ratio.mismatch
    assert MISMATCH not in verdicts(fair).values()


def test_too_few_units_are_not_judged() -> None:
    report = summarise(evidence(PLANTED, (90, 90)), ARMS)
    assert set(verdicts(report).values()) == {TOO_FEW}
    assert all(line.difference is None and line.lift is None for line in report.lines)
    assert of(report, "error").mean is not None


def test_an_arm_that_nobody_met_has_no_numbers() -> None:
    report = summarise(evidence({"error": (1.0, 1.0)}), [*ARMS, ArmShare("rude", 1e-6)])
    line = of(report, "error", "rude")
    assert (line.mean, line.units, line.verdict) == (None, 0, TOO_FEW)
    assert verdicts(report)["error"] == NO_DIFFERENCE


def test_where_no_request_failed_nothing_differs_and_no_certainty_is_shown() -> None:
    none = UnitSums(np.zeros(500), np.ones(500, dtype=int))
    found = replace(evidence({}), metrics={"error": {"plain": none, "polite": none}})
    line = of(summarise(found, ARMS), "error")
    assert (line.verdict, line.difference, line.mean) == (NO_DIFFERENCE, None, 0)


def test_arms_that_do_not_fit_the_logs_are_refused() -> None:
    with pytest.raises(EditsError, match=r"'polite' that experiment 'rollout' does not have.*'polit'"):
        summarise(evidence({}), [ARMS[0], ArmShare("polit", 1)])
    with pytest.raises(EditsError, match=r"one control .* found 0"):
        summarise(evidence({}), [replace(arm, is_control=False) for arm in ARMS])


# -- telling -----------------------------------------------------------------------------------------------------------


def test_the_json_is_plain_and_whole() -> None:
    report = summarise(evidence(PLANTED), ARMS)
    plain = json.loads(json.dumps(as_json(report), allow_nan=False))
    line = of(report, "error")
    assert line.difference is not None
    assert plain["lines"][1]["difference"]["low"] == line.difference.low
    assert plain["sample_ratio"]["mismatch"] is False
    assert plain["units"] == {"plain": 2000, "polite": 2000}


def test_the_table_has_a_row_for_every_metric_and_arm() -> None:
    rows, columns = table(summarise(evidence(PLANTED), ARMS))
    assert columns == COLUMNS
    assert [(row["metric"], row["arm"]) for row in rows[:2]] == [("error", "plain"), ("error", "polite")]
    assert len(rows) == 2 * len(PLANTED)
    assert re.fullmatch(r"\+0\.\d+ \(\+0\.\d+ to \+0\.\d+\)", rows[1]["difference"])


def test_what_was_left_out_is_told_and_what_was_not_is_not() -> None:
    found = evidence(PLANTED)
    told = remarks(summarise(found, ARMS))
    assert told[0] == "units: plain 2000 (0.5 declared), polite 2000 (0.5 declared)"
    assert len(told) == 2, "beside it only what the intervals promise"
    strange = Caveats(1, {"polite": 2, "plain": 0}, 4, 3, 5, 6, 7)
    told = remarks(summarise(replace(found, caveats=strange), ARMS))
    assert sorted(int(remark.split()[0]) for remark in told[2:]) == [1, 2, 3, 4, 5, 6, 7]


def test_the_picture_shows_every_difference(tmp_path: Path) -> None:
    report = summarise(evidence(PLANTED), ARMS)
    assert picture(report, tmp_path / "report.svg")
    drawn = (tmp_path / "report.svg").read_text()
    assert all(f"{metric}: difference to the control" in drawn for metric in PLANTED)
    assert "#d62728" in drawn, "the worse one is red"
    assert picture(report, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn
    assert picture(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_an_interval_there_is_no_picture(tmp_path: Path) -> None:
    assert not picture(summarise(evidence(PLANTED, (50, 50)), ARMS), tmp_path / "report.svg")
    assert not (tmp_path / "report.svg").exists()


def test_names_are_text_in_a_page_and_in_its_picture() -> None:
    script, dollars = "<script>alert('&')</script>", "cost $x_$ & more"
    found = evidence({dollars: (1.0, 2.0)})
    hostile = replace(
        found, experiment=script, units={"plain": 2000, script: 2000},
        metrics={dollars: {"plain": found.metrics[dollars]["plain"], script: found.metrics[dollars]["polite"]}},
    )  # fmt: skip
    page = html(summarise(hostile, [ARMS[0], ArmShare(script, 1)]))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4, "title, heading, table, and picture"
    assert page.count("<svg") == 1
    assert "<?xml" not in page
    drawn = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])  # noqa: S314 - our own drawing
    texts = ["".join(each.itertext()).strip() for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert script in texts
    assert f"{dollars}: difference to the control" in texts


def test_without_matplotlib_a_page_has_no_picture_and_a_picture_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = summarise(evidence(PLANTED), ARMS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EditsError, match="pip install matplotlib"):
        picture(report, tmp_path / "report.svg")
    page = html(report)
    assert "<svg" not in page
    assert "<td>error</td>" in page
