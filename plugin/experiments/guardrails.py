"""Whether the arms of a running phase keep the rules of its experiment, and what is to be done when one does not. Pure.

    guardrails = Guardrails(arms, document.guardrails, began, now)
    guardrails.see("treatment", {"error": 0.0, "first_token_seconds": 0.12}, now)     # whenever a request ended
    for action in guardrails.measure(now, authored):                                 # every second or so
        ...

Of what was observed only sums are kept, for each rule and arm. `now` is in seconds, of a clock that never goes back,
and everything is called by one thread.
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
"""What a limit may be a multiple of."""
Result = Literal["successful", "failed", "inconclusive", "waiting"]

CHANCE = 2.0
"""Standard errors by which an arm's requests must be fewer than expected before they are missed.

With none, an arm of 0.9 that has 12 healthy requests a window, of 20 needed, is withdrawn within hours: the control's 1
or 2 are 3 at times, which lets 27 be expected of the arm, and only such windows would count.
"""


@dataclass(frozen=True)
class Withdraw:
    """The arm is to be withdrawn: it is not watched any more."""

    arm: str
    rule: Guardrail
    reason: str


@dataclass(frozen=True)
class Hold:
    """The ramp is to be held. To resume it is left to a person."""

    arm: str
    rule: Guardrail
    reason: str


Action = Withdraw | Hold


@dataclass
class Sums:
    """What was observed of one metric in one arm.

    number: over how many observations `total` is summed, tokens for gate firings. requests: with any built-in metric.
    assigned: requests that were sent to the arm, whatever became of them.
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
    """What is known of an arm beforehand.

    share: its weight over the control's. authored: firings of its gates for each token, as its author measured them.
    """

    share: float
    authored: float | None


@dataclass(frozen=True)
class Observation:
    """What one window of a rule came to for one arm.

    waiting       too few requests, and no more could be expected but for chance: it says nothing
    inconclusive  too few though more could be expected (`is_missing`); or a ratio to a control that has too few, or
                  whose mean is not above 0; or to an author's figure that is not there; or neither beyond the limit nor
                  clear of it
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
    """How an arm stands with a rule, as plain data. rule: its place in the document, counted from 0."""

    rule: int
    metric: str
    limit: str
    arm: str
    is_watched: bool
    failures: int
    missing: int
    """measurements in a row without enough requests"""
    last: Observation


@dataclass
class _RuleRecord:
    """What the measurements of one rule for one arm have come to."""

    failures: int = 0
    missing: int = 0
    last: Observation = Observation("waiting", "nothing has been measured yet")


@dataclass
class _RuleWatch:
    """One rule with its window."""

    rule: Guardrail
    begins: float
    opened: float
    sums: dict[str, Sums]
    records: dict[str, _RuleRecord] = field(default_factory=dict)


class Guardrails:
    """The rules of one phase on one server.

    arms: their weights by name, the control first. began: when the phase began, for the warm-up. now: from when on this
    server watches; the first windows cover nothing before that. withdrawn: arms that are not watched.
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
        """Requests were sent to an arm. Where none were, none is missing: of three API keys an arm may have none."""
        self._need(arm)
        for watch in self._warm(now):
            watch.sums[arm].assigned += times

    def see(self, arm: str, values: Mapping[str, float], now: float) -> None:
        """A request of an arm has ended, or feedback came: metrics and their values.

        A value that is no finite number is none: an arm of such values has no data, rather than a mean beyond no limit.
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
        """Add what was counted elsewhere: a sum, and over how many observations it is.

        Gate firings are over the tokens computed meanwhile; an arm without gates has 0. ValueError: number is below 0.
        """
        self._need(arm)
        if number < 0:
            raise ValueError(f"expected a number of observations of {metric!r} of at least 0, found {number}")
        for watch in self._warm(now):
            if watch.rule.metric == metric and isfinite(total):
                watch.sums[arm].total += total
                watch.sums[arm].number += number

    def measure(self, now: float, authored: Mapping[str, float] = MappingProxyType({})) -> list[Action]:
        """Close the windows whose interval has passed, and say what is to be done.

        authored: of each arm the firings of gates for each token that its author measured, where that was done.
        A call that comes late closes one window, as long as it was: windows that nobody could have filled say nothing.
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
        """An arm was withdrawn, by whomever."""
        self._need(arm)
        if arm in self._watched:
            self._watched.remove(arm)

    def states(self) -> list[State]:
        """How every arm but the control stands with every rule."""
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
    """What a window of so many seconds comes to."""
    result, why, is_missing = _verdict(rule, arm, control, known)
    length, shadow = spoken(round(seconds, 1)), _amount(rule, control)
    explained = f"{rule.metric} was {_amount(rule, arm)} in {length} (control: {shadow}); {why}"
    return Observation(result, explained, seconds, arm.mean, arm.number, control.mean, control.number, is_missing)


def _verdict(rule: Guardrail, arm: Sums, control: Sums, known: Known) -> tuple[Result, str, bool]:
    """The result, why, and whether data are missing.

    missing    : fewer than needed, though as many were sent to the arm, and of expected = share · control that are
                 enough, by more than chance = CHANCE standard errors of expected - found, √(expected + share·expected)
                 as both are counts
    """
    needed, shadow = rule.minimum_requests, _requests(rule, control)
    found = _requests(rule, arm) if arm.number else 0
    if arm.mean is None or found < needed:
        # Not from all of the control's requests: where those have no first token, none can be missed here.
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
    """The result of a mean, and why.

    value      = mean of the arm, over the control's mean for a ratio
    failed     : value beyond limit, which is a multiple of what the author measured where the rule says so
    successful : value at or beyond limit - hysteresis·|limit| on the other side, + for a minimum
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
        if control.mean <= 0:  # over 0 is no number, and over less than 0 the lower mean has the higher ratio
            return "inconclusive", "a ratio to a control of 0 or less is not possible; use a maximum or a minimum"
        value = mean / control.mean
        allowed = f"{value:g} times the control, {allowed}"
    margin = rule.hysteresis * abs(limit)  # of the amount, so that clear of a limit below 0 is not beyond it
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
    """The limit, whether it is an upper one, and what it is a multiple of."""
    for limit, is_upper, held_against in (
        (rule.maximum, True, ""),
        (rule.minimum, False, ""),
        (rule.maximum_ratio, True, CONTROL),
        (rule.minimum_ratio, False, CONTROL),
        (rule.maximum_authored_ratio, True, AUTHOR),
    ):
        if limit is not None:
            return limit, is_upper, held_against
    raise AssertionError("a rule has a limit: Guardrail refuses one that has none")


def _judged(record: _RuleRecord, rule: Guardrail, arm: str, measured: Observation) -> Action | None:
    """Count a measurement, and say what it leads to."""
    record.last = measured
    if measured.result == "waiting":
        return None
    if measured.is_missing:
        record.missing += 1
        why = f"{measured.explained}. This happened {record.missing} times in a row"
        if record.missing >= rule.no_data_limit:
            return Withdraw(arm, rule, why)
        is_news = record.missing == rule.inconclusive_limit + 1  # by one at a time, so it passes here once
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
    """How many requests tell of the metric. Gate firings come by token, from any gate: so many requests there were."""
    return sums.requests if rule.metric == GATE_FIRINGS else sums.number


def _amount(rule: Guardrail, sums: Sums) -> str:
    """A mean and what it is over, in words."""
    tokens = f"{sums.number} tokens of " if rule.metric == GATE_FIRINGS else ""
    return f"{'unknown' if sums.mean is None else f'{sums.mean:g}'} over {tokens}{_requests(rule, sums)} requests"
