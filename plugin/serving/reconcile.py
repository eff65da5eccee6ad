"""Store heads to installed versions: the story of a swap, and the lending of slots to requests.

A swap goes: fetch, verify, install into a free slot on every worker, compare what the workers hold, switch the name,
and clear the old slot when its last request has ended. All before the switch can fail without a client seeing it.
This object and `Slots` are the API process's only state. All methods run on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.bundle import BaseModelRef, Bundle
from vllm_edits.edit_store.errors import BundleRefused, EditsError, InstallRefused, NotTrusted, Reason, RequestRefused
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange
from vllm_edits.edit_store.reading.reader import Reader
from vllm_edits.edit_store.storage.store import TagEntry
from vllm_edits.edit_store.trust import Enforcement
from vllm_edits.plugin.experiments.evaluation_context import NO_CONTEXT, EvaluationContext
from vllm_edits.plugin.experiments.exposure_log import ExposureLog
from vllm_edits.plugin.experiments.feedback_token import FeedbackTokens
from vllm_edits.plugin.experiments.live_experiments import LiveExperiments
from vllm_edits.plugin.experiments.resolver import Resolver
from vllm_edits.plugin.experiments.routing import Route
from vllm_edits.plugin.graph.reservation import Reservation, SlotBytes
from vllm_edits.plugin.metrics import OTHER, UNKNOWN, Metrics, VariantsNow
from vllm_edits.plugin.serving.lease import Lease
from vllm_edits.plugin.serving.slots import Slots
from vllm_edits.plugin.serving.variants import BASE, Choice, VariantTable, VersionWanted
from vllm_edits.plugin.serving.version_info import NO_INFO, VersionInfo
from vllm_edits.plugin.serving.weights_mode import Running, WeightsMode
from vllm_edits.plugin.serving.workers import Workers, ask, prepare
from vllm_edits.plugin.short_turns import in_thread

logger = logging.getLogger("vllm.edits")

RESERVED_NAMES = (BASE, UNKNOWN, OTHER)
"""What headers and labels call things that are no variant."""


@dataclass
class Swap:
    """One attempt to follow a tag. Seconds by phase; `error` is empty when the name was switched.

    A version of None is none: before a tag's first promotion, and after a withdrawal.
    """

    variant: str
    tag: str
    from_version: str | None
    to_version: str | None
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @contextmanager
    def phase(self, name: str, metrics: Metrics) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 6)
        metrics.swap_seconds.labels(name).observe(self.seconds[name])


@dataclass(frozen=True)
class Refusal:
    """Why a tag's entry is not served. One that is not `lasting` may pass: every look tries it again."""

    sequence: int
    error: str
    lasting: bool


class Reconciler:
    """Keeps what is served equal to what the store promotes."""

    def __init__(
        self,
        reader: Reader,
        workers: Workers,
        metrics: Metrics,
        *,
        base: BaseModelRef,
        base_names: tuple[str, ...],
        reservation: Reservation,
        slot_bytes: SlotBytes,
        slots: int,
        default_tag: str,
        weights_key: tuple[str, str] | None = None,
        weights_running: Running = "finish",
        weights_patience_seconds: float = 60.0,
        exposures: ExposureLog | None = None,
        feedback_tokens: FeedbackTokens | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        self.reader = reader
        self.table = VariantTable(base_names, default_tag)
        self.last_swap: Swap | None = None
        self.last_error = ""
        self.heads_read_at: float | None = None
        self._workers = workers
        self._metrics = metrics
        metrics.follow_variants(self._variants_now)
        self._base = base
        self._reservation = reservation
        self._price = slot_bytes
        self._info: dict[str, VersionInfo] = {}  # small, and the same for ever, so never dropped
        self._heads: dict[tuple[str, str], TagEntry] = {}
        self._refused: dict[tuple[str, str], Refusal] = {}
        self._troubles: Mapping[tuple[str, str], EditsError] = {}
        self._in_flight: Counter[tuple[str, str | None]] = Counter()
        self._waiting: Counter[tuple[str, str | None]] = Counter()
        """requests in flight that have no slot yet"""
        self._syncing = asyncio.Lock()
        self._weights = WeightsMode(
            weights_key, partial(ask, workers), running=weights_running, patience_seconds=weights_patience_seconds,
            inside=self._in_flight.total, abort_all=workers.abort_all,
        )  # fmt: skip
        self.experiments = LiveExperiments(
            metrics, exposures or ExposureLog(None, 0), feedback_tokens or FeedbackTokens.of(None),
            prepare=self.prepare, append=self._append_change, info=self._known, resolver=resolver,
        )  # fmt: skip
        self.slots = Slots(slots, workers, metrics, info=self._known, fired=self.experiments.fired)
        metrics.signature_policy.labels(reader.trust.enforcement).set(1)
        if reader.trust.enforcement is Enforcement.OFF:
            logger.warning(
                "signatures are not asked for: whoever can write to store %s decides what is served. "
                "Name keys with edits.trust_file",
                reader.url,
            )

    # -- following the store ---------------------------------------------------------------------------------------

    async def follow(self, poll_seconds: float) -> None:
        """Sync for ever. A store that cannot be read leaves everything serving; the next look tries again."""
        while True:
            await asyncio.sleep(poll_seconds)
            try:
                await self.sync()
            except Exception:  # the loop must outlive any fault of one look
                logger.exception("sync failed; what is installed keeps serving")
                self._metrics.store_errors.inc()
            self._metrics.store_head_age_seconds.set(self._head_age() or 0)

    def _append_change(self, change: ExperimentChange, reason: str, actor: str) -> None:
        store = self.reader.store
        if self.reader.trust.enforcement is Enforcement.REQUIRE and not store.signs:
            raise EditsError("entries must be signed, and this server has no key: set edits.signing_key_file")
        Experiments(store).change(change, reason=reason, actor=actor)

    async def sync(self, *, retry_refused: bool = False) -> list[Swap]:
        """Read the store's heads once and follow every tag that moved. Returns the swaps that were tried."""
        async with self._syncing:
            try:
                look = await in_thread(self.reader.look)
            except EditsError as error:
                self.last_error = str(error)
                self._metrics.store_errors.inc()
                logger.warning("store cannot be read, serving what is installed: %s", error)
                return []
            self.heads_read_at = time.monotonic()
            self._metrics.store_head_age_seconds.set(0)
            self._note_troubles(look.troubles)
            swaps = []
            for name, tags in look.heads.items():
                for tag, entry in tags.items():
                    known = self._heads.get((name, tag))
                    refused = self._refused.get((name, tag))
                    if known is not None and known.sequence == entry.sequence:
                        continue
                    if refused and refused.lasting and refused.sequence == entry.sequence and not retry_refused:
                        continue
                    swaps.append(await self._follow_tag(entry))
            await self.experiments.follow(look.experiments, look.passed_over)
            self._tell_served()
            return swaps

    def _note_troubles(self, troubles: Mapping[tuple[str, str], EditsError]) -> None:
        """Tell of histories that are broken or were wound back, once each; their tags keep what they serve."""
        for key, trouble in troubles.items():
            if str(trouble) != str(self._troubles.get(key, "")):
                self.last_error = str(trouble)
                self._metrics.bundles_rejected.labels("history").inc()
                logger.error("history refused variant=%s@%s: %s", *key, trouble)
        self._troubles = troubles

    async def _follow_tag(self, entry: TagEntry) -> Swap:
        key = entry.name, entry.tag
        old = self.table.promoted.get(entry.name, {}).get(entry.tag)
        new = None if entry.withdrawn else entry.version
        swap = self.last_swap = Swap(entry.name, entry.tag, old, new)
        try:
            await self._require_trust(entry)
            if key == self._weights.key:
                await self._exchange_weights(swap, entry, new)
            else:
                if new is not None and new != old:
                    await self._bring_in(swap, new)
                self._switch(entry, new)
        except EditsError as error:
            if isinstance(error, NotTrusted) and key not in self._heads:
                await self._fall_back(entry)
            self.last_swap = swap
            swap.error = str(error)
            self._refuse(entry, error, serving=self.table.promoted.get(entry.name, {}).get(entry.tag))
            return swap
        self._refused.pop(key, None)
        self._metrics.swaps.labels("ok").inc()
        logger.info("swap committed variant=%s@%s version=%s seconds=%s", *key, (new or "none")[:12], swap.seconds)
        return swap

    def _refuse(self, entry: TagEntry, error: EditsError, serving: str | None) -> None:
        """Remember and tell why an entry is not followed. What was told already is not told at every look."""
        key, said = (entry.name, entry.tag), str(error)
        before = self._refused.get(key)
        # More signatures may come, and a store may come back; a bundle that breaks a rule stays what it is.
        lasting = isinstance(error, BundleRefused) and not isinstance(error, NotTrusted)
        self._refused[key] = Refusal(entry.sequence, said, lasting)
        if before is not None and (before.sequence, before.error) == (entry.sequence, said) and not lasting:
            return
        self.last_error = said
        reasons = error.reasons if isinstance(error, BundleRefused) else (Reason("error", said),)
        for reason in reasons:
            self._metrics.bundles_rejected.labels(reason.code).inc()
        self._metrics.swaps.labels("refused" if isinstance(error, BundleRefused) else "error").inc()
        logger.error("swap refused variant=%s@%s serving=%s: %s", *key, (serving or "nothing")[:12], error)

    async def _require_trust(self, entry: TagEntry) -> None:
        """NotTrusted when signatures are required and missing; where they are only wished for, a line in the log."""
        self._weigh(f"{entry.name}@{entry.tag} entry {entry.sequence}", await in_thread(self.reader.doubts, entry))

    async def _require_author(self, name: str, version: str) -> None:
        """The same for a version that no tag promotes: a client may name it, so nobody has vouched for it yet."""
        doubts = await in_thread(self.reader.author_doubts, name, version)
        self._weigh(f"version {version[:12]} of {name}", doubts)

    def _weigh(self, what: str, doubts: list[Reason]) -> None:
        if not doubts:
            return
        refusal = NotTrusted(what, doubts)
        if self.reader.trust.enforcement is Enforcement.REQUIRE:
            raise refusal
        logger.warning("served although %s", refusal)

    async def _fall_back(self, entry: TagEntry) -> None:
        """Serve what a server that never stopped would: the newest entry before this one that is believed."""
        believed = await in_thread(self.reader.believed, entry)
        if believed is not None:
            await self._follow_tag(believed)

    async def _exchange_weights(self, swap: Swap, entry: TagEntry, new: str | None) -> None:
        """Follow the tag of the variant that is served from the weights."""
        if new == self._weights.version and not self._weights.doubt:
            self._switch(entry, new)
            return
        if new is not None:
            await self._checked(swap, new)
            with swap.phase("stage", self._metrics):
                await prepare(self._workers, "edits_stage_weights", "edits_weights_staged", new)

        def switch() -> None:
            self._switch(entry, new)
            self.table = replace(self.table, in_weights=new, epoch=self._weights.epoch)

        try:
            await self._weights.exchange(new, entry.sequence, switch, lambda phase: swap.phase(phase, self._metrics))
        finally:
            self.table = replace(self.table, epoch=self._weights.epoch)

    async def _checked(self, swap: Swap, version: str) -> Bundle:
        """A version out of the store, as far as can be said of it here. Nothing of this is visible to clients."""
        if swap.variant in (*self.table.base_names, *RESERVED_NAMES):
            why = f"{swap.variant!r} names the base model or a label of its own here; publish it under another name"
            raise BundleRefused(f"variant {swap.variant!r}", [Reason("name", why)])
        with swap.phase("fetch", self._metrics):
            bundle = await in_thread(self.reader.bundle, version)
        with swap.phase("verify", self._metrics):
            await in_thread(verify.check, bundle, self._base)
        self._info[version] = VersionInfo.of(bundle.manifest)
        return bundle

    async def _bring_in(self, swap: Swap, version: str) -> None:
        """Everything before the switch of a variant that is served per request."""
        bundle = await self._checked(swap, version)
        if missing := self._reservation.missing(bundle.manifest, self._price):
            raise InstallRefused(f"version {version[:12]} of {swap.variant!r}", missing)
        with swap.phase("stage", self._metrics):
            await self.slots.make_ready(version)
        # At start there may be more variants than slots: those beyond are paged in by the first request.
        residency = self.slots.residency
        if swap.from_version is not None or residency.used < residency.slots:
            with swap.phase("install", self._metrics):
                if not await self.slots.bring_in(version):
                    logger.info(
                        "every slot is in use: version %s of %r goes to the device when it is asked for",
                        version[:12], swap.variant,
                    )  # fmt: skip

    def _switch(self, entry: TagEntry, new: str | None) -> None:
        """The commit point on this server: one reference is replaced."""
        old = self.table.promoted.get(entry.name, {}).get(entry.tag)
        self.table = self.table.moved(entry.name, entry.tag, new)
        self._heads[entry.name, entry.tag] = entry
        if new is not None:
            self.slots.restore(new)
        if old is not None and old != new:
            if old not in self.table.promoted.get(entry.name, {}).values():
                self._metrics.variant_info.labels(*self._metrics.labels(entry.name, old)).set(0)
            if old not in self.table.versions():
                self.slots.retire(old)
        self._tell_served()
        if new is not None:
            self._metrics.variant_info.labels(*self._metrics.labels(entry.name, new)).set(1)

    def _tell_served(self) -> None:
        """Name what is served, by tags and by arms of experiments, to those who count."""
        promoted = ((name, version) for name, tags in self.table.promoted.items() for version in tags.values())
        self._metrics.serves([*promoted, *self.experiments.versions()])

    # -- lending slots ---------------------------------------------------------------------------------------------

    async def lease(self, model: str, strength: float | None = None, context: EvaluationContext = NO_CONTEXT) -> Lease:
        """A slot for a request that names `model`; waits while all slots are in use.

        Where an experiment is about that name, the arm of who asks; the control's, when that arm cannot be served.
        NotFound for a name that is not served; RequestRefused for a strength that its version does not take;
        InstallRefused when the version cannot be brought in.
        """
        route = self.experiments.decide(model, context)
        if route is None:
            return await self._lease_of(model, strength)
        if route.shadow and model not in self.experiments.names:
            self.table.resolve(model)  # to compare two does not make a name that is not served one that is
        try:
            return await self._lease_on(route, model, strength)
        except RequestRefused:
            raise
        except EditsError as error:
            if route.fallback is None:
                raise
            self.experiments.fall_back_from(route, error)
            return await self._lease_on(route.fallback, model, strength)

    async def _lease_on(self, route: Route, model: str, strength: float | None) -> Lease:
        """A slot for what an experiment decided, under the name that was asked for."""
        feedback_token = self.experiments.feedback_token(route)
        lease = await self._lease_of("" if route.serves == BASE else route.serves, strength)
        requested = model or lease.choice.requested
        lease.choice = replace(
            lease.choice,
            requested=requested,
            assignment=route.assignment,
            feedback_token=feedback_token,
            shadow=route.shadow,
        )
        return lease

    async def _lease_of(self, model: str, strength: float | None) -> Lease:
        while True:
            await self._weights.admitted()
            found = self._found(model)
            if isinstance(found, VersionWanted):
                ref, served = found.ref, self.table.promoted[found.ref.name].values()
                known = ref.selector in served  # a whole digest that is served needs no store
                version = ref.selector if known else await in_thread(self.reader.resolve, str(ref))
                found = self.table.chosen(model, ref.name, version)
            info = NO_INFO if found.version is None else await self._info_of(found.variant, found.version)
            if self._weights.open and found.epoch == self.table.epoch:  # else they changed while the store was asked
                strength = info.strength_of(strength, model, fixed=found.in_weights)
                return await self._enter(replace(found, strength=strength, info=info))

    def _found(self, model: str) -> Choice | VersionWanted:
        """What a name means. A version that an arm names is known, whether or not a tag promotes anything."""
        if self.experiments.has_ready(model):
            name, _, version = model.partition("@")
            return self.table.chosen(model, name, version)
        return self.table.resolve(model)

    async def prepare(self, name: str, version: str) -> None:
        """Have a version ready that an arm names; EditsError when it cannot be served here."""
        await self._require_author(name, version)
        bundle = await in_thread(self.reader.bundle, version)
        await in_thread(verify.check, bundle, self._base)
        if missing := self._reservation.missing(bundle.manifest, self._price):
            raise InstallRefused(f"version {version[:12]} of {name!r}", missing)
        self._info[version] = VersionInfo.of(bundle.manifest)
        await self.slots.make_ready(version)

    def _known(self, version: str) -> VersionInfo:
        """What is known of a version; of one that was never looked at, nothing."""
        return self._info.get(version, NO_INFO)

    async def _info_of(self, name: str, version: str) -> VersionInfo:
        if version not in self._info:
            await self._require_author(name, version)
            self._info[version] = VersionInfo.of(await in_thread(self.reader.manifest, version))
        return self._info[version]

    async def renew(self, choice: Choice | None) -> Lease:
        """A slot for a choice already made: the same version, whatever its name means by now. None: the base model.

        InstallRefused when the engine's weights are others by now: there the version is no more.
        """
        if choice is None:
            return await self.lease("")
        await self._weights.admitted()
        if choice.epoch != self.table.epoch:
            gone = Reason("weights", f"the engine's weights were exchanged since {choice.requested!r} was chosen")
            raise InstallRefused("a request that outlived its weights", [gone])
        return await self._enter(choice)

    async def _enter(self, choice: Choice) -> Lease:
        """Whoever waits for a slot is inside already: the weights do not change under a choice."""
        self._count_in(choice)
        try:
            in_slot = choice.version is not None and not choice.in_weights
            slot = await self._slot_of(choice, choice.version) if in_slot and choice.version else 0
        except BaseException:
            self._count_out(choice)
            raise
        return Lease(choice, slot, self._release)

    async def _slot_of(self, choice: Choice, version: str) -> int:
        if self.slots.residency.is_open(version):
            return await self.slots.acquire(version)
        self._waiting[choice.variant, version] += 1
        try:
            return await self.slots.acquire(version)
        finally:
            self._waiting[choice.variant, version] -= 1

    def _variants_now(self) -> VariantsNow:
        """For routers: which names run, which wait for a slot, and which need none.

        Asked in threads too, so it looks at copies, each of which is made in one go.
        """
        in_flight, waiting, table = dict(self._in_flight), dict(self._waiting), self.table
        there, loaded = self.slots.residency.is_resident, set[str]()
        called: dict[tuple[str, str | None], list[str]] = {}
        for name, variant, version in table.served():
            called.setdefault((variant, version), []).append(name)
            if version == table.in_weights or there(version):
                loaded.add(name)

        def names(pairs: Iterable[tuple[str, str | None]]) -> set[str]:
            return {name for pair in pairs for name in called.get(pair, pair[:1])}

        runs = names(pair for pair, count in in_flight.items() if pair[1] is not None and count > waiting.get(pair, 0))
        waits = names(pair for pair, count in waiting.items() if count) - runs
        return VariantsNow(runs, waits, loaded, self.slots.residency.slots)

    def _count_in(self, choice: Choice) -> None:
        self._in_flight[choice.variant, choice.version] += 1
        self._metrics.enter(choice.variant, choice.version)

    def _count_out(self, choice: Choice) -> None:
        variant, version = choice.variant, choice.version
        self._in_flight[variant, version] -= 1
        if not self._in_flight[variant, version]:
            del self._in_flight[variant, version]
        self._metrics.leave(variant, version)
        self._weights.left()

    def _release(self, lease: Lease) -> None:
        if lease.slot and lease.choice.version is not None:
            self.slots.release(lease.choice.version)
        self._count_out(lease.choice)

    # -- telling -----------------------------------------------------------------------------------------------------

    def status(self) -> Mapping[str, Any]:
        """What `GET /v1/edits` answers."""
        residency = self.slots.residency
        return {
            "base": {"names": list(self.table.base_names), "in_flight": self._in_flight["base", None]},
            "variants": [
                {
                    "name": name,
                    "tag": tag,
                    "version": version,
                    "sequence": self._heads[name, tag].sequence,
                    "resident": residency.is_resident(version),
                    "in_weights": version == self.table.in_weights,
                    "in_flight": self._in_flight[name, version],
                    "refused": self._refusal_of(name, tag),
                }
                for name, tags in sorted(self.table.promoted.items())
                for tag, version in sorted(tags.items())
            ],
            "refused": [
                {"name": name, "tag": tag, "sequence": refusal.sequence, "error": refusal.error}
                for (name, tag), refusal in sorted(self._refused.items())
            ],
            "experiments": self.experiments.status(),
            "troubles": [
                {"name": name, "tag": tag, "error": str(trouble)}
                for (name, tag), trouble in sorted(self._troubles.items())
            ],
            "signatures": self.reader.trust.enforcement,
            "weights": {
                "variant": "@".join(self._weights.key) if self._weights.key else None,
                "version": self._weights.version,
                "doubt": self._weights.doubt,
            },
            "slots": {
                "total": residency.slots,
                "used": residency.used,
                "held": [
                    {
                        "slot": resident.slot,
                        "version": version,
                        "users": resident.users,
                        "retired": resident.retired,
                        "makes_way": resident.closed,
                    }
                    for version, resident in residency.residents().items()
                ],
                "waiting": self.slots.waiting(),
            },
            "last_swap": asdict(self.last_swap) if self.last_swap else None,
            "last_error": self.last_error,
            "store": {"url": self.reader.url, "head_age_seconds": self._head_age()},
        }

    def refusal(self, model: str) -> str:
        """Why a promoted variant is not served at all, or ''."""
        name, _, tag = model.partition("@")
        return self._refusal_of(name, tag or self.table.default_tag)

    def _refusal_of(self, name: str, tag: str) -> str:
        refusal = self._refused.get((name, tag))
        return refusal.error if refusal else ""

    def _head_age(self) -> float | None:
        """Seconds since the store's heads were read, None before the first time."""
        return None if self.heads_read_at is None else round(time.monotonic() - self.heads_read_at, 3)
