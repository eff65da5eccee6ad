"""The state of all experiments, computed from one log, entry by entry.

There is one log for all experiments, because two experiments that share units must not run at the same time. If two
writers start such experiments, create-if-absent of the next entry decides between them. A follower reads one small
object per look. The computation is pure. Writers (which refuse an invalid change before they write it) and readers use
the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vllm_edits.edit_store.bundle import Name
from vllm_edits.edit_store.errors import Conflict, EditsError, ExperimentRefused, NotFound, Reason, nearest
from vllm_edits.edit_store.experiments.document import BASE, Experiment, Fraction
from vllm_edits.edit_store.experiments.durations import spoken
from vllm_edits.edit_store.refs import Ref, is_digest
from vllm_edits.edit_store.storage.log import Entry

FOLDER = "experiments"
Status = Literal["draft", "running", "stopped", "promoted"]


class ExperimentChange(BaseModel):
    """A change of an experiment. create has a `document`, withdraw and promote an `arm`, widen a `coverage`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: Name
    operation: Literal["create", "start", "widen", "hold", "resume", "withdraw", "promote", "stop"]
    document: Experiment | None = None
    arm: Name | None = None
    coverage: Fraction | None = None
    phase: int | None = None
    """the phase to change; None for the present phase"""


class ExperimentEntry(ExperimentChange, Entry):
    """One entry of the log."""


@dataclass(frozen=True)
class Standing:
    """The state of one experiment. Within a phase, no unit changes from one arm to another."""

    document: Experiment
    status: Status = "draft"
    phase: int = 0
    """counts from 1; part of the seed of the assignment"""
    began_at: datetime | None = None
    """start of the phase"""
    ramped: float = 0.0
    """seconds for which the ramp had run before `ramping_since`"""
    ramping_since: datetime | None = None
    """None while the ramp is held"""
    widened: float = 0.0
    """coverage set by widen"""
    withdrawn: frozenset[str] = frozenset()
    promoted_arm: str | None = None
    """the promoted arm, which serves all units"""
    reason: str = ""
    """reason of the last change"""

    @property
    def seed(self) -> str:
        return f"{self.document.name}/{self.phase}"

    @property
    def serving(self) -> bool:
        """True if the experiment decides on requests for its model name."""
        return self.status in ("running", "promoted")

    def elapsed(self, at: datetime) -> float:
        """Seconds for which the ramp has run."""
        return self.ramped + (max(0.0, (at - self.ramping_since).total_seconds()) if self.ramping_since else 0.0)

    def coverage(self, at: datetime) -> float:
        """The share of units that take part."""
        return max(self.widened, self.document.coverage_after(self.elapsed(at)))

    def held(self, at: datetime) -> Standing:
        """The same state with the ramp held."""
        return replace(self, ramped=self.elapsed(at), ramping_since=None)


Standings = Mapping[str, Standing]
"""The state of every experiment, by name."""


def fold(entries: Iterable[ExperimentEntry]) -> tuple[dict[str, Standing], list[str]]:
    """The state of all experiments after these entries, and a message for each entry that has no effect."""
    standings: dict[str, Standing] = {}
    without_effect = []
    for entry in entries:
        try:
            standings[entry.experiment] = after(standings, entry, entry.at, entry.reason)
        except EditsError as error:
            without_effect.append(f"entry {entry.sequence} of the experiments has no effect: {error}")
    return standings, without_effect


def after(standings: Standings, change: ExperimentChange, at: datetime, reason: str = "") -> Standing:
    """The state of an experiment after a change. NotFound, Conflict or ExperimentRefused if it is not possible."""
    if change.operation == "create":
        return replace(_created(standings.get(change.experiment), change, at), reason=reason)
    standing = need(standings, change.experiment)
    if change.phase not in (None, standing.phase):
        raise Conflict(
            f"experiment {change.experiment!r} is in phase {standing.phase} now, expected phase {change.phase}"
        )
    made = {
        "start": _started, "widen": _widened, "hold": _held, "resume": _resumed, "withdraw": _withdrawn,
        "promote": _promoted, "stop": _stopped,
    }[change.operation](standing, change, at)  # fmt: skip
    if change.operation == "start" and (reasons := list(_overlaps(standings, made))):
        raise ExperimentRefused(f"the start of experiment {change.experiment!r}", reasons)
    return replace(made, reason=reason)


def need(standings: Standings, name: str) -> Standing:
    """The state of the experiment with this name. NotFound lists similar names."""
    if name not in standings:
        raise NotFound(f"there is no experiment {name!r}.{nearest(name, standings)} See: vllm-edits experiment list")
    return standings[name]


def is_of_variant(document: Experiment, arm: str) -> bool:
    """True if the arm serves a version of the variant that clients name. Promoting the arm moves that variant's tag."""
    serves = document.arm(arm).serves
    return serves != BASE and Ref.parse(serves).name == document.model.partition("@")[0]


def versions_named(entries: Iterable[ExperimentEntry]) -> set[str]:
    """Versions that documents name by digest. They are in use, although no tag may promote them."""
    refs = [Ref.parse(arm.serves) for entry in entries if entry.document for arm in entry.document.arms
            if arm.serves != BASE]  # fmt: skip
    return {ref.selector for ref in refs if is_digest(ref.selector)}


def _created(known: Standing | None, change: ExperimentChange, at: datetime) -> Standing:
    document = change.document
    if document is None or document.name != change.experiment:
        raise ExperimentRefused(
            f"experiment {change.experiment!r}", [Reason("document", "expected a document with this name, found none")]
        )
    if reasons := list(document.broken()):
        raise ExperimentRefused(f"experiment {document.name!r}", reasons)
    if known is None:
        return Standing(document)
    if not known.serving:
        return replace(known, document=document)
    if reasons := list(_moves(known, document, at)):
        raise ExperimentRefused(f"the new document of experiment {document.name!r} (status: {known.status})", reasons)
    return replace(known, document=document)


def _moves(known: Standing, document: Experiment, at: datetime) -> Iterable[Reason]:
    """Reasons why units would change their arms if this became the document in the same phase."""
    anew = f"Stop it (vllm-edits experiment stop {document.name}), create it again and start it: a new phase begins"
    if document.allotment != known.document.allotment:
        fields = ("model", "unit_header", "arms", "namespace", "holdout")
        changed = [name for name in fields if getattr(document, name) != getattr(known.document, name)]
        yield Reason("moves", f"{', '.join(changed)}: units would change their arms. {anew}")
    reached, would = known.coverage(at), max(known.widened, document.coverage_after(known.elapsed(at)))
    if would < reached:
        yield Reason("moves", f"coverage has reached {reached:g} and would be {would:g}: units would leave. {anew}")


def _started(standing: Standing, change: ExperimentChange, at: datetime) -> Standing:
    name = change.experiment
    if standing.status == "running":
        raise Conflict(
            f"experiment {name!r} runs already, in phase {standing.phase} since {standing.began_at:%Y-%m-%d %H:%M}"
        )
    if standing.status == "promoted":
        raise Conflict(
            f"arm {standing.promoted_arm!r} of experiment {name!r} was promoted and serves all units. "
            f"Stop the experiment first: vllm-edits experiment stop {name}"
        )
    return replace(standing, status="running", phase=standing.phase + 1, began_at=at, ramped=0.0, ramping_since=at,
                   widened=0.0, withdrawn=frozenset(), promoted_arm=None)  # fmt: skip


def _overlaps(standings: Standings, started: Standing) -> Iterable[Reason]:
    mine = started.document
    for name, other in standings.items():
        theirs = other.document
        if not other.serving or name == mine.name:
            continue
        if mine.namespace and theirs.namespace and mine.namespace.overlaps(theirs.namespace):
            yield Reason(
                "namespace",
                f"it uses {mine.namespace.start:g} to {mine.namespace.end:g} of namespace {mine.namespace.name!r}, "
                f"but the running experiment {name!r} uses {theirs.namespace.start:g} to {theirs.namespace.end:g}. "
                "Choose a free part",
            )
        apart = mine.namespace and theirs.namespace and mine.namespace.name == theirs.namespace.name
        if mine.model == theirs.model and not apart:
            yield Reason(
                "model",
                f"experiment {name!r} runs already for the model name {mine.model!r}. Stop it, or give each experiment "
                "a part of one namespace",
            )


def _need_running(standing: Standing, what: str) -> None:
    if standing.status != "running":
        raise Conflict(f"experiment {standing.document.name!r} is {standing.status}: {what}")


def _widened(standing: Standing, change: ExperimentChange, at: datetime) -> Standing:
    _need_running(standing, "there is nothing to widen")
    reached = standing.coverage(at)
    if change.coverage is None or change.coverage <= reached:
        why = (
            f"expected a coverage above the present {reached:g}, found {change.coverage or 0:g}: units would leave "
            "their arms. To make the experiment smaller, stop it, create it again and start it: a new phase begins"
        )
        raise ExperimentRefused(f"the change of experiment {change.experiment!r}", [Reason("moves", why)])
    return replace(standing, widened=change.coverage)


def _held(standing: Standing, change: ExperimentChange, at: datetime) -> Standing:
    _need_running(standing, "there is no ramp to hold")
    if standing.ramping_since is None:
        raise Conflict(
            f"the ramp of experiment {change.experiment!r} is held already, after {spoken(round(standing.ramped))}"
        )
    return standing.held(at)


def _resumed(standing: Standing, change: ExperimentChange, at: datetime) -> Standing:
    _need_running(standing, "there is no ramp to resume")
    if standing.ramping_since is not None:
        raise Conflict(f"the ramp of experiment {change.experiment!r} is not held")
    return replace(standing, ramping_since=at)


def _withdrawn(standing: Standing, change: ExperimentChange, at: datetime) -> Standing:
    _need_running(standing, "no unit is in any arm")
    arm = standing.document.arm(change.arm or "").name
    if arm == standing.document.control.name:
        why = f"{arm!r} is the control: it serves the units of withdrawn arms. Stop the experiment instead"
        raise ExperimentRefused(f"the change of experiment {change.experiment!r}", [Reason("arm", why)])
    if arm in standing.withdrawn:
        raise Conflict(f"arm {arm!r} of experiment {change.experiment!r} is withdrawn already: {standing.reason}")
    return replace(standing.held(at), withdrawn=standing.withdrawn | {arm})


def _promoted(standing: Standing, change: ExperimentChange, at: datetime) -> Standing:
    arm = standing.document.arm(change.arm or "").name
    if standing.status not in ("running", "stopped"):
        raise Conflict(f"experiment {change.experiment!r} is {standing.status}: start it before you promote an arm")
    if arm in standing.withdrawn:
        why = f"arm {arm!r} was withdrawn. To use it again, stop the experiment and start a new phase"
        raise ExperimentRefused(f"the change of experiment {change.experiment!r}", [Reason("arm", why)])
    if is_of_variant(standing.document, arm):  # the variant's own tag now serves it, so the experiment ends
        return replace(standing.held(at), status="stopped")
    return replace(standing.held(at), status="promoted", promoted_arm=arm)


def _stopped(standing: Standing, change: ExperimentChange, at: datetime) -> Standing:
    if not standing.serving:
        raise Conflict(f"experiment {change.experiment!r} is {standing.status}: there is nothing to stop")
    return replace(standing.held(at), status="stopped", promoted_arm=None)
