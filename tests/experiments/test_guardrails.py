"""A phase is driven window by window: what leads to a withdrawal or a hold, and what must not."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import cheaply
from vllm_edits.edit_store.experiments.document import Guardrail
from vllm_edits.plugin.experiments import guardrails as module
from vllm_edits.plugin.experiments.guardrails import Action, Guardrails, Hold, State, Withdraw

BEGAN = 1000.0
INTERVAL = 30.0
NEEDED = 10
ARMS = {"control": 0.5, "treatment": 0.5}


def rule(metric: str = "error", **fields: Any) -> Guardrail:
    limits = {"maximum", "minimum", "maximum_ratio", "minimum_ratio", "maximum_authored_ratio"}
    limit = {} if limits & fields.keys() else {"maximum": 0.1}
    return Guardrail.model_validate({"metric": metric, "minimum_requests": NEEDED, **limit, **fields})


class Phase:
    """A phase with a clock that is set forward by a window at a time."""

    def __init__(self, *rules: Guardrail, arms: Mapping[str, float] = ARMS, **fields: Any) -> None:
        self.now = BEGAN
        self.sent = dict.fromkeys(arms, 1000)  # more than ever end
        self.authored: dict[str, float] = {}
        self.guardrails = Guardrails(arms, rules, BEGAN, fields.pop("now", BEGAN), **fields)

    def fill(self, metric: str = "error", **arms: tuple[float, int]) -> None:
        """So many requests of an arm have that mean."""
        for arm, (mean, number) in arms.items():
            for _ in range(number):
                self.guardrails.see(arm, {metric: mean, "output_tokens": 7}, self.now)

    def after(self, seconds: float = INTERVAL) -> list[Action]:
        for arm, times in self.sent.items():
            self.guardrails.assign(arm, self.now, times)
        self.now += seconds
        return self.guardrails.measure(self.now, self.authored)

    def window(self, metric: str = "error", **arms: tuple[float, int]) -> list[Action]:
        self.fill(metric, **arms)
        return self.after()

    def state(self, arm: str = "treatment", place: int = 0) -> State:
        return next(state for state in self.guardrails.states() if (state.arm, state.rule) == (arm, place))

    def counts(self, arm: str = "treatment", place: int = 0) -> tuple[str, int, int]:
        state = self.state(arm, place)
        return state.last.result, state.failures, state.missing


# A maximum of 0.1, hysteresis 0.1, and a control that is as it should be: a mean for each outcome.
BESIDE = (0.05, 60)
OUTCOMES: dict[str, tuple[float, int]] = {
    "successful": (0.0, NEEDED), "failed": (0.5, NEEDED), "between": (0.095, NEEDED), "missing": (0.5, NEEDED - 1),
}  # fmt: skip


def play(phase: Phase, *outcomes: str) -> list[list[Action]]:
    """Windows that come to these outcomes; "quiet" is one with too little traffic to expect any."""
    arms = {outcome: {"control": BESIDE, "treatment": came} for outcome, came in OUTCOMES.items()}
    arms["quiet"] = {"control": (0.05, 2)}
    return [phase.window(**arms[outcome]) for outcome in outcomes]


# One measurement


@pytest.mark.parametrize(
    ("limit", "mean", "result"),
    [
        ({"maximum": 0.5}, 0.500001, "failed"),
        ({"maximum": 0.5}, 0.5, "inconclusive"),  # the limit itself is allowed
        ({"maximum": 0.5}, 0.46, "inconclusive"),
        ({"maximum": 0.5}, 0.44, "successful"),  # clear by a tenth of it
        ({"maximum": 0.5, "hysteresis": 0.125}, 0.4375, "successful"),  # just clear
        ({"maximum": 0.5, "hysteresis": 0}, 0.5, "successful"),
        ({"maximum": 0.5, "hysteresis": 0.5}, 0.3, "inconclusive"),
        ({"minimum": 0.5}, 0.499999, "failed"),
        ({"minimum": 0.5}, 0.5, "inconclusive"),
        ({"minimum": 0.5}, 0.54, "inconclusive"),
        ({"minimum": 0.5}, 0.56, "successful"),
        ({"minimum": 0.5, "hysteresis": 0.125}, 0.5625, "successful"),
        ({"maximum": 0}, 0.0, "successful"),  # a part of 0 is 0: nothing lies between
        ({"maximum": 0}, 1e-9, "failed"),
        ({"minimum": 0}, 0.0, "successful"),
        ({"minimum": 0}, -1e-9, "failed"),
        ({"maximum": -1}, -1.2, "successful"),  # by a tenth of 1 below -1, not above it
        ({"maximum": -1}, -1.05, "inconclusive"),
        ({"maximum": -1}, -0.95, "failed"),
        ({"minimum": -1}, -0.8, "successful"),
        ({"minimum": -1}, -0.95, "inconclusive"),
        ({"minimum": -1}, -1.05, "failed"),
        ({"maximum_ratio": 1.5}, 0.2, "failed"),  # the control's mean is 0.125
        ({"maximum_ratio": 1.5}, 0.18, "inconclusive"),
        ({"maximum_ratio": 1.5}, 0.16, "successful"),
        ({"minimum_ratio": 0.5}, 0.06, "failed"),
        ({"minimum_ratio": 0.5}, 0.065, "inconclusive"),
        ({"minimum_ratio": 0.5}, 0.07, "successful"),
    ],
)
def test_a_mean_is_held_against_the_limit(limit: dict[str, float], mean: float, result: str) -> None:
    """It fails beyond it, succeeds when clear of it by the hysteresis, and is neither between."""
    phase = Phase(rule("thumbs", **limit, failure_limit=1))
    assert phase.window("thumbs", control=(0.125, NEEDED), treatment=(mean, NEEDED)) == []
    assert phase.counts() == (result, int(result == "failed"), 0)
    assert phase.state().last.mean == pytest.approx(mean)
    assert (phase.state().last.control_mean, phase.state().last.seconds) == (0.125, INTERVAL)


def test_what_is_measured_is_the_mean_of_the_interval_alone() -> None:
    """A window knows nothing of the one before it."""
    phase = Phase(rule(failure_limit=1))
    phase.window(control=BESIDE, treatment=(1.0, 500))
    assert phase.counts() == ("failed", 1, 0)
    phase.window(control=BESIDE, treatment=(0.0, NEEDED))
    assert phase.counts() == ("successful", 0, 0)


def test_a_metric_that_a_request_does_not_have_is_no_zero() -> None:
    """Requests without a first token change neither the mean nor the number it is over."""
    phase = Phase(rule("first_token_seconds", maximum=1, failure_limit=1))
    phase.fill("first_token_seconds", control=(0.5, 60), treatment=(1.5, NEEDED))
    phase.fill("error", treatment=(1.0, 1000))
    phase.after()
    assert (phase.state().last.mean, phase.state().last.number) == (1.5, NEEDED)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_none(value: float) -> None:
    """It does not spoil the mean of the rest, and an arm that has only such has no data."""
    phase = Phase(rule(failure_limit=1))
    phase.fill(treatment=(value, 100))
    phase.window(control=BESIDE, treatment=(0.5, NEEDED))
    assert phase.counts() == ("failed", 1, 0)
    phase.guardrails.count("treatment", "error", value, 100, phase.now)
    phase.window(control=BESIDE, treatment=(value, 100))
    assert phase.counts() == ("inconclusive", 1, 1)


@pytest.mark.parametrize("control", [(0.0, 60), (-0.5, 60), (0.01, NEEDED - 1), (0.01, 0)])
def test_a_ratio_to_a_control_that_has_none_is_inconclusive(control: tuple[float, int]) -> None:
    """However bad the arm: too few requests of the control, or a mean that is not above 0. Data are not missing."""
    phase = Phase(rule("thumbs", maximum_ratio=2), rule("thumbs", maximum=0.5, failure_limit=9))
    for _ in range(30):
        assert all(action.rule.maximum for action in phase.window("thumbs", control=control, treatment=(1.0, NEEDED)))
    assert phase.counts() == ("inconclusive", 0, 0)
    assert not phase.state(place=1).is_watched  # a limit that is no ratio judges the same arm


# Failures


@pytest.mark.parametrize("tolerated", [0, 1, 3])
def test_more_failures_than_tolerated_withdraw_the_arm(tolerated: int) -> None:
    """The last one tolerated does not."""
    phase = Phase(rule(failure_limit=tolerated))
    *before, last = play(phase, *["failed"] * (tolerated + 1))
    assert before == [[]] * tolerated
    assert [type(action) for action in last] == [Withdraw]
    assert (last[0].arm, last[0].rule) == ("treatment", rule(failure_limit=tolerated))


@pytest.mark.parametrize(
    ("between", "failures"), [("successful", 1), ("between", 3), ("missing", 3), ("quiet", 3), ("failed", 4)]
)
def test_only_a_success_sets_the_failures_to_0(between: str, failures: int) -> None:
    """They need not be in a row."""
    phase = Phase(rule(failure_limit=9))
    play(phase, "failed", "failed", between, "failed")
    assert phase.state().failures == failures


def test_a_control_without_a_ratio_changes_no_failures() -> None:
    phase = Phase(rule(maximum_ratio=2, failure_limit=1))
    phase.window(control=(0.1, 60), treatment=(0.9, NEEDED))
    phase.window(control=(0.0, 60), treatment=(0.9, NEEDED))
    assert phase.counts() == ("inconclusive", 1, 0)
    assert len(phase.window(control=(0.1, 60), treatment=(0.9, NEEDED))) == 1


def test_a_withdrawal_says_what_was_measured() -> None:
    """Metric, mean, over how many in how long, the limit, and the control's beside it."""
    phase = Phase(rule(maximum=0.02, failure_limit=1))
    phase.window(control=(0.0625, 60), treatment=(0.25, 100))
    (action,) = phase.window(control=(0.0625, 60), treatment=(0.25, 100))
    assert action.reason == (
        "error was 0.25 over 100 requests in 30s (control: 0.0625 over 60 requests); allowed: at most 0.02. "
        "2 measurements failed without a success between them; tolerated: 1"
    )


def test_a_withdrawal_by_a_ratio_says_what_the_ratio_was() -> None:
    phase = Phase(rule("first_token_seconds", maximum_ratio=1.5))
    (action,) = phase.window("first_token_seconds", control=(0.125, 60), treatment=(0.5, 40))
    assert action.reason.startswith(
        "first_token_seconds was 0.5 over 40 requests in 30s (control: 0.125 over 60 requests); "
        "4 times the control, allowed: at most 1.5 times the control. "
    )


# Missing data


def test_missing_data_hold_the_ramp_and_then_withdraw_the_arm() -> None:
    """More than inconclusive_limit in a row hold, once; no_data_limit withdraw."""
    phase = Phase(rule(inconclusive_limit=2, no_data_limit=6))
    told = play(phase, *["missing"] * 6)
    assert [[type(action) for action in actions] for actions in told] == [[], [], [Hold], [], [], [Withdraw]]
    (hold,), (withdrawal,) = told[2], told[5]
    assert (hold.arm, withdrawal.arm) == ("treatment", "treatment")
    assert hold.reason == (
        "error was 0.5 over 9 requests in 30s (control: 0.05 over 60 requests); no data: 10 requests are needed, and "
        "60.0 ± 21.9 were expected. This happened 3 times in a row"
    )
    assert withdrawal.reason.endswith("no data: 10 requests are needed, and 60.0 ± 21.9 were expected. "
                                      "This happened 6 times in a row")  # fmt: skip


def test_who_is_withdrawn_is_not_held_as_well() -> None:
    """The ramp holds with a withdrawal anyway."""
    phase = Phase(rule(inconclusive_limit=1, no_data_limit=2))
    assert [[type(action) for action in actions] for actions in play(phase, "missing", "missing")] == [[], [Withdraw]]


@pytest.mark.parametrize("between", ["successful", "failed", "between"])
def test_a_measurement_that_has_its_requests_ends_the_row(between: str) -> None:
    """Then a hold may be told again."""
    phase = Phase(rule(inconclusive_limit=1, no_data_limit=3, failure_limit=9))
    told = play(phase, "missing", "missing", between, "missing", "missing", between, "missing")
    holds = [[], [Hold], [], [], [Hold], [], []]
    assert [[type(action) for action in actions] for actions in told] == holds
    assert phase.state().missing == 1


def test_a_control_without_a_ratio_ends_the_row_as_well() -> None:
    """The arm has data: a ratio that can seldom be told, and a few missing ones in between, withdraw nobody."""
    phase = Phase(rule(maximum_ratio=2, inconclusive_limit=1, no_data_limit=2))
    for _ in range(3):
        assert phase.window(control=(0.0, 60)) == []
        assert phase.window(control=(0.0, 60), treatment=(0.0, NEEDED)) == []
    assert phase.counts() == ("inconclusive", 0, 0)


def test_a_night_without_visitors_withdraws_nobody() -> None:
    """A window without traffic changes no count: neither up, nor is a row ended by it."""
    phase = Phase(rule(failure_limit=9))
    play(phase, "failed", "missing", "missing")
    assert play(phase, *["quiet"] * 1000) == [[]] * 1000
    assert phase.counts() == ("waiting", 1, 2)


@pytest.mark.parametrize(
    ("weights", "control", "treatment", "is_missing"),
    [
        ((0.5, 0.5), 60, 0, True),
        ((0.5, 0.5), NEEDED, 0, True),
        ((0.5, 0.5), NEEDED - 1, 0, False),  # no 10 could be expected
        ((0.5, 0.5), 60, NEEDED - 1, True),
        ((0.5, 0.5), 60, NEEDED, False),
        ((0.5, 0.5), NEEDED, NEEDED - 1, False),  # chance
        ((0.9, 0.1), 89, 0, False),  # 9.9 expected
        ((0.9, 0.1), 99, 0, True),  # 11
        ((0.1, 0.9), 5, 0, True),  # 45
        ((0.1, 0.9), 4, 0, False),  # 36, and as well none
    ],
)
def test_requests_are_missed_only_where_they_could_be_expected(
    weights: tuple[float, float], control: int, treatment: int, is_missing: bool
) -> None:
    """By the control's requests and the weights, and by more than chance."""
    phase = Phase(rule(), arms=dict(zip(ARMS, weights, strict=True)))
    phase.window(control=(0.05, control), treatment=(0.0, treatment))
    assert phase.state().missing == is_missing


@pytest.mark.parametrize("chance", [module.CHANCE, 0.0])
def test_chance_withdraws_nobody(chance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Healthy arms with about as many requests as are needed. Were every shortfall counted, they would be held."""
    monkeypatch.setattr(module, "CHANCE", chance)
    draw = random.Random(3)
    phase = Phase(rule(minimum_requests=20), arms={"control": 0.1, "treatment": 0.9})
    told = []
    for _ in range(1000):
        came = _tenth(draw, 140)
        of_control = _tenth(draw, came)
        phase.guardrails.count("control", "error", 0, of_control, phase.now)
        phase.guardrails.count("treatment", "error", 0, came - of_control, phase.now)
        told += phase.after()
    assert bool(told) == (chance == 0)


def _tenth(draw: random.Random, number: int) -> int:
    """How many of so many, of which each is taken once in ten times."""
    return sum(draw.random() < 0.1 for _ in range(number))


@pytest.mark.parametrize("metric", ["thumbs", "first_token_seconds"])
def test_what_the_control_s_requests_lack_too_is_not_missed(metric: str) -> None:
    """Feedback or first tokens are expected as the control has them, not as it has requests."""
    phase = Phase(rule(metric, minimum=0))
    phase.fill("error", control=(0.0, 500), treatment=(0.0, 500))
    phase.window(metric, control=(1.0, 3))
    assert phase.counts() == ("waiting", 0, 0)
    phase.window(metric, control=(1.0, 60))
    assert phase.counts() == ("inconclusive", 0, 1)


# Gate firings


def gates(phase: Phase, requests: int, firings: float, tokens: int) -> list[Action]:
    phase.fill("error", control=(0.0, 60), treatment=(0.0, requests))
    phase.guardrails.count("treatment", "gate_firings", firings, tokens, phase.now)
    return phase.after()


def test_gate_firings_are_a_mean_over_tokens() -> None:
    """Counts add up; base, as the control, has no gates."""
    phase = Phase(rule("gate_firings", maximum=0.5))
    phase.guardrails.count("treatment", "gate_firings", 100, 200, phase.now)
    assert gates(phase, requests=60, firings=100, tokens=600) == []
    assert phase.state().last.mean == 200 / 800
    (action,) = gates(phase, requests=60, firings=600, tokens=800)
    assert action.reason.startswith(
        "gate_firings was 0.75 over 800 tokens of 60 requests in 30s (control: unknown over 0 tokens of 60 requests); "
    )


@pytest.mark.parametrize(
    ("authored", "result"), [(0.2, "successful"), (0.1, "failed"), (0.0, "failed"), (None, "inconclusive")]
)
def test_gate_firings_are_held_against_what_their_author_measured(authored: float | None, result: str) -> None:
    """A quarter for each token: below one and a half times a fifth, above that of a tenth. Gates that never fired for
    their author may not fire at all; of what was not measured nothing can be said."""
    phase = Phase(rule("gate_firings", maximum_authored_ratio=1.5, hysteresis=0))
    if authored is not None:
        phase.authored = {"treatment": authored, "control": 9}
    assert bool(gates(phase, requests=60, firings=250, tokens=1000)) == (result == "failed")
    assert phase.state().last.result == result
    if result == "failed":
        assert f"allowed: at most 1.5 times the author's measurement, {authored:g}" in phase.state().last.explained


def test_only_gate_firings_have_an_author_s_figure() -> None:
    with pytest.raises(ValueError, match="maximum_authored_ratio is for gate_firings, found 'error'"):
        rule("error", maximum_authored_ratio=2)


@pytest.mark.parametrize(("requests", "tokens"), [(NEEDED - 1, 1000), (60, 0)])
def test_gate_firings_need_requests_and_tokens(requests: int, tokens: int) -> None:
    """A request of a thousand tokens is still one; the requests are expected as the control's come."""
    phase = Phase(rule("gate_firings", maximum=0.5))
    gates(phase, requests, 1000.0 * bool(tokens), tokens)
    assert phase.counts() == ("inconclusive", 0, 1)


def test_feedback_is_no_request() -> None:
    phase = Phase(rule("gate_firings", maximum=0.5))
    for _ in range(100):
        phase.guardrails.see("control", {"thumbs": 1.0}, phase.now)
    phase.after()
    assert phase.state().last.result == "waiting"


def test_counts_of_other_metrics_are_not_mixed_in() -> None:
    phase = Phase(rule("error", maximum=0.5), rule("gate_firings", maximum=0.5))
    phase.guardrails.count("treatment", "gate_firings", 100, 100, phase.now)
    assert phase.window(control=BESIDE, treatment=(0.0, NEEDED))[0].rule.metric == "gate_firings"
    assert phase.state(place=0).last.mean == 0


# Time


def test_nothing_is_measured_before_the_warm_up_is_over() -> None:
    """What ended within it counts at no time."""
    phase = Phase(rule(warm_up=100))
    for _ in range(4):
        assert phase.window(control=BESIDE, treatment=(1.0, 100)) == []
        assert phase.counts() == ("waiting", 0, 0)
    phase.now = BEGAN + 100
    assert phase.window(control=BESIDE, treatment=(0.0, NEEDED)) == []
    assert phase.state().last.mean == 0
    assert len(phase.window(control=BESIDE, treatment=(1.0, NEEDED))) == 1


def test_every_rule_has_its_own_interval() -> None:
    phase = Phase(rule(interval=10, failure_limit=9), rule(interval=40, failure_limit=9))
    for second in range(80):
        phase.fill(control=(0.05, 6), treatment=(0.5, 6))
        phase.after(1)
        assert [phase.state(place=place).failures for place in (0, 1)] == [(second + 1) // 10, (second + 1) // 40]


def test_a_late_call_closes_one_window() -> None:
    """Five intervals late: one failure over all of that time, and the next window is as long as any."""
    phase = Phase(rule(failure_limit=9))
    phase.fill(control=BESIDE, treatment=(0.5, NEEDED))
    assert phase.after(5 * INTERVAL) == []
    assert phase.counts() == ("failed", 1, 0)
    assert phase.state().last.seconds == 5 * INTERVAL
    assert " in 150s " in phase.state().last.explained
    phase.fill(control=BESIDE, treatment=(0.5, NEEDED))
    phase.after(INTERVAL - 1)
    assert phase.state().failures == 1
    phase.after(1)
    assert phase.state().failures == 2


def test_a_server_that_starts_within_the_phase_watches_from_then_on() -> None:
    """Its first window does not reach back to when the phase began, and the warm-up is over."""
    phase = Phase(rule(warm_up=100, failure_limit=9), now=BEGAN + 10_000)
    phase.now = BEGAN + 10_000
    phase.fill(control=BESIDE, treatment=(0.5, NEEDED))
    phase.after(1)
    assert phase.counts() == ("waiting", 0, 0)
    phase.after(INTERVAL - 1)
    assert (phase.counts(), phase.state().last.seconds) == (("failed", 1, 0), INTERVAL)


# Arms

THREE = {"control": 0.5, "one": 0.25, "two": 0.25}


def test_every_arm_is_judged_by_itself() -> None:
    phase = Phase(rule(failure_limit=1), arms=THREE)
    came = {"control": BESIDE, "one": (0.0, NEEDED), "two": (0.5, NEEDED)}
    assert phase.window(**came) == []
    assert [action.arm for action in phase.window(**came)] == ["two"]
    assert [phase.counts(arm) for arm in ("one", "two")] == [("successful", 0, 0), ("failed", 2, 0)]
    assert [phase.state(arm).is_watched for arm in ("one", "two")] == [True, False]


def test_arms_that_fail_together_are_withdrawn_together() -> None:
    phase = Phase(rule(), arms=THREE)
    told = phase.window(control=BESIDE, one=(0.5, NEEDED), two=(0.5, NEEDED))
    assert [action.arm for action in told] == ["one", "two"]


def test_an_arm_that_was_withdrawn_is_watched_no_more() -> None:
    """By this rule or another, or by a person, now or before. What it had come to remains to be seen."""
    rules = rule(), rule(maximum=0.2)
    phase = Phase(*rules, arms=THREE)
    phase.guardrails.stop_watching("one")
    phase.guardrails.stop_watching("one")
    told = phase.window(control=BESIDE, one=(1.0, NEEDED), two=(1.0, NEEDED))
    assert [(action.arm, action.rule) for action in told] == [("two", rules[0])]
    assert phase.window(control=BESIDE, one=(1.0, NEEDED), two=(1.0, NEEDED)) == []
    assert phase.counts("two") == ("failed", 1, 0)
    before = Phase(rule(), arms=THREE, withdrawn={"two"})
    assert [a.arm for a in before.window(control=BESIDE, one=(1.0, NEEDED), two=(1.0, NEEDED))] == ["one"]


def test_the_control_is_not_watched() -> None:
    phase = Phase(rule())
    assert phase.window(control=(1.0, 100), treatment=(0.0, 100)) == []
    assert {state.arm for state in phase.guardrails.states()} == {"treatment"}


def test_no_such_arm_and_no_such_number() -> None:
    guardrails = Phase(rule()).guardrails
    unknown = "expected an arm of control, treatment, found 'treatmen'"
    with pytest.raises(ValueError, match=unknown):
        guardrails.see("treatmen", {"error": 0.0}, BEGAN)
    with pytest.raises(ValueError, match=unknown):
        guardrails.stop_watching("treatmen")
    with pytest.raises(ValueError, match="found -1"):
        guardrails.count("treatment", "gate_firings", 1, -1, BEGAN)


def test_states_are_plain_data() -> None:
    """For a status page and for gauges."""
    phase = Phase(rule(maximum=0.02), rule("thumbs", minimum_ratio=0.5), arms=THREE)
    phase.window(control=BESIDE, one=(0.0, NEEDED), two=(0.0, NEEDED))
    shown = json.loads(json.dumps([asdict(state) for state in phase.guardrails.states()]))
    assert [(one["rule"], one["metric"], one["limit"], one["arm"]) for one in shown] == [
        (0, "error", "at most 0.02", "one"),
        (0, "error", "at most 0.02", "two"),
        (1, "thumbs", "at least 0.5 times the control", "one"),
        (1, "thumbs", "at least 0.5 times the control", "two"),
    ]
    assert [one["last"]["result"] for one in shown] == ["successful", "successful", "waiting", "waiting"]


# Properties


@cheaply
@given(
    outcomes=st.lists(st.sampled_from([*OUTCOMES, "quiet"]), max_size=12),
    tolerated=st.integers(0, 3),
    held=st.integers(0, 2),
    more=st.integers(1, 3),
)
def test_counts_are_those_of_a_simple_reference(outcomes: list[str], tolerated: int, held: int, more: int) -> None:
    """Whatever measurements follow on each other: the same actions at the same windows, and none after a withdrawal."""
    phase = Phase(rule(failure_limit=tolerated, inconclusive_limit=held, no_data_limit=held + more))
    expected: list[list[type]] = []
    for at, outcome in enumerate(outcomes):
        counted = "".join(one[0] for one in outcomes[: at + 1] if one != "quiet")  # s, f, b, m
        failures = counted.rpartition("s")[2].count("f")
        row = len(counted) - len(counted.rstrip("m"))
        action = None
        if [Withdraw] in expected:
            pass
        elif (outcome == "failed" and failures > tolerated) or (outcome == "missing" and row >= held + more):
            action = Withdraw
        elif outcome == "missing" and row == held + 1:
            action = Hold
        expected.append([action] if action else [])
    assert [[type(action) for action in actions] for actions in play(phase, *outcomes)] == expected


VALUES = st.lists(st.floats(1e-3, 1e3), min_size=NEEDED, max_size=2 * NEEDED)


@cheaply
@given(windows=st.lists(VALUES, min_size=1, max_size=4), hysteresis=st.floats(0, 0.9), beyond=st.floats(1.001, 2))
def test_an_arm_like_the_control_keeps_every_ratio(
    windows: list[list[float]], hysteresis: float, beyond: float
) -> None:
    """With room for the hysteresis every measurement is a success; an arm that much worse is withdrawn at once."""
    limit = beyond / (1 - hysteresis)
    phase = Phase(
        rule("seconds_per_token", maximum_ratio=limit, hysteresis=hysteresis),
        rule("seconds_per_token", minimum_ratio=1 / (beyond * (1 + hysteresis)), hysteresis=hysteresis),
        arms=THREE,
    )
    for at, values in enumerate(windows):
        for value in values:
            phase.guardrails.see("control", {"seconds_per_token": value}, phase.now)
            phase.guardrails.see("one", {"seconds_per_token": value}, phase.now)
            phase.guardrails.see("two", {"seconds_per_token": value * limit * 1.01}, phase.now)
        assert [action.arm for action in phase.after()] == ([] if at else ["two"])
        assert [phase.counts("one", place) for place in (0, 1)] == [("successful", 0, 0)] * 2


@cheaply
@given(
    ends=st.lists(st.tuples(st.sampled_from(list(THREE)), st.floats(0, 1)), max_size=60),
    ticks=st.sets(st.integers(0, 59)),
    of_two=st.floats(0, 1),
)
def test_nothing_depends_on_how_often_it_is_asked_or_on_other_arms(
    ends: list[tuple[str, float]], ticks: set[int], of_two: float
) -> None:
    """Calls within an interval change nothing, and neither does what another arm measures."""
    often, once = (Phase(rule(minimum_requests=5, failure_limit=9), arms=THREE) for _ in range(2))
    for at, (arm, value) in enumerate(ends):
        often.guardrails.see(arm, {"error": value}, BEGAN)
        once.guardrails.see(arm, {"error": of_two if arm == "two" else value}, BEGAN)
        if at in ticks:
            assert often.guardrails.measure(BEGAN + at * INTERVAL / 60) == []
    often.after()
    once.after()
    assert often.state("one") == once.state("one")


def test_nothing_grows_with_requests() -> None:
    """Sums for each rule and arm, however many requests there were."""
    phase = Phase(rule(failure_limit=999), rule("thumbs", minimum=0))
    numbers = count()
    sizes = set()
    for _ in range(3):
        for _ in range(200):
            phase.guardrails.see("treatment", {"error": 1.0, "thumbs": 1.0, f"other-{next(numbers)}": 1.0}, phase.now)
        phase.after()
        sizes.add(sum(len(watch.sums) + len(watch.records) for watch in phase.guardrails._watches))
        assert all(vars(sums).keys() == {"total", "number", "requests", "assigned"}
                   for watch in phase.guardrails._watches for sums in watch.sums.values())  # fmt: skip
    assert sizes == {2 * (2 + 1)}


@pytest.mark.parametrize(("sent", "withdrawn"), [(0, False), (NEEDED - 1, False), (NEEDED, True)])
def test_nothing_is_missing_of_an_arm_that_nobody_was_sent_to(sent: int, withdrawn: bool) -> None:
    """Few units may all be in other arms. What was sent and did not come back is missing."""
    phase = Phase(rule(inconclusive_limit=0, no_data_limit=2))
    phase.sent["treatment"] = sent
    actions = [action for _ in range(3) for action in phase.window(control=BESIDE)]
    assert any(isinstance(action, Withdraw) for action in actions) == withdrawn
