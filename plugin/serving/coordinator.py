"""The coordinator: the interface to the API server process that owns the slots, in this process or in another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.errors import AmbiguousVersion, EditsError, NotFound, NotServed, SettingsError
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange
from vllm_edits.edit_store.reading.reader import Reader
from vllm_edits.edit_store.storage.store import TagEntry
from vllm_edits.plugin.experiments.exposure_log import ExposureLog
from vllm_edits.plugin.experiments.feedback_token import FeedbackTokens
from vllm_edits.plugin.experiments.live_experiments import LiveExperiments
from vllm_edits.plugin.experiments.records import Record
from vllm_edits.plugin.experiments.resolver import Resolver
from vllm_edits.plugin.graph.reservation import Reservation, SlotBytes
from vllm_edits.plugin.metrics import Metrics
from vllm_edits.plugin.request import Request
from vllm_edits.plugin.serving.admission import Admission
from vllm_edits.plugin.serving.growth import Growth
from vllm_edits.plugin.serving.lease import Lease
from vllm_edits.plugin.serving.probing import WEIGHTS_SLOT, Continuing, Prober
from vllm_edits.plugin.serving.reconcile import Reconciler
from vllm_edits.plugin.serving.slots import Slots
from vllm_edits.plugin.serving.status import status
from vllm_edits.plugin.serving.variants import Choice
from vllm_edits.plugin.serving.versions import KnownVersions, Versions
from vllm_edits.plugin.serving.weights_mode import Running, WeightsMode
from vllm_edits.plugin.serving.workers import Workers, ask
from vllm_edits.server_config.settings import Grow, ProbePolicy

logger = logging.getLogger("vllm.edits")

T = TypeVar("T")


class NotFollowed(EditsError):
    """A change was written to the store, but this server did not follow it."""


@dataclass(frozen=True)
class TagChange:
    """A change of a variant's tag in the store. Without a tag, it is the server's default tag."""

    operation: Literal["promote", "rollback", "withdraw"]
    name: str
    tag: str | None = None
    version: str = ""
    """version to promote: its digest, or the first digits"""
    reason: str = ""
    actor: str = ""


@dataclass(frozen=True)
class CapacityWish:
    """The capacity that an operator wants: for versions (name, name@tag or name@version), and as in `edits.reserve`."""

    versions: Sequence[str] = ()
    reserve: Sequence[str | Mapping[str, Any]] = ()
    """profiles and entries"""
    scopes: int = 0


@dataclass(frozen=True)
class Served:
    """The names that clients may use: each with its variant and version, and whether the base model is served."""

    variants: Sequence[tuple[str, str, str]]
    base: bool
    experiments: Sequence[str] = ()
    """names that only experiments define"""


class Coordinator(Protocol):
    """The process that owns the slots, as seen by API server processes. Its answers are plain data, except leases."""

    async def lease(self, request: Request) -> Lease:
        """Lease a slot for a request. Waits while all slots are in use.

        NotFound, AmbiguousVersion, NotServed or RequestRefused; InstallRefused if the version cannot be installed.
        """

    async def renew(self, choice: Choice | None) -> Lease:
        """Lease a slot for an earlier choice: the same version, even if its name has moved. None: the base model."""

    async def served(self) -> Served:
        """The names that clients may use now."""

    async def status(self) -> Mapping[str, Any]:
        """The answer of `GET /v1/edits`."""

    async def sync(self) -> Mapping[str, Any]:
        """Read the store now and follow new promotions. Returns the attempted swaps, and the last error."""

    async def change(self, change: TagChange) -> Mapping[str, Any]:
        """Append a change to the store and follow it at once. Returns the entry and the swap."""

    async def grow(self, wish: CapacityWish) -> Mapping[str, Any]:
        """Begin to make capacity for what an operator wants. Returns the state of the reservation, and as `wanted` the
        name under which a failure would be in `failed`.

        NotFound, BundleRefused or SettingsError if it is not valid; InstallRefused if the server may not grow.
        """

    async def probe(self, ref: str) -> Mapping[str, Any]:
        """Probe a variant now, as name, name@tag or name@version. Returns the figures.

        If they are out of bounds, it gets no request any more until a probe passes. NotFound and others as for a lease.
        """

    def record(self, record: Record) -> None:
        """Record that a request of an experiment, or a shadowed request, has ended."""

    async def feedback(self, request: str, metric: str, value: float) -> Mapping[str, Any]:
        """Record feedback on a request. Returns what was counted. NotFound or FeedbackRefused."""


@dataclass(frozen=True)
class Extras:
    """Optional parts of a server. By default nothing is logged, and the weights are not changed."""

    weights_key: tuple[str, str] | None = None
    """name and tag of the variant in the engine's weights"""
    weights_running: Running = "finish"
    weights_patience_seconds: float = 60.0
    exposures: ExposureLog | None = None
    feedback_tokens: FeedbackTokens | None = None
    resolver: Resolver | None = None
    probes: ProbePolicy = "run"
    continuing: Continuing | None = None
    """the engines that answer probes; None: no version is probed"""
    grow: Grow = "never"
    grow_bytes: int | None = None
    headroom: float = 1.0


class LocalCoordinator:
    """The coordinator in this process. All its parts are put together here."""

    def __init__(
        self, reader: Reader, workers: Workers, metrics: Metrics, *, base: BaseModelRef, base_names: tuple[str, ...],
        reservation: Reservation, slot_bytes: SlotBytes, slots: int, default_tag: str, extras: Extras | None = None,
    ) -> None:  # fmt: skip
        extras = extras or Extras()
        known = KnownVersions()
        self.experiments = LiveExperiments(
            metrics, extras.exposures or ExposureLog(None, 0), extras.feedback_tokens or FeedbackTokens.of(None),
            prepare=self._prepare_arm, append=self._append_of_experiment, info=known.__getitem__,
            resolver=extras.resolver,
        )  # fmt: skip
        self.prober = Prober(extras.continuing, metrics, policy=extras.probes)
        self.slots = Slots(
            slots, workers, metrics, info=known.__getitem__, fired=self.experiments.fired, prober=self.prober
        )
        self.growth = Growth(
            reservation, workers, self.slots, metrics, slot_bytes=slot_bytes, grow=extras.grow,
            headroom=extras.headroom, limit_bytes=extras.grow_bytes, ended=self._follow_again,
        )  # fmt: skip
        self.versions = Versions(reader, known, self.slots, self.growth, self.prober, base=base)
        self.weights = WeightsMode(
            extras.weights_key, partial(ask, workers), running=extras.weights_running,
            patience_seconds=extras.weights_patience_seconds, inside=self._inside,
            abort_all=workers.abort_all, probe=partial(self.prober.first, slot=WEIGHTS_SLOT),
        )  # fmt: skip
        self.reconciler = Reconciler(
            reader, versions=self.versions, slots=self.slots, experiments=self.experiments, weights=self.weights,
            workers=workers, metrics=metrics, base_names=base_names, default_tag=default_tag,
        )  # fmt: skip
        self.admission = Admission(
            lambda: self.reconciler.table, versions=self.versions, slots=self.slots, experiments=self.experiments,
            weights=self.weights, prober=self.prober, metrics=metrics,
        )  # fmt: skip

    async def _follow_again(self, *, grown: bool) -> None:
        """Follow the promotions that waited for a growth. If the reservation has grown, refused ones may fit too.

        Versions in slots are probed again, since other code computes them now. One that fails gets no request any more.
        """
        if grown and self.prober.policy != "off":
            await self._probe_again(self.slots.residency.residents())
        await self.reconciler.sync(retry_refused=grown)

    async def _probe_again(self, versions: Iterable[str]) -> None:
        """Probe those of the versions that are in the weights or in a slot. What is paged in is probed then."""
        for version in versions:
            try:
                if version == self.weights.version:
                    await self.prober.probe(version, WEIGHTS_SLOT)
                elif self.slots.residency.is_open(version):
                    slot = self.slots.residency.acquire(version)
                    try:
                        await self.prober.probe(version, slot)
                    finally:
                        self.slots.release(version)
            except EditsError as error:
                logger.warning("could not probe version %s again: %s", version[:12], error)

    async def probe(self, ref: str) -> Mapping[str, Any]:
        choice, run = await self._served(ref, self.admission.probe(ref))
        return {"name": choice.variant, "version": choice.version, **run.as_json()}

    def _inside(self) -> int:
        """The number of requests in flight."""
        return self.admission.in_flight.total()

    async def lease(self, request: Request) -> Lease:
        return await self._served(request.target or request.model, self.admission.lease(request))

    async def _served(self, target: str, found: Awaitable[T]) -> T:
        """The result for a name. NotServed with the reason if the name is promoted, and refused here."""
        try:
            return await found
        except (NotFound, AmbiguousVersion) as error:
            name, _, tag = target.partition("@")
            if refusal := self.reconciler.refusal(name, tag or self.reconciler.table.default_tag):
                raise NotServed(f"This variant cannot be served: {refusal}") from error
            raise

    async def renew(self, choice: Choice | None) -> Lease:
        return await self.admission.renew(choice)

    async def served(self) -> Served:
        table = self.reconciler.table
        known = {*table.base_names, *table.names()}
        return Served(list(table.served()), table.in_weights is None, tuple(sorted(self.experiments.names - known)))

    async def status(self) -> Mapping[str, Any]:
        return status(
            self.reconciler, self.admission, self.slots, experiments=self.experiments, weights=self.weights,
            growth=self.growth, prober=self.prober,
        )  # fmt: skip

    async def sync(self) -> Mapping[str, Any]:
        await self._probe_again(self.prober.failed())
        swaps = await self.reconciler.sync(retry_refused=True, wait_for_weights=True)
        await self.slots.read_firings()
        return {"swaps": [asdict(swap) for swap in swaps], "last_error": self.reconciler.last_error}

    async def grow(self, wish: CapacityWish) -> Mapping[str, Any]:
        profiles = [item for item in wish.reserve if isinstance(item, str)]
        told = [*wish.versions, *profiles, *(["explicit entries"] if len(profiles) < len(wish.reserve) else [])]
        told += [f"{wish.scopes} scopes"] if wish.scopes else []
        if not told:
            raise SettingsError(
                "nothing to make capacity for: expected versions, profiles or entries in reserve, or scopes"
            )
        needed = self.versions.capacity(wish.reserve, wish.scopes)
        for ref in wish.versions:
            needed = needed | await self.versions.needs(ref, self.reconciler.table.default_tag)
        self.growth.start(wanted := ", ".join(told), needed)
        return {**self.growth.status(), "wanted": wanted}

    def record(self, record: Record) -> None:
        self.experiments.record(record)

    async def feedback(self, request: str, metric: str, value: float) -> Mapping[str, Any]:
        return self.experiments.feedback(request, metric, value)

    async def change(self, change: TagChange) -> Mapping[str, Any]:
        entry = await asyncio.to_thread(self._append(change))
        key = entry.name, entry.tag
        swaps = await self.reconciler.sync(retry_refused=True, wait_for_weights=key == self.weights.key)
        swap = next((swap for swap in swaps if (swap.variant, swap.tag) == key), None)
        if swap is not None and swap.error and not swap.awaits_capacity:
            raise NotFollowed(
                f"the {change.operation} was written to the store, but this server did not follow it: {swap.error}"
            )
        return {"entry": entry.model_dump(mode="json"), "swap": asdict(swap) if swap else None}

    def _append(self, change: TagChange) -> Callable[[], TagEntry]:
        """A function that appends a change, for a thread. CannotSign if there is no signing key."""
        store = self.versions.reader.writable()
        tag = change.tag or self.reconciler.table.default_tag
        said = {"tag": tag, "reason": change.reason, "actor": change.actor}
        if change.operation == "promote":
            return lambda: store.promote(f"{change.name}@{change.version}", **said)
        if change.operation == "rollback":
            return lambda: store.rollback(change.name, **said)
        return lambda: store.withdraw(change.name, **said)

    def _append_of_experiment(self, change: ExperimentChange, reason: str, actor: str) -> None:
        Experiments(self.versions.reader.writable()).change(change, reason=reason, actor=actor)

    async def _prepare_arm(self, name: str, version: str) -> None:
        """Prepare the version of an arm. EditsError if this server cannot serve it."""
        await self.versions.require_author(name, version)
        await self.versions.prepare(version)
