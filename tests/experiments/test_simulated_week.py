"""A week of an experiment in seconds, through everything but HTTP and the engine: who gets which arm while the ramp
grows, what is written down, what is read from it every six hours, and what the guardrails make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random

import pytest

from tests.support.experiments import START, created, done
from vllm_edits.plugin.experiments.analysis.evidence import Logs, collect
from vllm_edits.plugin.experiments.analysis.report import BETTER, DIFFERS, WORSE, ArmShare, Report, summarise
from vllm_edits.plugin.experiments.analysis.sequences import radius
from vllm_edits.plugin.experiments.exposure_log import ExposureLog
from vllm_edits.plugin.experiments.guardrails import Guardrails, Withdraw
from vllm_edits.plugin.experiments.records import Exposure, FeedbackRecord, Record
from vllm_edits.plugin.experiments.routing import decide
from vllm_edits.plugin.request import Request

HOUR = timedelta(hours=1)
LOOKS = [START + HOUR * hours for hours in range(6, 169, 6)]
ALARMS = {BETTER, WORSE, DIFFERS}


@dataclass
class World:
    """What an arm does to a request: how often it fails, how often it is liked, its time to the first token."""

    error: float = 0.02
    liked: float = 0.3
    first_token: float = 0.2


@dataclass
class Week:
    """Requests of so many units, some of whom ask often; an arm may have a world of its own from some hour on."""

    seed: int
    units: int = 1500
    an_hour: int = 12
    treatment: World = field(default_factory=World)
    from_hour: int = 0
    begins: int = 0
    """hour of the first request"""

    def requests(self) -> Iterator[Record]:
        """Every request with what came of it, in order of time."""
        draw = Random(self.seed)
        ramp = [{"after": "1d", "coverage": 0.5}, {"after": "2d", "coverage": 1}]
        running = done({}, created(coverage=0.2, ramp=ramp, feedback=[{"name": "thumbs"}]), ("tone", "start"))
        activity = [draw.paretovariate(3) for _ in range(self.units)]
        for hour in range(self.begins, 168):
            for number, unit in enumerate(draw.choices(range(self.units), activity, k=self.an_hour)):
                at = START + HOUR * (hour + number / self.an_hour)
                name = f"{self.seed}/{unit}"
                route = decide(running, Request("polite", user=name), at)
                if route.assignment is None:
                    continue
                shown = route.assignment
                changed = shown.arm != "control" and hour >= self.from_hour
                world = self.treatment if changed else World()
                request, failed = f"{hour}-{number}", draw.random() < world.error
                yield Exposure(
                    at=at, request=request, experiment="tone", phase=1, arm=shown.arm, version=route.target,
                    unit=shown.unit, source=shown.source, chosen=shown.how, outcome="error" if failed else "ok",
                    prompt_tokens=10, output_tokens=draw.randrange(20, 60), seconds=1.0,
                    first_token_seconds=world.first_token * draw.uniform(0.5, 1.5), seconds_per_token=0.02,
                    empty=False, looping=False, corrupted=False,
                )  # fmt: skip
                if not failed and draw.random() < 0.5:  # some of them say something; a unit has a mood of its own
                    likes = draw.random() < world.liked + 0.2 * (unit % 2) - 0.1
                    yield FeedbackRecord(
                        at=at,
                        request=request,
                        experiment="tone",
                        phase=1,
                        arm=shown.arm,
                        unit=shown.unit,
                        metric="thumbs",
                        value=float(likes),
                    )


ARMS = [ArmShare("control", 0.5, is_control=True), ArmShare("milder", 0.5)]


def looks(records: list[Record]) -> Iterator[Report]:
    """The report of every look."""
    for look in LOOKS:
        evidence = collect((record for record in records if record.at < look), "tone", 1)  # type: ignore[union-attr]
        yield summarise(evidence, ARMS, goals={"thumbs": "increase"}, tuned_for=1500)


def verdicts(report: Report) -> dict[str, str]:
    return {line.metric: line.verdict for line in report.lines if line.arm == "milder"}


@pytest.mark.long
def test_a_planted_effect_is_found_and_the_rest_is_not(tmp_path: Path) -> None:
    """Through files as a server writes them: answers are liked more, and fail more; they take as long as ever."""
    log = ExposureLog(tmp_path, 1 << 16)
    for record in Week(3, units=2000, an_hour=60, treatment=World(error=0.06, liked=0.45)).requests():
        log.write(record)
    assert len(list(tmp_path.iterdir())) > 10, "positive control: several files"
    seen = [verdicts(report) for report in looks(list(Logs([tmp_path])))]
    assert (seen[-1]["thumbs"], seen[-1]["error"]) == (BETTER, WORSE)
    assert not any(each["first_token_seconds"] in ALARMS for each in seen)
    assert all(each["thumbs"] != WORSE and each["error"] != BETTER for each in seen)


@pytest.mark.long
def test_units_stay_in_their_arms_and_come_in_the_declared_shares() -> None:
    records = [record for record in Week(4, units=2000, an_hour=60).requests() if isinstance(record, Exposure)]
    arms: dict[str, set[str]] = {}
    for record in records:
        arms.setdefault(record.unit, set()).add(record.arm)
    assert all(len(each) == 1 for each in arms.values())
    assert not any(report.sample_ratio.mismatch for report in looks(records))
    # The positive control: a proxy loses every third request of one arm, and with it some units.
    lossy = [record for number, record in enumerate(records) if record.arm == "control" or int(record.unit, 16) % 3]
    assert any(report.sample_ratio.mismatch for report in looks(lossy))


@pytest.mark.slow
def test_of_weeks_without_an_effect_few_alarm_however_often_one_looks() -> None:
    """Two hundred, looked at 28 times each, for each metric. Intervals of one look alarm far more often."""
    alarmed = dict.fromkeys(("error", "thumbs", "first_token_seconds"), 0)
    naive = 0
    for seed in range(200):
        reports = list(looks(list(Week(seed).requests())))
        for metric in alarmed:
            alarmed[metric] += any(verdicts(report)[metric] in ALARMS for report in reports)
        naive += any(map(single_look_alarms, reports))
        assert all(line.difference is not None for line in reports[-1].lines if line.arm == "milder" and line.mean)
    assert all(times <= 0.05 * 200 for times in alarmed.values()), alarmed
    assert naive > 0.1 * 200, "positive control"


def single_look_alarms(report: Report) -> bool:
    """What somebody would say who takes the interval of a look for the only one: narrower than the sequence's."""
    (line,) = [line for line in report.lines if (line.metric, line.arm) == ("first_token_seconds", "milder")]
    if line.difference is None:
        return False
    n = line.requests * 2
    wide = (line.difference.high - line.difference.low) / 2
    one_look = 1.96 / (radius(1.0, n, tuned_for=1500) * n**0.5)
    return abs(line.difference.estimate) > wide * one_look


@pytest.mark.parametrize(
    ("treatment", "reason"),
    [
        (World(error=0.5), "error was 0."),
        (World(first_token=1.0), "first_token_seconds was "),
        (World(), ""),
    ],
)
def test_a_regression_is_withdrawn_within_its_windows(treatment: World, reason: str) -> None:
    """From the hundredth hour on; what is as ever is not. Rules of half an hour's windows, one failure tolerated."""
    rules = created(
        guardrails=[
            {"metric": "error", "maximum": 0.2, "interval": "30m", "failure_limit": 1, "minimum_requests": 20},
            {"metric": "first_token_seconds", "maximum_ratio": 2, "interval": "30m", "failure_limit": 1},
        ]
    ).document
    assert rules is not None
    week = Week(5, an_hour=400, treatment=treatment, from_hour=100, begins=90)
    guard = Guardrails({"control": 0.5, "milder": 0.5}, rules.guardrails, 0.0, 0.0)
    withdrawn = withdrawal(week, guard)
    if not reason:
        assert withdrawn is None
        return
    assert withdrawn is not None
    after, why = withdrawn
    assert why.startswith(reason)
    assert 100 <= after <= 101.5, "two windows of half an hour, and what was left of the one before"


def withdrawal(week: Week, guard: Guardrails) -> tuple[float, str] | None:
    """After how many hours the arm is withdrawn, and why."""
    now: Callable[[Record], float] = lambda record: (record.at - START).total_seconds()  # noqa: E731
    for record in week.requests():
        if isinstance(record, Exposure):
            guard.assign(record.arm, now(record))
            guard.see(record.arm, record.metrics(), now(record))
        for action in guard.measure(now(record)):
            if isinstance(action, Withdraw):
                return now(record) / 3600, action.reason
        if now(record) > 110 * 3600:
            break
    return None
