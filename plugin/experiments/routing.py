"""Which arm a request gets, and what that serves. Pure: the same standings, unit and moment give the same answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import datetime

from vllm_edits.edit_store.errors import ArmRefused
from vllm_edits.edit_store.experiments.assignment import bucket, chosen
from vllm_edits.edit_store.experiments.state import Standing, Standings
from vllm_edits.plugin.experiments.evaluation_context import ARM_HEADER, EvaluationContext, Unit
from vllm_edits.plugin.experiments.records import How, Source
from vllm_edits.plugin.experiments.shadow_pairs import shadow_in

ArmKey = tuple[str, str]
"""Experiment and arm."""


@dataclass(frozen=True)
class Assignment:
    """That a request was given an arm. Only those by hash are evidence."""

    experiment: str
    phase: int
    arm: str
    how: How
    unit: str
    """hash of the unit"""
    source: Source


@dataclass(frozen=True)
class Route:
    """What to serve, what to note of it (nothing: it takes no part), and the way to go when it cannot be served."""

    serves: str
    assignment: Assignment | None = None
    fallback: Route | None = field(default=None, repr=False)
    shadow: str = ""
    """what answers too, unseen by the client"""


def decide(
    standings: Standings, model: str, context: EvaluationContext, at: datetime, unavailable: Collection[ArmKey] = ()
) -> Route | None:
    """The way of a request for `model`; None when no experiment is about that name.

    unavailable: arms that this server does not serve, whatever the store says. ArmRefused for an arm that is asked
    for and is in no experiment here.
    """
    mine = [standings[name] for name in sorted(standings)]
    mine = [standing for standing in mine if standing.serving and standing.document.model == model]
    if context.serves:
        return Route(context.serves)
    if pair := shadow_in(context.headers):
        return Route(pair[0], shadow=pair[1])
    if context.arm:
        return _asked(mine, model, context, unavailable)
    if not mine:
        return None
    for standing in mine:
        route = _decided(standing, context, at, unavailable)
        if route is not None:
            return route
    return Route(mine[0].document.control.serves)  # in the namespace part of none


def _asked(mine: list[Standing], model: str, context: EvaluationContext, unavailable: Collection[ArmKey]) -> Route:
    for standing in mine:
        document = standing.document
        for arm in document.arms:
            if arm.name == context.arm:
                if arm.name in standing.withdrawn or (document.name, arm.name) in unavailable:
                    raise ArmRefused(f"arm {arm.name!r} of experiment {document.name!r} is not served here now")
                unit = context.unit(document.unit_header)
                return Route(arm.serves, _of(standing, arm.name, unit, "forced"))
    known = (
        ", ".join(arm.name for standing in mine for arm in standing.document.arms) or "none, since no experiment runs"
    )
    raise ArmRefused(f"{ARM_HEADER} asks for arm {context.arm!r}; for {model!r} there are: {known}")


def _decided(
    standing: Standing, context: EvaluationContext, at: datetime, unavailable: Collection[ArmKey]
) -> Route | None:
    document = standing.document
    unit = context.unit(document.unit_header)
    if standing.everyone is not None:  # a person's word: what cannot be served is an error then, not the control
        return Route(document.arm(standing.everyone).serves)
    if document.namespace is not None and not document.namespace.holds(unit.value):
        return None
    if document.holdout is not None and document.holdout.holds(unit.value):
        return Route(document.control.serves)
    number = chosen(document.weights, standing.coverage(at), bucket(standing.seed, unit.value))
    if number is None:
        return Route(document.control.serves)
    arm = document.arms[number]
    assignment = _of(standing, arm.name, unit, "hash")
    if number == 0:
        return Route(arm.serves, assignment, shadow=_shadow(standing, context, unavailable))
    control = Route(document.control.serves, replace(assignment, how="fallback"))
    if arm.name in standing.withdrawn or (document.name, arm.name) in unavailable:
        return control
    return Route(arm.serves, assignment, control)


def _shadow(standing: Standing, context: EvaluationContext, unavailable: Collection[ArmKey]) -> str:
    """What the shadow arm serves, for the share of requests that it answers too, or ''."""
    document = standing.document
    shadow = document.shadow
    if shadow is None or shadow.arm in standing.withdrawn or (document.name, shadow.arm) in unavailable:
        return ""
    drawn = bucket(f"shadow/{standing.seed}", context.request) < shadow.share
    return document.arm(shadow.arm).serves if drawn else ""


def _of(standing: Standing, arm: str, unit: Unit, how: How) -> Assignment:
    return Assignment(standing.document.name, standing.phase, arm, how, unit.hash, unit.source)
