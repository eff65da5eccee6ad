"""Decides the route of a request: its arm and the version of the arm. Pure: equal inputs give equal routes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import datetime

from vllm_edits.edit_store.errors import ArmRefused
from vllm_edits.edit_store.experiments.assignment import bucket, chosen
from vllm_edits.edit_store.experiments.state import Standing, Standings
from vllm_edits.plugin import headers
from vllm_edits.plugin.experiments.records import How
from vllm_edits.plugin.experiments.shadow_pairs import shadow_in
from vllm_edits.plugin.request import Request, Source, Unit

ArmKey = tuple[str, str]
"""An experiment and an arm."""


@dataclass(frozen=True)
class Assignment:
    """The assignment of a request to an arm. Only assignments by hash are evidence."""

    experiment: str
    phase: int
    arm: str
    how: How
    unit: str
    """hash of the unit"""
    source: Source


@dataclass(frozen=True)
class Route:
    """The route of a request, decided once, before it has a slot."""

    target: str
    """the name that answers, as in the `model` field; '' or `base` for the base model"""
    assignment: Assignment | None = None
    """the assignment to an arm; None for a request outside experiments"""
    fallback: Route | None = field(default=None, repr=False)
    """the route if the target cannot be served"""
    shadow: str = ""
    """the name of the shadow that also answers"""
    feedback_token: str = ""
    """the id for feedback on the request"""


def decide(standings: Standings, request: Request, at: datetime, unavailable: Collection[ArmKey] = ()) -> Route:
    """The route of a request. Without an experiment for its model name, the route is to that model.

    unavailable: arms that this server cannot serve, whatever the store says. ArmRefused if the request asks for an arm
    that does not exist here.
    """
    if request.target:
        return Route(request.target)
    if pair := shadow_in(request.headers):
        return Route(pair[0], shadow=pair[1])
    about = [standing for _, standing in sorted(standings.items())]
    about = [standing for standing in about if standing.serving and standing.document.model == request.model]
    if request.arm:
        return _forced(about, request, unavailable)
    for standing in about:
        route = _decided(standing, request, at, unavailable)
        if route is not None:
            return route
    return Route(about[0].document.control.serves if about else request.model)  # in no part of a namespace


def _forced(about: list[Standing], request: Request, unavailable: Collection[ArmKey]) -> Route:
    for standing in about:
        document = standing.document
        for arm in document.arms:
            if arm.name == request.arm:
                if arm.name in standing.withdrawn or (document.name, arm.name) in unavailable:
                    raise ArmRefused(f"arm {arm.name!r} of experiment {document.name!r} is not served here now")
                unit = request.unit(document.unit_header)
                return Route(arm.serves, _of(standing, arm.name, unit, "forced"))
    known = (
        ", ".join(arm.name for standing in about for arm in standing.document.arms)
        or "none, because no experiment runs for it"
    )
    raise ArmRefused(f"{headers.ARM} asks for arm {request.arm!r}. Arms for the model {request.model!r}: {known}")


def _decided(standing: Standing, request: Request, at: datetime, unavailable: Collection[ArmKey]) -> Route | None:
    document = standing.document
    unit = request.unit(document.unit_header)
    if standing.promoted_arm is not None:  # promoted by an operator, so there is no fallback
        return Route(document.arm(standing.promoted_arm).serves)
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
        return Route(arm.serves, assignment, shadow=_shadow(standing, request, unavailable))
    control = Route(document.control.serves, replace(assignment, how="fallback"))
    if arm.name in standing.withdrawn or (document.name, arm.name) in unavailable:
        return control
    return Route(arm.serves, assignment, control)


def _shadow(standing: Standing, request: Request, unavailable: Collection[ArmKey]) -> str:
    """The name of the shadow arm's version for its share of the requests, or ''."""
    document = standing.document
    shadow = document.shadow
    if shadow is None or shadow.arm in standing.withdrawn or (document.name, shadow.arm) in unavailable:
        return ""
    drawn = bucket(f"shadow/{standing.seed}", request.id) < shadow.share
    return document.arm(shadow.arm).serves if drawn else ""


def _of(standing: Standing, arm: str, unit: Unit, how: How) -> Assignment:
    return Assignment(standing.document.name, standing.phase, arm, how, unit.hash, unit.source)
