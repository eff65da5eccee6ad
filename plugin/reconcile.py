"""Store heads to installed versions: the story of a swap, and the lending of slots to requests.

A swap goes: fetch, verify, install into a free slot on every worker, compare what the workers hold, switch the name,
and clear the old slot when its last request has ended. All before the switch can fail without a client seeing it.
This object and `Residency` are the API process's only state. All methods run on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from edit_store import verify
from edit_store.bundle import BaseModelRef, Bundle
from edit_store.errors import BundleRefused, EditsError, InstallRefused, NotTrusted, Reason, RequestRefused
from edit_store.experiment_log import Experiments
from edit_store.experiments import Change
from edit_store.reader import Reader
from edit_store.store import TagEntry
from edit_store.trust import Enforcement
from plugin.experiments.asking import NOBODY, Asking
from plugin.experiments.deciding import Way
from plugin.experiments.exposure_log import ExposureLog
from plugin.experiments.handle import Handles
from plugin.experiments.resolver import Resolver
from plugin.experiments.served import ServedExperiments
from plugin.firings import Firings
from plugin.lease import Lease
from plugin.metrics import OTHER, UNKNOWN, Metrics
from plugin.reservation import Price, Reservation
from plugin.residency import Plan, Residency
from plugin.share import require_agreement
from plugin.traits import PLAIN, Traits
from plugin.variants import BASE, Choice, VariantTable, VersionWanted
from plugin.weights_mode import Running, WeightsMode

logger = logging.getLogger("vllm.edits")

FIRINGS_SECONDS = 1.0
"""how often the device is asked what its gates did"""
_STAGING_POLL_SECONDS = 0.01
RESERVED_NAMES = (BASE, UNKNOWN, OTHER)
"""What headers and labels call things that are no variant."""


class Workers(Protocol):
    """Every worker of the engine at once. Each answers plain data; an answer with 'error' is a refusal."""

    async def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call a method of `EditsWorker` on all workers, between two steps of the engine."""

    async def abort_all(self) -> None:
        """End every request that the engine has."""


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
        price: Price,
        slots: int,
        default_tag: str,
        weights_key: tuple[str, str] | None = None,
        weights_running: Running = "finish",
        weights_patience_seconds: float = 60.0,
        exposures: ExposureLog | None = None,
        handles: Handles | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        self.reader = reader
        self.table = VariantTable(base_names, default_tag)
        self.residency = Residency(slots)
        self.last_swap: Swap | None = None
        self.last_error = ""
        self.heads_read_at: float | None = None
        self._workers = workers
        self._metrics = metrics
        self._base = base
        self._reservation = reservation
        self._price = price
        self._traits: dict[str, Traits] = {}  # small, and the same for ever, so never dropped
        self._firings = Firings(metrics)
        self._heads: dict[tuple[str, str], TagEntry] = {}
        self._refused: dict[tuple[str, str], Refusal] = {}
        self._troubles: Mapping[tuple[str, str], EditsError] = {}
        self._in_flight: Counter[tuple[str, str | None]] = Counter()
        self._retired_at: dict[str, float] = {}
        self._syncing = asyncio.Lock()
        self._installing = asyncio.Lock()
        self._slot_released = asyncio.Event()
        self._ready: set[str] = set()  # versions in the memory of every worker, as far as is known
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._weights = WeightsMode(
            weights_key, self._all, running=weights_running, patience_seconds=weights_patience_seconds,
            inside=self._in_flight.total, abort_all=workers.abort_all,
        )  # fmt: skip
        self.experiments = ServedExperiments(
            metrics, exposures or ExposureLog(None, 0), handles or Handles.of(None), prepare=self.prepare,
            append=self._append_change, traits=lambda version: self._traits.get(version, PLAIN), resolver=resolver,
        )  # fmt: skip
        metrics.slots_total.set(slots)
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

    def _append_change(self, change: Change, reason: str, actor: str) -> None:
        store = self.reader.store
        if self.reader.trust.enforcement is Enforcement.REQUIRE and not store.signs:
            raise EditsError("entries must be signed, and this server has no key: set edits.signing_key_file")
        Experiments(store).change(change, reason=reason, actor=actor)

    async def sync(self, *, retry_refused: bool = False) -> list[Swap]:
        """Read the store's heads once and follow every tag that moved. Returns the swaps that were tried."""
        async with self._syncing:
            try:
                look = await asyncio.to_thread(self.reader.look)
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
        self._weigh(
            f"{entry.name}@{entry.tag} entry {entry.sequence}", await asyncio.to_thread(self.reader.doubts, entry)
        )

    async def _require_author(self, name: str, version: str) -> None:
        """The same for a version that no tag promotes: a client may name it, so nobody has vouched for it yet."""
        doubts = await asyncio.to_thread(self.reader.author_doubts, name, version)
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
        believed = await asyncio.to_thread(self.reader.believed, entry)
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
                await self._prepared("edits_stage_weights", "edits_weights_staged", new)

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
            bundle = await asyncio.to_thread(self.reader.bundle, version)
        with swap.phase("verify", self._metrics):
            await asyncio.to_thread(verify.check, bundle, self._base)
        self._traits[version] = Traits.of(bundle.manifest)
        return bundle

    async def _bring_in(self, swap: Swap, version: str) -> None:
        """Everything before the switch of a variant that is served per request."""
        bundle = await self._checked(swap, version)
        if missing := self._reservation.missing(bundle.manifest, self._price):
            raise InstallRefused(f"version {version[:12]} of {swap.variant!r}", missing)
        with swap.phase("stage", self._metrics):
            await self._make_ready(version)
        # At start there may be more variants than slots: those beyond are paged in by the first request.
        if swap.from_version is not None or self.residency.used < self.residency.slots:
            with swap.phase("install", self._metrics):
                await self._make_resident(version)

    def _switch(self, entry: TagEntry, new: str | None) -> None:
        """The commit point on this server: one reference is replaced."""
        old = self.table.promoted.get(entry.name, {}).get(entry.tag)
        self.table = self.table.moved(entry.name, entry.tag, new)
        self._heads[entry.name, entry.tag] = entry
        if new is not None:
            self.residency.restore(new)
            self._retired_at.pop(new, None)
        if old is not None and old != new:
            if old not in self.table.promoted.get(entry.name, {}).values():
                self._metrics.variant_info.labels(*self._metrics.labels(entry.name, old)).set(0)
            if old not in self.table.versions() and self.residency.is_resident(old):
                self._retired_at[old] = time.monotonic()
                self.residency.retire(old)
                self._sweep()
        if new is not None:
            self._metrics.variant_info.labels(*self._metrics.labels(entry.name, new)).set(1)

    # -- lending slots ---------------------------------------------------------------------------------------------

    async def lease(self, model: str, strength: float | None = None, asking: Asking = NOBODY) -> Lease:
        """A slot for a request that names `model`; waits while all slots are in use.

        Where an experiment is about that name, the arm of who asks; the control's, when that arm cannot be served.
        NotFound for a name that is not served; RequestRefused for a strength that its version does not take;
        InstallRefused when the version cannot be brought in.
        """
        way = self.experiments.decide(model, asking)
        if way is None:
            return await self._lease_of(model, strength)
        if way.beside and model not in self.experiments.names:
            self.table.resolve(model)  # to compare two does not make a name that is not served one that is
        try:
            return await self._lease_on(way, model, strength)
        except RequestRefused:
            raise
        except EditsError as error:
            if way.instead is None:
                raise
            self.experiments.instead_of(way, error)
            return await self._lease_on(way.instead, model, strength)

    async def _lease_on(self, way: Way, model: str, strength: float | None) -> Lease:
        """A slot for what an experiment decided, under the name that was asked for."""
        handle = self.experiments.handle(way)
        lease = await self._lease_of("" if way.serves == BASE else way.serves, strength)
        lease.choice = replace(lease.choice, requested=model, assignment=way.assignment, handle=handle,
                               beside=way.beside)  # fmt: skip
        return lease

    async def _lease_of(self, model: str, strength: float | None) -> Lease:
        while True:
            await self._weights.admitted()
            found = self._found(model)
            if isinstance(found, VersionWanted):
                ref, served = found.ref, self.table.promoted[found.ref.name].values()
                known = ref.selector in served  # a whole digest that is served needs no store
                version = ref.selector if known else await asyncio.to_thread(self.reader.resolve, str(ref))
                found = self.table.chosen(model, ref.name, version)
            traits = PLAIN if found.version is None else await self._traits_of(found.variant, found.version)
            if self._weights.open and found.epoch == self.table.epoch:  # else they changed while the store was asked
                strength = traits.strength_of(strength, model, fixed=found.in_weights)
                return await self._enter(replace(found, strength=strength, traits=traits))

    def _found(self, model: str) -> Choice | VersionWanted:
        """What a name means. A version that an arm names is known, whether or not a tag promotes anything."""
        if self.experiments.has_ready(model):
            name, _, version = model.partition("@")
            return self.table.chosen(model, name, version)
        return self.table.resolve(model)

    async def prepare(self, name: str, version: str) -> None:
        """Have a version ready that an arm names; EditsError when it cannot be served here."""
        await self._require_author(name, version)
        bundle = await asyncio.to_thread(self.reader.bundle, version)
        await asyncio.to_thread(verify.check, bundle, self._base)
        if missing := self._reservation.missing(bundle.manifest, self._price):
            raise InstallRefused(f"version {version[:12]} of {name!r}", missing)
        self._traits[version] = Traits.of(bundle.manifest)
        await self._make_ready(version)

    async def _traits_of(self, name: str, version: str) -> Traits:
        if version not in self._traits:
            await self._require_author(name, version)
            self._traits[version] = Traits.of(await asyncio.to_thread(self.reader.manifest, version))
        return self._traits[version]

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
            slot = await self._acquire(choice.version) if in_slot and choice.version else 0
        except BaseException:
            self._count_out(choice)
            raise
        return Lease(choice, slot, self._release)

    def _count_in(self, choice: Choice) -> None:
        self._in_flight[choice.variant, choice.version] += 1
        self._metrics.requests_in_flight.labels(self._metrics.labels(choice.variant, choice.version)[0]).inc()

    def _count_out(self, choice: Choice) -> None:
        variant, version = choice.variant, choice.version
        self._in_flight[variant, version] -= 1
        if not self._in_flight[variant, version]:
            del self._in_flight[variant, version]
        self._metrics.requests_in_flight.labels(self._metrics.labels(variant, version)[0]).dec()
        self._weights.left()

    def _release(self, lease: Lease) -> None:
        if lease.slot and lease.choice.version is not None:
            self.residency.release(lease.choice.version)
            self._slot_released.set()
            self._sweep()
        self._count_out(lease.choice)

    async def _acquire(self, version: str) -> int:
        if self.residency.is_resident(version):
            self._metrics.version_lookups.labels("device").inc()
            return self.residency.acquire(version)
        found, start = "host" if version in self._ready else "store", time.monotonic()
        slot = await self._make_resident(version, acquire=True)
        self._metrics.version_lookups.labels(found).inc()
        self._metrics.page_in_seconds.labels(found).observe(time.monotonic() - start)
        return slot

    async def _make_resident(self, version: str, *, acquire: bool = False) -> int:
        """Install a version on every worker, one install at a time; waits for a slot. Returns its slot."""
        await self._make_ready(version)  # needs no slot: a slow store keeps nobody else from being paged in
        async with self._installing:
            if not self.residency.is_resident(version):
                while (plan := self.residency.plan(version)) is None:
                    self._slot_released.clear()
                    await self._slot_released.wait()
                try:
                    await self._install(plan, version)
                except BaseException as failure:
                    await self._undo(plan.slot, version)
                    self._count_install(failure)
                    raise
                finally:
                    if plan.evicted is not None:
                        self._firings.forget(plan.evicted)
                self.residency.commit(version)
                self._count_install(None)
            return self.residency.acquire(version) if acquire else self.residency.residents()[version].slot

    def _count_install(self, failure: BaseException | None) -> None:
        ended = "ok" if failure is None else "refused" if isinstance(failure, BundleRefused) else "error"
        self._metrics.installs.labels(ended).inc()
        self._count_slots()

    async def _make_ready(self, version: str) -> None:
        """Have every worker read, check and convert a version; all who need the same one wait together."""
        if version in self._ready:
            return
        reading = self._reading.get(version)
        if reading is None:
            reading = self._reading[version] = asyncio.get_running_loop().create_task(self._stage(version))
            reading.add_done_callback(lambda task: self._has_read(version, task))
        # Whoever gives up waiting does not stop it for the others.
        await asyncio.shield(reading)

    def _has_read(self, version: str, task: asyncio.Task[None]) -> None:
        del self._reading[version]
        if not task.cancelled() and (failure := task.exception()) is not None:  # asked for, so that it counts as told
            logger.warning("version %s was not made ready: %s", version[:12], failure)

    async def _stage(self, version: str) -> None:
        try:
            await self._prepared("edits_stage", "edits_staged", version)
        except EditsError as failure:
            self._count_install(failure)
            raise
        self._ready.add(version)

    async def _prepared(self, stage: str, staged: str, version: str) -> None:
        """Have every worker prepare a version."""
        await self._all(stage, version)
        # Workers read it in threads of their own processes: there is nothing here to wait on but their word.
        while any("pending" in answer for answer in await self._all(staged, version)):  # noqa: ASYNC110
            await asyncio.sleep(_STAGING_POLL_SECONDS)

    async def _install(self, plan: Plan, version: str) -> None:
        answers = await self._all("edits_install", plan.slot, version, plan.evicted)
        while any("absent" in answer for answer in answers):  # a worker made room for others meanwhile
            self._ready.discard(version)
            await self._make_ready(version)
            answers = await self._all("edits_install", plan.slot, version, plan.evicted)
        self._count_firings(answers)
        require_agreement(answers, f"what version {version[:12]} is")

    async def _undo(self, slot: int, version: str) -> None:
        """Take an uncommitted version out of every worker. A slot that cannot be cleared is not used again."""
        try:
            await self._clear(slot, version)
        except EditsError:
            logger.exception("slot %d could not be cleared and stays out of use", slot)
            self.residency.lose(version)
        else:
            self.residency.abandon(version)

    async def _all(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call every worker; the first refusal is raised with all its reasons."""
        try:
            answers = await self._workers.call(method, *args)
        except Exception as error:
            raise EditsError(f"the workers did not answer {method}: {error!r}") from error
        for answer in answers:
            if "error" in answer:
                reasons = [Reason(code, message) for code, message in answer.get("reasons", ())]
                raise (
                    InstallRefused("install", reasons)
                    if reasons
                    else EditsError(f"a worker failed at {method}: {answer['error']}")
                )
        return answers

    async def _clear(self, slot: int, version: str) -> None:
        """Make a slot neutral on every worker, and count what its gates did last."""
        self._count_firings(await self._all("edits_clear", slot))
        self._firings.forget(version)

    async def follow_firings(self) -> None:
        """Count for ever; not by the store's clock, which stands while the store is away."""
        while True:
            await asyncio.sleep(FIRINGS_SECONDS)
            try:
                await self.read_firings()
            except Exception:  # the loop must outlive any fault of one look
                logger.exception("the firings of gates were not read")

    async def read_firings(self) -> None:
        """Count how often the gates on the device have fired. Failing that, the next look counts them."""
        if any(self._traits.get(version, PLAIN).fires for version in self.residency.residents()):
            try:
                self._count_firings(await self._all("edits_firings"))
            except EditsError as error:
                logger.warning("the firings of gates were not read: %s", error)

    def _count_firings(self, answers: list[dict[str, Any]]) -> None:
        """Workers that divide a model see the same tokens, so of each engine the word of its first worker counts."""
        for worker, answer in enumerate(answers):
            for version, tokens, times in answer["firings"] if answer["share"] == 0 else ():
                name = self._traits.get(version, PLAIN).name
                new_tokens, new_firings = self._firings.count(name, version, worker, tokens, times)
                self.experiments.fired(version, new_firings, new_tokens)

    def _sweep(self) -> None:
        """Clear the slots of retired versions that nobody uses any more, in the background."""
        for version in self.residency.leaving():
            slot = self.residency.remove(version)
            task = asyncio.get_running_loop().create_task(self._drain(slot, version))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _drain(self, slot: int, version: str) -> None:
        # Calls and requests reach the engine in order: the aborts and steps of the last user are behind this call.
        try:
            await self._clear(slot, version)
        except Exception:
            logger.exception(
                "slot %d of retired version %s could not be cleared and stays out of use", slot, version[:12]
            )
            return
        self.residency.give_back(slot)
        self._count_slots()
        seconds = time.monotonic() - self._retired_at.pop(version, time.monotonic())
        self._metrics.swap_seconds.labels("drain").observe(seconds)
        self._slot_released.set()
        logger.info("drained version=%s slot=%d", version[:12], slot)

    async def settle(self) -> None:
        """Wait until no retired version is being cleared."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    # -- telling -----------------------------------------------------------------------------------------------------

    def status(self) -> Mapping[str, Any]:
        """What `GET /v1/edits` answers."""
        return {
            "base": {"names": list(self.table.base_names), "in_flight": self._in_flight["base", None]},
            "variants": [
                {
                    "name": name,
                    "tag": tag,
                    "version": version,
                    "sequence": self._heads[name, tag].sequence,
                    "resident": self.residency.is_resident(version),
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
                "total": self.residency.slots,
                "used": self.residency.used,
                "held": [
                    {"slot": resident.slot, "version": version, "users": resident.users, "retired": resident.retired}
                    for version, resident in self.residency.residents().items()
                ],
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

    def _count_slots(self) -> None:
        self._metrics.slots_used.set(self.residency.used)
