"""The experiments of one server: their state, the servable arms, exposures, feedback, and guardrail actions.

It runs in the API process that owns the slots, on its event loop. The decisions are pure functions in other modules
(routing.py, guardrails.py); this object keeps their inputs.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from vllm_edits.edit_store.bundle import GATE_FIRINGS
from vllm_edits.edit_store.errors import (
    Conflict,
    EditsError,
    ExperimentRefused,
    FeedbackRefused,
    NotFound,
    Overtaken,
    ShadowRefused,
    StoreUnavailable,
)
from vllm_edits.edit_store.experiments.document import BASE
from vllm_edits.edit_store.experiments.state import ExperimentChange, Standing, Standings
from vllm_edits.edit_store.refs import Ref, is_digest
from vllm_edits.plugin import headers
from vllm_edits.plugin.experiments.exposure_log import ExposureLog
from vllm_edits.plugin.experiments.feedback_token import FeedbackTokens
from vllm_edits.plugin.experiments.guardrails import Action, Guardrails, Withdraw
from vllm_edits.plugin.experiments.records import Exposure, FeedbackRecord, Record
from vllm_edits.plugin.experiments.resolver import Resolver
from vllm_edits.plugin.experiments.routing import ArmKey, Route, decide
from vllm_edits.plugin.metrics import Metrics
from vllm_edits.plugin.periodic import repeat
from vllm_edits.plugin.request import Request
from vllm_edits.plugin.version_info import InfoOf

logger = logging.getLogger("vllm.edits")

RAMP_GOES_ON_FOR = timedelta(seconds=60)
"""time for which a ramp continues while the store cannot be read, because it could not be stopped meanwhile"""
REMEMBERED_FEEDBACK = 100_000
TICK_SECONDS = 1.0

Prepare = Callable[[str, str], Awaitable[None]]
"""Prepares a version (name and digest) in every worker. EditsError if this server cannot serve it."""
Append = Callable[[ExperimentChange, str, str], Any]
"""Appends a change to the store's log, with its reason and its actor. Called in a thread."""


class LiveExperiments:
    """The experiments on this server. `follow` takes the state from the store; `route` decides for each request."""

    def __init__(
        self, metrics: Metrics, log: ExposureLog, feedback_tokens: FeedbackTokens, *, prepare: Prepare, append: Append,
        info: InfoOf, resolver: Resolver | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:  # fmt: skip
        self.standings: Standings = {}
        self._metrics = metrics
        self._log = log
        self._feedback_tokens = feedback_tokens
        self._prepare = prepare
        self._append = append
        self._info = info
        self._resolver = resolver
        self._now = now
        self._read_at = now()
        self._servable: set[str] = set()
        """prepared versions of arms, as `name@version`"""
        self._refused: dict[str, EditsError] = {}
        """versions of arms that cannot be served here, with the error"""
        self._guards: dict[tuple[str, int], Guardrails] = {}
        self._withdrawn: dict[tuple[str, int, str], str] = {}
        """arms (with experiment and phase) that this server withdrew, with the reason"""
        self._versions: dict[tuple[str, int, str], str] = {}
        """the last version with which each arm (with experiment and phase) answered"""
        self._held: dict[tuple[str, int], float] = {}
        """ramps that this server holds, with the seconds that they had run"""
        self._waiting: list[tuple[ExperimentChange, str]] = []
        """changes that are not written to the store yet"""
        self._heard: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._told: set[str] = set()

    # -- following ---------------------------------------------------------------------------------------------------

    def follow(self, standings: Standings, passed_over: Sequence[str] = ()) -> None:
        """Take the state of all experiments from the store. Withdrawals and stops take effect at once."""
        self._read_at = self._now()
        self.standings = {name: self._as_held(standing) for name, standing in standings.items()}
        for line in passed_over:
            self._tell(line)
        serving = {(name, each.phase): each for name, each in self.standings.items() if each.serving}
        self._guards = {key: self._guard(key, standing) for key, standing in serving.items()}
        self._withdrawn = {key: why for key, why in self._withdrawn.items() if key[:2] in serving}
        self._versions = {key: version for key, version in self._versions.items() if key[:2] in serving}
        self._held = {key: elapsed for key, elapsed in self._held.items() if key in serving}
        self._servable &= {arm.serves for each in serving.values() for arm in each.document.arms}
        if serving and not self._log.keeps:
            self._tell("experiments run, but their exposures are not logged. Set edits.exposure_folder")

    async def make_ready(self, *, retry_refused: bool = False) -> None:
        """Prepare the version of every arm. Until then, or if that fails, the control serves the arm's units.

        retry_refused: also try versions that were refused
        """
        for standing in list(self.standings.values()):
            for arm in standing.document.arms if standing.serving else ():
                await self._make_ready(arm.serves, retry_refused=retry_refused)

    def _as_held(self, standing: Standing) -> Standing:
        """The state with the ramp held, if this server holds it and the store does not say so yet."""
        key = standing.document.name, standing.phase
        if key in self._held and standing.ramping_since is None:
            del self._held[key]
        return replace(standing, ramped=self._held[key], ramping_since=None) if key in self._held else standing

    def _guard(self, key: tuple[str, int], standing: Standing) -> Guardrails:
        known = self._guards.get(key)
        if known is None or known.rules != standing.document.guardrails:
            known = self._new_guard(standing)
        for arm in standing.document.arms[1:]:
            if arm.name in standing.withdrawn or (*key, arm.name) in self._withdrawn:
                known.stop_watching(arm.name)
        return known

    def _new_guard(self, standing: Standing) -> Guardrails:
        document, now = standing.document, time.monotonic()
        ago = (self._now() - standing.began_at).total_seconds() if standing.began_at else 0.0
        weights = {arm.name: arm.weight for arm in document.arms}
        return Guardrails(weights, document.guardrails, now - ago, now, standing.withdrawn)

    async def _make_ready(self, serves: str, *, retry_refused: bool) -> None:
        """Prepare the version of an arm. A version that the arm names by tag is followed as any tag."""
        ref = None if serves == BASE else Ref.parse(serves)
        if ref is None or not is_digest(ref.selector) or serves in self._servable:
            return
        before = self._refused.get(serves)
        if before is not None and before.lasting and not retry_refused:
            return
        try:
            await self._prepare(ref.name, ref.selector)
        except EditsError as error:
            self._refused[serves] = error
            self._tell(f"an arm cannot serve {ref.name}@{ref.selector[:12]}, so the control serves its units: {error}")
        else:
            self._refused.pop(serves, None)
            self._servable.add(serves)

    def has_ready(self, model: str) -> bool:
        """True if `model` is a prepared version of an arm, as `name@version`."""
        return model in self._servable

    def versions(self) -> list[tuple[str, str]]:
        """Name and version of every prepared version of an arm."""
        return [(name, version) for name, _, version in (each.partition("@") for each in self._servable)]

    # -- deciding ----------------------------------------------------------------------------------------------------

    @property
    def names(self) -> set[str]:
        """Model names for which an experiment decides now."""
        return {standing.document.model for standing in self.standings.values() if standing.serving}

    def route(self, request: Request) -> Route:
        """The route of a request. Without an experiment, to its model. ArmRefused or ShadowRefused."""
        if headers.SHADOW in request.headers and not self._log.keeps:
            raise ShadowRefused(f"{headers.SHADOW}: the comparison cannot be logged. Set edits.exposure_folder")
        at = min(self._now(), self._read_at + RAMP_GOES_ON_FOR)
        about = {
            name: each for name, each in self.standings.items()
            if each.serving and each.document.model == request.model
        }  # fmt: skip
        unavailable = {arm for each in about.values() for arm in self._unavailable(each)}
        route = decide(about, request, at, unavailable)
        if self._resolver is not None and about and not (route.shadow or request.arm or request.target):
            arm = self._resolver.arm(*self._flag(about, request, route))
            if arm:
                route = decide(about, replace(request, resolved_arm=arm), at, unavailable)
        if route.assignment is not None and route.assignment.how == "hash":
            guard = self._guards.get((route.assignment.experiment, route.assignment.phase))
            if guard is not None:
                guard.assign(route.assignment.arm, time.monotonic())
        return self._with_token(route)

    def _flag(self, about: Standings, request: Request, route: Route) -> tuple[str, str, list[str], dict[str, str]]:
        """The arguments for the resolver: model, arm by hash, all arms, and OpenFeature's evaluation context."""
        standing = about[route.assignment.experiment if route.assignment else min(about)]
        unit = request.unit(standing.document.unit_header)
        context = {"targetingKey": unit.value, "source": unit.source, "experiment": standing.document.name,
                   "phase": str(standing.phase)}  # fmt: skip
        gone = {arm for _, arm in self._unavailable(standing)} | standing.withdrawn
        arms = [arm.name for arm in standing.document.arms if arm.name not in gone]
        return request.model, route.assignment.arm if route.assignment else "", arms, context

    def _with_token(self, route: Route) -> Route:
        """The route with a feedback token, if it is to an arm of an experiment."""
        if route.assignment is None:
            return route
        arms = [arm.name for arm in self.standings[route.assignment.experiment].document.arms]
        if route.assignment.arm not in arms:  # the document changed while the request waited
            return route
        token = self._feedback_tokens.make(route.assignment, arms.index(route.assignment.arm))
        return replace(route, feedback_token=token)

    def fall_back(self, route: Route, why: EditsError) -> Route | None:
        """The route to the control, if the arm's version cannot be served. None without a fallback."""
        if route.fallback is None:
            return None
        self._tell(f"an arm cannot serve {route.target}, so the control serves its units: {why}")
        return self._with_token(route.fallback)

    def _unavailable(self, standing: Standing) -> set[ArmKey]:
        """Arms whose units the control serves here: their version is not ready, or they were withdrawn here."""
        name, phase = standing.document.name, standing.phase
        return {
            (name, arm.name)
            for arm in standing.document.arms
            if (name, phase, arm.name) in self._withdrawn or not self._can_serve(arm.serves)
        }

    def _can_serve(self, serves: str) -> bool:
        return serves in self._servable or not is_digest(serves.partition("@")[2])

    # -- exposures -------------------------------------------------------------------------------------------------

    def record(self, record: Record) -> None:
        """Log a request that has ended (of an experiment, or with a shadow), and count it for the guardrails."""
        self._log.write(record)
        self._metrics.exposures_lost.set(self._log.lost)
        if isinstance(record, Exposure) and record.chosen == "hash":
            guard = self._guards.get((record.experiment, record.phase))
            if guard is not None:
                tokens, now = record.prompt_tokens + record.output_tokens, time.monotonic()
                self._versions[record.experiment, record.phase, record.arm] = record.version
                guard.see(record.arm, record.metrics(), now)
                if not self._info(record.version).fires:
                    guard.count(record.arm, GATE_FIRINGS, 0.0, tokens, now)

    def fired(self, version: str, times: int, tokens: int) -> None:
        """Count new gate firings of a version, and the tokens computed meanwhile, for all requests."""
        for (name, phase), guard in self._guards.items():
            for arm in self.standings[name].document.arms:
                if self._versions.get((name, phase, arm.name)) == version:
                    guard.count(arm.name, GATE_FIRINGS, float(times), tokens, time.monotonic())

    def feedback(self, request: str, metric: str, value: float) -> Mapping[str, Any]:
        """Count feedback of a client on a request. The same feedback again is harmless.

        NotFound for a request of no experiment here. FeedbackRefused for an unknown metric, a value out of bounds, or a
        second, different value.
        """
        token = self._feedback_tokens.read(request, self.standings)
        known = {each.name: each for each in self.standings[token.experiment].document.feedback}
        if metric not in known:
            there = ", ".join(known) or "none"
            raise FeedbackRefused(
                f"experiment {token.experiment!r} has no feedback metric {metric!r}. Its metrics: {there}"
            )
        low, high = known[metric].minimum, known[metric].maximum
        if not low <= value <= high:
            raise FeedbackRefused(f"expected a value of {metric!r} from {low:g} to {high:g}, found {value:g}")
        answer = {"experiment": token.experiment, "metric": metric, "value": value, "counted": token.evidence}
        before = self._heard.get((token.request, metric))
        if before is not None and before != value:
            raise FeedbackRefused(
                f"this request has the value {before:g} for {metric!r} already. The first value counts"
            )
        if before is None:
            self._hear((token.request, metric), value)
            if token.evidence:
                self._log.write(
                    FeedbackRecord(
                        at=self._now(),
                        request=token.request,
                        experiment=token.experiment,
                        phase=token.phase,
                        arm=token.arm,
                        unit=token.unit,
                        metric=metric,
                        value=value,
                    )
                )
                self._metrics.feedback.labels(token.experiment, token.arm, metric).observe(value)
                guard = self._guards.get((token.experiment, token.phase))
                if guard is not None:
                    guard.see(token.arm, {metric: value}, time.monotonic())
        return answer

    def _hear(self, key: tuple[str, str], value: float) -> None:
        self._heard[key] = value
        if len(self._heard) > REMEMBERED_FEEDBACK:
            self._heard.popitem(last=False)

    # -- guardrails --------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Measure the guardrails periodically."""
        await repeat(TICK_SECONDS, self.measure, "could not measure the guardrails; trying again")

    async def measure(self) -> None:
        """Carry out the actions of the guardrails: here at once, and with an entry in the store for other servers."""
        for (name, phase), guard in list(self._guards.items()):
            unavailable = self._unavailable(self.standings[name])
            for action in guard.measure(time.monotonic(), self._authored_by_arm(name, phase)):
                if (name, action.arm) in unavailable:  # this server cannot serve the arm, which is not the arm's fault
                    self._guards[name, phase] = self._new_guard(self.standings[name])
                else:
                    self._act(name, phase, action)
            for state in guard.states():
                failing = state.failures if state.is_watched else 0
                self._metrics.guardrail_failures.labels(name, state.arm, state.metric).set(failing)
        await self._tell_the_store()

    def _authored_by_arm(self, name: str, phase: int) -> Mapping[str, float]:
        """The firing rates, measured by the authors, of the arms' last versions."""
        mine = {arm: version for (*of, arm), version in self._versions.items() if of == [name, phase]}
        rates = {arm: self._info(version).authored_firings for arm, version in mine.items()}
        return {arm: rate for arm, rate in rates.items() if rate is not None}

    def _act(self, name: str, phase: int, action: Action) -> None:
        if isinstance(action, Withdraw):
            self._withdrawn[name, phase, action.arm] = action.reason
            self._metrics.experiment_rollbacks.labels(name, action.arm, action.rule.metric).inc()
            logger.error(
                "arm withdrawn experiment=%s arm=%s; the control serves its units: %s", name, action.arm, action.reason
            )
            change = ExperimentChange(experiment=name, operation="withdraw", arm=action.arm, phase=phase)
        else:
            standing = self.standings[name]
            if standing.ramping_since is None:
                return
            self._held[name, phase] = standing.elapsed(self._now())
            self.standings = {**self.standings, name: self._as_held(standing)}
            logger.warning(
                "ramp held experiment=%s because of arm=%s; resume it with vllm-edits experiment resume: %s",
                name,
                action.arm,
                action.reason,
            )
            change = ExperimentChange(experiment=name, operation="hold", phase=phase)
        self._waiting.append((change, action.reason))

    async def _tell_the_store(self) -> None:
        """Write the actions of this server to the store. If the store is not available, retry later."""
        actor = f"guardrail:{socket.gethostname()}"
        while self._waiting:
            change, reason = self._waiting[0]
            try:
                await asyncio.to_thread(self._append, change, reason, actor)
            except Overtaken:  # perhaps by an entry about another experiment
                continue
            except StoreUnavailable as error:
                self._tell(
                    f"could not write {change.operation!r} of experiment {change.experiment} to the store yet; "
                    f"retrying: {error}"
                )
                return
            except (Conflict, NotFound, ExperimentRefused) as error:
                logger.info(
                    "%r of experiment %s was not written to the store, because it has no effect any more: %s",
                    change.operation,
                    change.experiment,
                    error,
                )
            except EditsError as error:
                self._tell(
                    f"could not write {change.operation!r} of experiment {change.experiment} to the store, so it holds "
                    f"on this server only: {error}"
                )
            self._waiting.pop(0)

    def _tell(self, line: str) -> None:
        """Log a line once."""
        if line not in self._told:
            self._told.add(line)
            logger.warning(line)

    # -- status ------------------------------------------------------------------------------------------------------

    def status(self) -> list[Mapping[str, Any]]:
        """The answer of `GET /v1/edits/experiments`."""
        return [self._row(name, standing) for name, standing in sorted(self.standings.items())]

    def _row(self, name: str, standing: Standing) -> Mapping[str, Any]:
        guard = self._guards.get((name, standing.phase))
        at = min(self._now(), self._read_at + RAMP_GOES_ON_FOR)
        return {
            "name": name,
            "model": standing.document.model,
            "status": standing.status,
            "phase": standing.phase,
            "began_at": standing.began_at.isoformat() if standing.began_at else None,
            "coverage": standing.coverage(at),
            "ramp_held": standing.status == "running" and standing.ramping_since is None,
            "promoted_arm": standing.promoted_arm,
            "reason": standing.reason,
            "arms": [
                {"name": arm.name, "serves": arm.serves, "weight": arm.weight,
                 "by_control": self._why_by_control(standing, arm.name, arm.serves)}
                for arm in standing.document.arms
            ],
            "guardrails": [asdict(state) for state in guard.states()] if guard else [],
        }  # fmt: skip

    def _why_by_control(self, standing: Standing, arm: str, serves: str) -> str:
        """The reason why the control serves an arm's units here, or ''."""
        if arm in standing.withdrawn:
            return "withdrawn"
        if why := self._withdrawn.get((standing.document.name, standing.phase, arm)):
            return why
        error = self._refused.get(serves)
        return str(error) if error else "" if self._can_serve(serves) else "its version is being prepared"
