"""Admits requests: turns each request into a lease on a version, with its strength and its slot.

It runs in the API process that owns the slots. Each request passes once, in one direction: its route is decided, the
route's name becomes a choice, and the choice waits for a slot. The engine's weights do not change under a choice,
because a request that waits for a slot counts as in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from vllm_edits.edit_store.errors import EditsError, InstallRefused, NotFound, Reason, RequestRefused
from vllm_edits.plugin.experiments.live_experiments import LiveExperiments
from vllm_edits.plugin.experiments.routing import Route
from vllm_edits.plugin.metrics import Metrics, VariantsNow
from vllm_edits.plugin.request import Request
from vllm_edits.plugin.serving.lease import Lease
from vllm_edits.plugin.serving.probing import Prober, ProbeRun
from vllm_edits.plugin.serving.slots import Slots
from vllm_edits.plugin.serving.variants import BASE, Choice, VariantTable, VersionWanted
from vllm_edits.plugin.serving.versions import Versions
from vllm_edits.plugin.serving.weights_mode import WeightsMode
from vllm_edits.plugin.short_turns import in_thread
from vllm_edits.plugin.version_info import NO_INFO

Pair = tuple[str, str | None]
"""A variant and its version; None for the base model."""


class Admission:
    """Leases slots to requests, and counts the requests in flight."""

    def __init__(
        self, table: Callable[[], VariantTable], *, versions: Versions, slots: Slots, experiments: LiveExperiments,
        weights: WeightsMode, prober: Prober, metrics: Metrics,
    ) -> None:  # fmt: skip
        """table: returns the present table of names."""
        self.in_flight: Counter[Pair] = Counter()
        self._waiting: Counter[Pair] = Counter()
        """requests in flight without a slot"""
        self._table = table
        self._versions = versions
        self._slots = slots
        self._experiments = experiments
        self._weights = weights
        self._prober = prober
        self._metrics = metrics
        metrics.follow_variants(self.variants_now)

    async def lease(self, request: Request) -> Lease:
        """Lease a slot for a request. Waits while all slots are in use.

        If an experiment decides on its model name, the arm answers, or the control if the arm cannot be served.
        NotFound for a name that is not served; RequestRefused for a strength that the version does not accept;
        InstallRefused if the version cannot be installed.
        """
        route = self._experiments.route(request)
        if route.shadow and request.model not in self._experiments.names:
            self._table().resolve(request.model)  # a shadow does not make an unknown name valid
        try:
            return await self._enter(await self._choose(route, request))
        except RequestRefused:
            raise
        except EditsError as error:
            fallback = self._experiments.fall_back(route, error)
            if fallback is None:
                raise
            return await self._enter(await self._choose(fallback, request))

    async def probe(self, target: str) -> tuple[Choice, ProbeRun]:
        """Probe what a name means now, where it is served. The weights and its slot stay meanwhile.

        NotFound for the base model, which has no probes; else as `lease`.
        """
        choice = await self._choose(Route(target), Request(target=target))
        if choice.version is None:
            raise NotFound(f"{target!r} is the base model, which has no probes. Name a variant")
        with (await self._enter(choice, sound=False)).hold() as lease:
            return choice, await self._prober.probe(choice.version, lease.slot)

    async def renew(self, choice: Choice | None) -> Lease:
        """Lease a slot for an earlier choice: the same version, even if its name has moved. None: the base model.

        InstallRefused if the engine's weights have changed since, because the version is not there any more.
        """
        if choice is None:
            return await self.lease(Request())
        await self._weights.admitted()
        if choice.epoch != self._table().epoch:
            gone = Reason(
                "weights", f"the engine's weights were replaced since {choice.requested!r} was chosen. Send it again"
            )
            raise InstallRefused("the request", [gone])
        return await self._enter(choice)

    async def _choose(self, route: Route, request: Request) -> Choice:
        """The choice for a route, under the requested name."""
        target = "" if route.target == BASE else route.target
        while True:
            await self._weights.admitted()
            found = self._look_up(target)
            if isinstance(found, VersionWanted):
                ref, served = found.ref, self._table().promoted[found.ref.name].values()
                known = ref.selector in served  # a complete digest that is served needs no store
                version = ref.selector if known else await in_thread(self._versions.reader.resolve, str(ref))
                found = self._table().choice_of_version(target, ref.name, version)
            info = NO_INFO if found.version is None else await self._versions.info(found.variant, found.version)
            # Else the weights changed while the store was read: choose again.
            if self._weights.open and found.epoch == self._table().epoch:
                return replace(
                    found,
                    requested=request.model or found.requested,
                    strength=info.strength_of(request.strength, target, fixed=found.in_weights),
                    info=info,
                    assignment=route.assignment,
                    feedback_token=route.feedback_token,
                    shadow=route.shadow,
                )

    def _look_up(self, target: str) -> Choice | VersionWanted:
        """The meaning of a name. The prepared version of an arm is known even without a promotion."""
        if self._experiments.has_ready(target):
            name, _, version = target.partition("@")
            return self._table().choice_of_version(target, name, version)
        return self._table().resolve(target)

    async def _enter(self, choice: Choice, *, sound: bool = True) -> Lease:
        """A lease. sound: InstallRefused for a version whose probes failed where it is now."""
        if sound and choice.version and (choice.in_weights or self._slots.residency.is_resident(choice.version)):
            self._prober.require_sound(choice.version)
        self._count_in(choice)
        try:
            in_slot = choice.version is not None and not choice.in_weights
            slot = await self._slot_of(choice, choice.version) if in_slot and choice.version else 0
        except BaseException:
            self._count_out(choice)
            raise
        return Lease(choice, slot, self._release)

    async def _slot_of(self, choice: Choice, version: str) -> int:
        if self._slots.residency.is_open(version):
            return await self._slots.acquire(version)
        self._waiting[choice.variant, version] += 1
        try:
            return await self._slots.acquire(version)
        finally:
            self._waiting[choice.variant, version] -= 1

    def _release(self, lease: Lease) -> None:
        if lease.slot and lease.choice.version is not None:
            self._slots.release(lease.choice.version)
        self._count_out(lease.choice)

    def _count_in(self, choice: Choice) -> None:
        self.in_flight[choice.variant, choice.version] += 1
        self._metrics.enter(choice.variant, choice.version)

    def _count_out(self, choice: Choice) -> None:
        variant, version = choice.variant, choice.version
        self.in_flight[variant, version] -= 1
        if not self.in_flight[variant, version]:
            del self.in_flight[variant, version]
        self._metrics.leave(variant, version)
        self._weights.left()

    def variants_now(self) -> VariantsNow:
        """The served names by state (running, waiting for a slot, on the device), for routers.

        It may be called in other threads, so it works on copies.
        """
        in_flight, waiting, table = dict(self.in_flight), dict(self._waiting), self._table()
        there, loaded = self._slots.residency.is_resident, set[str]()
        called: dict[Pair, list[str]] = {}
        for name, variant, version in table.served():
            called.setdefault((variant, version), []).append(name)
            if version == table.in_weights or there(version):
                loaded.add(name)

        def names(pairs: Iterable[Pair]) -> set[str]:
            return {name for pair in pairs for name in called.get(pair, pair[:1])}

        runs = names(pair for pair, count in in_flight.items() if pair[1] is not None and count > waiting.get(pair, 0))
        waits = names(pair for pair, count in waiting.items() if count) - runs
        return VariantsNow(runs, waits, loaded, self._slots.residency.slots)
