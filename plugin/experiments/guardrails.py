"""Measures the arms of a running phase against the guardrails of the experiment, and decides on actions. Pure.

    guardrails = Guardrails(arms, document.guardrails, began, now)
    guardrails.see("treatment", {"error": 0.0, "first_token_seconds": 0.12}, now)     # after each request
    for action in guardrails.measure(now, authored):                                 # every second or so
        ...

Only sums are kept, for each rule and arm. `now` is in seconds of a monotonic clock. All calls must come from one
thread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from types import MappingProxyType
from typing import Literal

from vllm_edits.edit_store.bundle import GATE_FIRINGS
from vllm_edits.edit_store.experiments.document import BUILT_IN, Guardrail
from vllm_edits.edit_store.experiments.durations import spoken

CONTROL, AUTHOR = "the control", "the author's measurement"
"""References of a relative limit."""
Result = Literal["successful", "failed", "inconclusive", "waiting"]

CHANCE = 2.0
"""Number of standard errors by which an arm must have fewer requests than expected, before data count as missing.

With 0, an arm of weight 0.9 with 12 healthy requests per window (20 are needed) is withdrawn within hours. The control
has 1 or 2 requests per window, sometimes 3. In windows with 3, 27 requests are expected of the arm, and only these
windows would count.
"""


@dataclass(frozen=True)
class Withdraw:
    """The action to withdraw an arm. The arm is not watched any more."""

    arm: str
    rule: Guardrail
    reason: str


@dataclass(frozen=True)
class Hold:
    """The action to hold the ramp. Only an operator resumes it."""

    arm: str
    rule: Guardrail
    reason: str


Action = Withdraw | Hold


@dataclass
class Sums:
    """The observations of one metric in one arm, as sums.

    number: number of observations in `total` (tokens for gate firings). requests: requests with any built-in metric.
    assigned: requests that were sent to the arm, with any outcome.
    """

    total: float = 0.0
    number: int = 0
    requests: int = 0
    assigned: int = 0

    @property
    def mean(self) -> float | None:
        return self.total / self.number if self.number else None


@dataclass(frozen=True)
class Known:
    """The known facts about an arm.

    share: its weight divided by the control's. authored: firings of its gates per token, as its author measured them.
    """

    share: float
    authored: float | None


@dataclass(frozen=True)
class Observation:
    """The measurement of one window of a rule for one arm.

    waiting       too few requests, and not fewer than expected: it has no effect
    inconclusive  fewer requests than expected (`is_missing`); or a ratio to a control with too few requests or with a
                  mean of 0 or less; or no measurement by the author; or within the limit, but not by the hysteresis
    """

    result: Result
    explained: str
    seconds: float = 0.0
    mean: float | None = None
    number: int = 0
    control_mean: float | None = None
    control_number: int = 0
    is_missing: bool = False


@dataclass(frozen=True)
class State:
    """The state of an arm for a rule, as plain data. rule: its place in the document, counted from 0."""

    rule: int
    metric: str
    limit: str
    arm: str
    is_watched: bool
    failures: int
    missing: int
    """consecutive measurements with missing data"""
    last: Observation


@dataclass
class _RuleRecord:
    """The results of the measurements of one rule for one arm."""

    failures: int = 0
    missing: int = 0
    last: Observation = Observation("waiting", "nothing has been measured yet")


@dataclass
class _RuleWatch:
    """A rule with its present window."""

    rule: Guardrail
    begins: float
    opened: float
    sums: dict[str, Sums]
    records: dict[str, _RuleRecord] = field(default_factory=dict)


class Guardrails:
    """The guardrails of one phase on one server.

    arms: weights by name, the control first. began: start of the phase, for the warm-up. now: start of the first
    windows on this server. withdrawn: arms that are not watched.
    """

    def __init__(
        self,
        arms: Mapping[str, float],
        rules: Iterable[Guardrail],
        began: float,
        now: float,
        withdrawn: Collection[str] = (),
    ) -> None:
        self.rules = tuple(rules)
        self._weights = dict(arms)
        self._control, *treatments = self._weights
        self._watched = [arm for arm in treatments if arm not in withdrawn]
        self._watches = [
            _RuleWatch(rule, began + rule.warm_up, max(now, began + rule.warm_up), self._no_sums(),
                   {arm: _RuleRecord() for arm in treatments})
            for rule in self.rules
        ]  # fmt: skip

    def assign(self, arm: str, now: float, times: int = 1) -> None:
        """Count requests that were sent to an arm. An arm without such requests misses no data."""
        self._need(arm)
        for watch in self._warm(now):
            watch.sums[arm].assigned += times

    def see(self, arm: str, values: Mapping[str, float], now: float) -> None:
        """Count the metrics of a request that has ended, or feedback.

        Values that are not finite are ignored. So an arm with only such values has no data, instead of a mean of NaN
        that is never beyond a limit.
        """
        self._need(arm)
        is_request = not BUILT_IN.keys().isdisjoint(values)
        for watch in self._warm(now):
            sums = watch.sums[arm]
            sums.requests += is_request
            value = values.get(watch.rule.metric)
            if value is not None and isfinite(value):
                sums.total += value
                sums.number += 1

    def count(self, arm: str, metric: str, total: float, number: int, now: float) -> None:
        """Add a sum that was counted elsewhere, with its number of observations.

        Gate firings are counted over the tokens computed meanwhile; an arm without gates has 0. ValueError if number is
        below 0.
        """
        self._need(arm)
        if number < 0:
            raise ValueError(f"expected a number of observations of {metric!r} of at least 0, found {number}")
        for watch in self._warm(now):
            if watch.rule.metric == metric and isfinite(total):
                watch.sums[arm].total += total
                watch.sums[arm].number += number

    def measure(self, now: float, authored: Mapping[str, float] = MappingProxyType({})) -> list[Action]:
        """Close the windows whose interval has passed; returns the actions.

        authored: firings per token of each arm, as its author measured them. A late call closes one longer window, not
        several empty ones.
        """
        actions: list[Action] = []
        for watch in self._watches:
            seconds = now - watch.opened
            if seconds < watch.rule.interval:
                continue
            sums, watch.sums, watch.opened = watch.sums, self._no_sums(), now
            for arm in list(self._watched):
                known = Known(self._weights[arm] / self._weights[self._control], authored.get(arm))
                measured = measurement(watch.rule, sums[arm], sums[self._control], known, seconds)
                action = _judged(watch.records[arm], watch.rule, arm, measured)
                if isinstance(action, Withdraw):
                    self.stop_watching(arm)
                if action is not None:
                    actions.append(action)
        return actions

    def stop_watching(self, arm: str) -> None:
        """Stop watching an arm that was withdrawn."""
        self._need(arm)
        if arm in self._watched:
            self._watched.remove(arm)

    def states(self) -> list[State]:
        """The state of every arm, except the control, for every rule."""
        return [
            State(place, watch.rule.metric, limit_of(watch.rule), arm, arm in self._watched, record.failures,
                  record.missing, record.last)
            for place, watch in enumerate(self._watches)
            for arm, record in watch.records.items()
        ]  # fmt: skip

    def _warm(self, now: float) -> Iterable[_RuleWatch]:
        return (watch for watch in self._watches if now >= watch.begins)

    def _no_sums(self) -> dict[str, Sums]:
        return {arm: Sums() for arm in self._weights}

    def _need(self, arm: str) -> None:
        if arm not in self._weights:
            raise ValueError(f"expected an arm of {', '.join(self._weights)}, found {arm!r}")


def measurement(rule: Guardrail, arm: Sums, control: Sums, known: Known, seconds: float) -> Observation:
    """The measurement of a window of `seconds`."""
    result, why, is_missing = _verdict(rule, arm, control, known)
    length, shadow = spoken(round(seconds, 1)), _amount(rule, control)
    explained = f"{rule.metric} was {_amount(rule, arm)} in {length} (control: {shadow}); {why}"
    return Observation(result, explained, seconds, arm.mean, arm.number, control.mean, control.number, is_missing)


def _verdict(rule: Guardrail, arm: Sums, control: Sums, known: Known) -> tuple[Result, str, bool]:
    """The result, the reason, and whether data are missing.

    Data are missing if the arm has fewer requests than needed, although as many were sent to it, and although enough
    requests were expected (expected = share · control), by more than CHANCE standard errors of expected - found:
    √(expected + share·expected), because both are counts.
    """
    needed, shadow = rule.minimum_requests, _requests(rule, control)
    found = _requests(rule, arm) if arm.number else 0
    if arm.mean is None or found < needed:
        # Only from the control's requests with this metric: if they have no first token, the arm misses none.
        expected = shadow * known.share
        chance = CHANCE * sqrt(expected * (1 + known.share))
        why = f"{needed} requests are needed, and {expected:.1f} ± {chance:.1f} were expected"
        if arm.assigned < needed:
            return "waiting", f"{needed} requests are needed, but {arm.assigned} were sent to the arm", False
        if expected < needed or found + chance >= expected:
            return "waiting", why, False
        return "inconclusive", f"no data: {why}", True
    return (*_judge(rule, arm.mean, control, known), False)


def _judge(rule: Guardrail, mean: float, control: Sums, known: Known) -> tuple[Result, str]:
    """The result of a mean, and the reason.

    value      = mean of the arm; for a ratio, divided by the control's mean
    failed     : value is beyond the limit (which may be a multiple of the author's measurement)
    successful : value is within the limit by hysteresis·|limit|
    """
    limit, is_upper, held_against = _limit(rule)
    value, allowed = mean, f"allowed: {limit_of(rule)}"
    if held_against == AUTHOR:
        if known.authored is None:
            return "inconclusive", f"the version's author has not measured {rule.metric}"
        limit *= known.authored
        allowed = f"{allowed}, {known.authored:g}"
    elif held_against == CONTROL:
        if control.mean is None or _requests(rule, control) < rule.minimum_requests:
            return "inconclusive", f"the control has too few requests for a ratio, {rule.minimum_requests} are needed"
        if control.mean <= 0:  # division by 0; and below 0 the order of ratios is reversed
            return "inconclusive", "a ratio to a control of 0 or less is not possible; use a maximum or a minimum"
        value = mean / control.mean
        allowed = f"{value:g} times the control, {allowed}"
    margin = rule.hysteresis * abs(limit)  # of the absolute value, so that it also works for limits below 0
    if (value > limit) if is_upper else (value < limit):
        return "failed", allowed
    if (value <= limit - margin) if is_upper else (value >= limit + margin):
        return "successful", allowed
    return "inconclusive", f"{allowed}; a success keeps a distance of {rule.hysteresis:g} of the limit"


def limit_of(rule: Guardrail) -> str:
    """The limit of a rule in words."""
    limit, is_upper, held_against = _limit(rule)
    return f"at {'most' if is_upper else 'least'} {limit:g}{f' times {held_against}' if held_against else ''}"


def _limit(rule: Guardrail) -> tuple[float, bool, str]:
    """The limit, whether it is an upper limit, and its reference."""
    for limit, is_upper, held_against in (
        (rule.maximum, True, ""),
        (rule.minimum, False, ""),
        (rule.maximum_ratio, True, CONTROL),
        (rule.minimum_ratio, False, CONTROL),
        (rule.maximum_authored_ratio, True, AUTHOR),
    ):
        if limit is not None:
            return limit, is_upper, held_against
    raise AssertionError("Guardrail refuses a rule without a limit")


def _judged(record: _RuleRecord, rule: Guardrail, arm: str, measured: Observation) -> Action | None:
    """Count a measurement; returns its action."""
    record.last = measured
    if measured.result == "waiting":
        return None
    if measured.is_missing:
        record.missing += 1
        why = f"{measured.explained}. This happened {record.missing} times in a row"
        if record.missing >= rule.no_data_limit:
            return Withdraw(arm, rule, why)
        is_news = record.missing == rule.inconclusive_limit + 1  # it grows by one, so this is true once
        return Hold(arm, rule, why) if is_news else None
    record.missing = 0
    if measured.result == "successful":
        record.failures = 0
    elif measured.result == "failed":
        record.failures += 1
        if record.failures > rule.failure_limit:
            failed = f"{record.failures} measurements failed without a success between them"
            return Withdraw(arm, rule, f"{measured.explained}. {failed}; tolerated: {rule.failure_limit}")
    return None


def _requests(rule: Guardrail, sums: Sums) -> int:
    """The number of requests with the metric. For gate firings, which are counted by token, all requests."""
    return sums.requests if rule.metric == GATE_FIRINGS else sums.number


def _amount(rule: Guardrail, sums: Sums) -> str:
    """A mean and its number of observations, in words."""
    tokens = f"{sums.number} tokens of " if rule.metric == GATE_FIRINGS else ""
    return f"{'unknown' if sums.mean is None else f'{sums.mean:g}'} over {tokens}{_requests(rule, sums)} requests"
