"""The document of an experiment: its model name, its arms, their shares, and its guardrails. Pure.

    name: milder
    model: polite                       # the model name in requests
    arms:                               # the first is the control
      - {name: control, serves: polite@prod, weight: 0.5}
      - {name: treatment, serves: polite@4f1c9a2b, weight: 0.5}
    coverage: 0.02                      # so one unit in a hundred gets the treatment
    ramp: [{after: 1h, coverage: 0.1}, {after: 1d, coverage: 1}]
    guardrails: [{metric: error, maximum: 0.02}]

The control serves the units that do not take part, and the units of withdrawn arms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from vllm_edits.edit_store.bundle import GATE_FIRINGS, Name
from vllm_edits.edit_store.errors import ExperimentRefused, NotFound, Reason
from vllm_edits.edit_store.experiments import assignment
from vllm_edits.edit_store.experiments.durations import Seconds
from vllm_edits.edit_store.record import FrozenRecord
from vllm_edits.edit_store.refs import Ref

BASE = "base"
"""The value of `serves` for the base model."""
MAX_DOCUMENT_BYTES = 1 << 15
UNIT_HEADER = "x-edits-unit"
BUILT_IN: dict[str, Literal["increase", "decrease", ""]] = {
    "error": "decrease", "first_token_seconds": "decrease", "seconds_per_token": "decrease", "output_tokens": "",
    "empty": "decrease", "looping": "decrease", "corrupted": "decrease",
}  # fmt: skip
"""Metrics of every request, with the better direction. All other metrics are feedback from clients. GATE_FIRINGS is not
one of them: it is counted by version, for guardrails only."""
Fraction = Annotated[float, Field(ge=0, le=1)]


def _servable(text: str) -> str:
    if text != BASE:
        try:
            Ref.parse(text)
        except NotFound as error:
            raise ValueError(f"{error}, or {BASE}") from None
    return text


class Arm(FrozenRecord):
    """An arm: one way to serve the requests of its units."""

    name: Name
    serves: Annotated[str, AfterValidator(_servable)] = Field(description="base, name, name@tag or name@version")
    weight: float = Field(gt=0, le=1, description="share of the units that take part")


class Namespace(FrozenRecord):
    """A part of all units. Experiments whose parts of one namespace do not overlap share no unit."""

    name: Name
    start: Fraction
    end: Fraction

    @model_validator(mode="after")
    def _is_a_part(self) -> Self:
        if self.start >= self.end:
            raise ValueError(
                f"expected start below end, found {self.start:g} and {self.end:g}: it would contain no unit"
            )
        return self

    def overlaps(self, other: Namespace) -> bool:
        """True if a unit may be in both."""
        return self.name == other.name and self.start < other.end and other.start < self.end

    def holds(self, unit: str) -> bool:
        """True if a unit is in this part."""
        return self.start <= assignment.bucket(f"namespace/{self.name}", unit) < self.end


class Holdout(FrozenRecord):
    """Units that take part in no experiment with this holdout."""

    name: Name
    share: Fraction

    def holds(self, unit: str) -> bool:
        """True if a unit is held out."""
        return assignment.bucket(f"holdout/{self.name}", unit) < self.share


class RampStep(FrozenRecord):
    """A step of the ramp: the coverage from a time after the start on."""

    after: Seconds
    coverage: Fraction


class FeedbackMetric(FrozenRecord):
    """A metric that clients report. Values outside the bounds are refused."""

    name: Name
    minimum: float = 0.0
    maximum: float = 1.0
    goal: Literal["increase", "decrease"] = "increase"

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        if self.minimum >= self.maximum:
            raise ValueError(f"expected minimum below maximum, found {self.minimum:g} and {self.maximum:g}")
        return self


class Guardrail(FrozenRecord):
    """A rule that withdraws an arm. The terms are those of Argo Rollouts' analysis.

    Each interval, the mean of a metric over the arm's requests in the interval is measured. The measurement fails
    beyond the limit. It succeeds if the mean is within the limit by the hysteresis. It is inconclusive with too few
    requests. The arm is withdrawn after more than `failure_limit` failures without a success between them.
    """

    metric: str
    maximum: float | None = Field(default=None, description="largest mean of the arm")
    minimum: float | None = Field(default=None, description="smallest mean of the arm")
    maximum_ratio: float | None = Field(default=None, gt=0, description="largest ratio to the control's mean")
    minimum_ratio: float | None = Field(default=None, gt=0, description="smallest ratio to the control's mean")
    maximum_authored_ratio: float | None = Field(
        default=None, gt=0, description="for gate_firings: largest ratio to the measurement by the version's author"
    )
    interval: Annotated[Seconds, Field(gt=0)] = 30.0
    warm_up: Seconds = Field(default=0.0, description="time after the start of the phase without measurements")
    failure_limit: int = Field(default=0, ge=0, description="number of failed measurements that are tolerated")
    minimum_requests: int = Field(default=20, ge=1, description="number of the arm's requests that a measurement needs")
    inconclusive_limit: int = Field(
        default=4,
        ge=0,
        description="number of measurements with too few requests that are tolerated before the ramp is held",
    )
    no_data_limit: int = Field(
        default=20, ge=1, description="number of measurements with too few requests after which the arm is withdrawn"
    )
    hysteresis: float = Field(
        default=0.1, ge=0, lt=1, description="distance to the limit that a success needs, as a fraction of the limit"
    )

    @model_validator(mode="after")
    def _has_one_limit(self) -> Self:
        limits = {"maximum": self.maximum, "minimum": self.minimum, "maximum_ratio": self.maximum_ratio,
                  "minimum_ratio": self.minimum_ratio,
                  "maximum_authored_ratio": self.maximum_authored_ratio}  # fmt: skip
        given = [name for name, value in limits.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(limits)}, found {' and '.join(given) or 'none'}")
        if self.maximum_authored_ratio is not None and self.metric != GATE_FIRINGS:
            raise ValueError(f"maximum_authored_ratio is for {GATE_FIRINGS}, found {self.metric!r}")
        if self.no_data_limit <= self.inconclusive_limit:
            raise ValueError(
                "expected no_data_limit above inconclusive_limit: the ramp is held before the arm is withdrawn"
            )
        return self


class Shadow(FrozenRecord):
    """A share of the control's requests that an arm answers too, as a shadow, for comparison."""

    arm: Name
    share: Annotated[float, Field(gt=0, le=1)]


class Experiment(FrozenRecord):
    """The document of an experiment. `Experiment.load` reads one and lists all its errors."""

    schema_version: Literal[1] = 1
    name: Name
    model: str = Field(min_length=1, max_length=200, description="model name in requests: of a variant, of the base "
                       "model, or a name only for this experiment")  # fmt: skip
    description: str = Field(default="", max_length=4000)
    unit_header: str = Field(default=UNIT_HEADER, pattern=r"^x-[a-z0-9-]+$", description="header with the unit. "
                             "Without it, the unit is the user, else the API key, else the request")  # fmt: skip
    arms: Annotated[tuple[Arm, ...], Field(min_length=2, max_length=16)]
    coverage: Fraction = 1.0
    ramp: tuple[RampStep, ...] = ()
    namespace: Namespace | None = None
    holdout: Holdout | None = None
    feedback: tuple[FeedbackMetric, ...] = ()
    guardrails: tuple[Guardrail, ...] = ()
    shadow: Shadow | None = None

    @classmethod
    def load(cls, path: Path) -> Experiment:
        """Read a YAML or JSON document. ExperimentRefused lists all errors in it."""
        what = f"experiment {path}"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ExperimentRefused(what, [Reason("document", f"it cannot be read: {error.strerror}")]) from None
        if len(data) > MAX_DOCUMENT_BYTES:
            why = f"expected at most {MAX_DOCUMENT_BYTES} bytes, found {len(data)}"
            raise ExperimentRefused(what, [Reason("document", why)])
        try:
            return cls.parse(yaml.safe_load(data), what)
        except yaml.YAMLError as error:
            raise ExperimentRefused(what, [Reason("document", f"it is neither YAML nor JSON: {error}")]) from None

    @classmethod
    def parse(cls, document: Any, what: str = "experiment") -> Experiment:
        """Check a parsed document. ExperimentRefused lists all errors in it."""
        try:
            found = cls.model_validate(document)
        except ValidationError as error:
            raise ExperimentRefused(what, list(_explained(error))) from None
        if reasons := list(found.broken()):
            raise ExperimentRefused(f"experiment {found.name!r}", reasons)
        return found

    @property
    def control(self) -> Arm:
        """The first arm, with which the other arms are compared."""
        return self.arms[0]

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(arm.weight for arm in self.arms)

    @property
    def steps(self) -> tuple[RampStep, ...]:
        """All steps of the ramp, including the start."""
        return (RampStep(after=0, coverage=self.coverage), *self.ramp)

    @property
    def allotment(self) -> tuple[Any, ...]:
        """The fields that, beside the coverage, determine the arm of a unit and the version of an arm."""
        return self.name, self.model, self.unit_header, self.arms, self.namespace, self.holdout

    def arm(self, name: str) -> Arm:
        """The arm with this name. NotFound lists the arms."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise NotFound(f"experiment {self.name!r} has no arm {name!r}; it has {', '.join(a.name for a in self.arms)}")

    def coverage_after(self, elapsed: float) -> float:
        """The share of units that take part `elapsed` seconds after the start."""
        return [step.coverage for step in self.steps if step.after <= elapsed][-1]

    def metrics(self) -> dict[str, Literal["increase", "decrease", ""]]:
        """All metrics of a request, with the better direction."""
        return BUILT_IN | {metric.name: metric.goal for metric in self.feedback}

    def broken(self) -> Iterator[Reason]:
        """Errors in the combination of the fields."""
        total = sum(self.weights)
        if abs(total - 1) > 1e-9:
            yield Reason("weights", f"expected weights that sum to 1, found {total:g} of {_listed(self.weights)}")
        for what, names in (
            ("arms", [arm.name for arm in self.arms]),
            ("feedback", [metric.name for metric in self.feedback]),
        ):
            if twice := [name for name, times in Counter(names).items() if times > 1]:
                yield Reason("names", f"{what}: {_listed(twice)} is listed more than once")
        yield from self._broken_ramp()
        if taken := [metric.name for metric in self.feedback if metric.name in {*BUILT_IN, GATE_FIRINGS}]:
            yield Reason("names", f"feedback: {_listed(taken)} is measured by the server; choose another name")
        for rule in self.guardrails:
            if rule.metric not in {*self.metrics(), GATE_FIRINGS}:
                known = _listed([*self.metrics(), GATE_FIRINGS])
                yield Reason("guardrails", f"unknown metric {rule.metric!r}; known: {known}")
        if self.shadow is not None and self.shadow.arm not in [arm.name for arm in self.arms[1:]]:
            known = _listed([arm.name for arm in self.arms[1:]])
            yield Reason("shadow", f"expected an arm other than the control ({known}), found {self.shadow.arm!r}")

    def _broken_ramp(self) -> Iterator[Reason]:
        for before, after in pairwise(self.steps):
            if after.after <= before.after:
                yield Reason(
                    "ramp", f"expected steps in order of time, found {after.after:g} s after {before.after:g} s"
                )
            if after.coverage < before.coverage:
                yield Reason(
                    "ramp",
                    f"coverage {after.coverage:g} after {before.coverage:g} would take units out of their arms. A "
                    "ramp can only grow. To make the experiment smaller, stop it and start a new phase",
                )
        least = min(step.coverage for step in self.steps if step.coverage or step == self.steps[-1])
        for arm in self.arms:
            if 0 < least * arm.weight < 1 / assignment.BUCKETS or not least:
                yield Reason(
                    "ramp",
                    f"arm {arm.name!r} has a share of {least * arm.weight:.2g} of all units at coverage {least:g}. "
                    f"The hash distinguishes only {assignment.BUCKETS} parts, so the arm may get no unit. Raise the "
                    "coverage or the weight",
                )


def _explained(error: ValidationError) -> Iterator[Reason]:
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown field"
        yield Reason("document", f"{where}: {message}" if where else message)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
