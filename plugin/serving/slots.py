"""The slots of all workers: prepares versions, installs them into slots, lends slots to requests, and clears them.

`Residency` decides which version is in which slot. This object calls the workers, and waits while no slot is free. It
runs in the API process that owns the slots, on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm_edits.edit_store.errors import BundleRefused, EditsError
from vllm_edits.plugin.metrics import Metrics
from vllm_edits.plugin.periodic import repeat
from vllm_edits.plugin.serving.firings import FiringTotals
from vllm_edits.plugin.serving.probing import Prober
from vllm_edits.plugin.serving.residency import Placement, Residency
from vllm_edits.plugin.serving.workers import Workers, ask, prepare, require_agreement
from vllm_edits.plugin.version_info import InfoOf

logger = logging.getLogger("vllm.edits")

FIRINGS_SECONDS = 1.0
"""seconds between two reads of the counters of gates"""

PATIENCE_SECONDS = 1.0
"""seconds that a version waits for a slot before the server closes another version, and that a swap waits for a slot"""

Fired = Callable[[str, int, int], None]
"""Called with a version, its new gate firings, and the new tokens."""


@dataclass
class Waiting:
    """Requests that wait for the slot of one version. `coming`: it has a slot and is being installed."""

    since: float = field(default_factory=time.monotonic)
    asked: list[asyncio.Future[int]] = field(default_factory=list)
    coming: asyncio.Task[None] | None = None

    def requests(self) -> int:
        """The number of requests that still wait."""
        return sum(not asked.done() for asked in self.asked)

    def seconds(self) -> float:
        """Seconds that the first request has waited."""
        return time.monotonic() - self.since

    def may_close(self) -> int:
        """The number of other versions to close: one after PATIENCE_SECONDS, one more each time the wait doubles.

        Several are closed, because the first of them that becomes idle is enough.
        """
        return int(self.seconds() / PATIENCE_SECONDS).bit_length()


class Slots:
    """The slots of every worker."""

    def __init__(
        self, count: int, workers: Workers, metrics: Metrics, *, info: InfoOf, fired: Fired, prober: Prober
    ) -> None:
        self.residency = Residency(count)
        self._workers = workers
        self._metrics = metrics
        self._info = info
        self._fired = fired
        self._firings = FiringTotals(metrics)
        self._ready: set[str] = set()  # versions in the memory of every worker, as far as is known
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._prober = prober
        self._installing = asyncio.Lock()
        self._probing: set[asyncio.Future[None]] = set()
        self._waiting: dict[str, Waiting] = {}  # in the order of arrival
        self._later: asyncio.TimerHandle | None = None
        self._retired_at: dict[str, float] = {}
        self._draining: set[asyncio.Task[None]] = set()
        metrics.slots_total.set(count)

    # -- filling -----------------------------------------------------------------------------------------------------

    async def stage(self, version: str) -> None:
        """Have every worker read, check and convert a version. Concurrent callers share one such task."""
        if version in self._ready:
            return
        reading = self._reading.get(version)
        if reading is None:
            reading = self._reading[version] = asyncio.get_running_loop().create_task(self._stage_on_workers(version))
            reading.add_done_callback(lambda task: self._has_read(version, task))
        # A cancelled caller does not stop it for the others.
        await asyncio.shield(reading)

    def forget_ready(self) -> None:
        """Note that no version is ready in the workers' memory any more: the slots have other tensors."""
        self._ready.clear()

    @asynccontextmanager
    async def no_installs(self) -> AsyncIterator[None]:
        """Keep every install waiting in the block, and wait for those that run, with their probes."""
        async with self._installing:
            while self._probing:
                await asyncio.wait(self._probing)
            yield

    def _has_read(self, version: str, task: asyncio.Task[None]) -> None:
        del self._reading[version]
        if not task.cancelled() and (failure := task.exception()) is not None:  # read, else asyncio logs it
            logger.warning("could not prepare version %s in the workers: %s", version[:12], failure)

    async def _stage_on_workers(self, version: str) -> None:
        try:
            await prepare(self._workers, "edits_stage", "edits_staged", version)
        except EditsError as failure:
            self._count_install(failure)
            raise
        self._ready.add(version)

    async def install(self, version: str) -> bool:
        """Install a version on every worker. False if all slots stay in use; then its first request waits for a slot.

        EditsError if it cannot be installed.
        """
        await self.stage(version)
        asked = self._ask(version)
        with self._given_back(asked, version):
            await asyncio.wait({asked}, timeout=PATIENCE_SECONDS)
            if not asked.done() and not self._waiting[version].coming:
                asked.cancel()
                self._assign_slots()
                return False
            await asked
        self.release(version)
        return True

    def _ask(self, version: str) -> asyncio.Future[int]:
        """A future for the slot of a version, for one more user."""
        asked = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(version, Waiting()).asked.append(asked)
        self._assign_slots()
        return asked

    @contextmanager
    def _given_back(self, asked: asyncio.Future[int], version: str) -> Iterator[None]:
        """Release the slot if the caller is cancelled, even if the slot came at the last moment."""
        try:
            yield
        except asyncio.CancelledError:
            if not asked.cancel() and not asked.cancelled() and asked.exception() is None:
                self.release(version)
            self._assign_slots()
            raise

    def _assign_slots(self) -> None:
        """Find slots for waiting versions, in the order of arrival.

        If a version has waited for long, the server closes versions in use. Without this, versions with constant
        traffic would never free a slot.
        """
        for version, waiting in list(self._waiting.items()):
            if waiting.coming:
                continue
            if not waiting.requests():
                del self._waiting[version]
            elif self.residency.is_open(version):
                self._hand_out(version)
            elif not self.residency.is_resident(version) and (plan := self.residency.plan(version)) is not None:
                waiting.coming = asyncio.get_running_loop().create_task(self._install_for_waiting(plan, version))
        without = [
            waiting for version, waiting in self._waiting.items()
            if not waiting.coming and not self.residency.is_resident(version)
        ]  # fmt: skip
        if self.residency.make_way(sum(waiting.may_close() for waiting in without)):
            self._assign_slots()  # some requests may wait for a version that is open again
        self._metrics.requests_waiting.set(sum(waiting.requests() for waiting in self._waiting.values()))
        if without and self._later is None:
            self._later = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._assign_slots_later)

    def _assign_slots_later(self) -> None:
        self._later = None
        self._assign_slots()

    def _hand_out(self, version: str) -> None:
        for asked in self._waiting.pop(version).asked:
            if not asked.done():
                asked.set_result(self.residency.acquire(version))

    async def _install_for_waiting(self, plan: Placement, version: str) -> None:
        """Install a version into its planned slot, one install at a time, probe it, and give it to waiting requests."""
        probed = asyncio.get_running_loop().create_future()
        try:
            async with self._installing:
                await self._install_on_workers(plan, version)
                self._probing.add(probed)
            await self._prober.first(version, plan.slot)
        except Exception as failure:  # noqa: BLE001  the first request gets the error; the others try again
            await self._undo(plan.slot, version)
            self._count_install(failure)
            waiting = self._waiting[version]
            waiting.coming = None
            if first := next((asked for asked in waiting.asked if not asked.done()), None):
                first.set_exception(failure)
        else:
            self.residency.commit(version)
            self._count_install(None)
            self._hand_out(version)
        finally:
            self._probing.discard(probed)
            probed.set_result(None)
            if plan.evicted is not None:
                self._firings.forget(plan.evicted)
        self._assign_slots()

    async def _install_on_workers(self, plan: Placement, version: str) -> None:
        answers = await ask(self._workers, "edits_install", plan.slot, version, plan.evicted)
        while any("absent" in answer for answer in answers):  # a worker has dropped it for other versions
            self._ready.discard(version)
            await self.stage(version)
            answers = await ask(self._workers, "edits_install", plan.slot, version, plan.evicted)
        self._count_firings(answers)
        require_agreement(answers, f"the content of version {version[:12]}")

    async def _undo(self, slot: int, version: str) -> None:
        """Remove an uncommitted version from every worker. A slot that cannot be cleared is not used again."""
        try:
            await self._clear(slot, version)
        except EditsError:
            logger.exception("could not clear slot %d; the slot is not used any more", slot)
            self.residency.lose(version)
        else:
            self.residency.abandon(version)

    def _count_install(self, failure: BaseException | None) -> None:
        ended = "ok" if failure is None else "refused" if isinstance(failure, BundleRefused) else "error"
        self._metrics.installs.labels(ended).inc()
        self._count_used()

    def _count_used(self) -> None:
        self._metrics.slots_used.set(self.residency.used)

    # -- lending -----------------------------------------------------------------------------------------------------

    async def acquire(self, version: str) -> int:
        """Lend the slot of a version to one more user. Installs the version if needed; waits while no slot is free."""
        if self.residency.is_open(version):
            self._metrics.version_lookups.labels("device").inc()
            return self.residency.acquire(version)
        found, start = "host" if version in self._ready else "store", time.monotonic()
        await self.stage(version)  # needs no slot, so a slow store does not delay other versions
        asked = self._ask(version)
        with self._given_back(asked, version):
            slot = await asked
        self._metrics.version_lookups.labels(found).inc()
        self._metrics.page_in_seconds.labels(found).observe(time.monotonic() - start)
        return slot

    def release(self, version: str) -> None:
        """Take back the slot from one user."""
        self.residency.release(version)
        self._sweep()
        self._assign_slots()

    def waiting(self) -> list[dict[str, Any]]:
        """The versions for which requests wait, for the status."""
        return [
            {"version": version, "requests": waiting.requests(), "seconds": round(waiting.seconds(), 3)}
            for version, waiting in self._waiting.items()
        ]

    # -- clearing ----------------------------------------------------------------------------------------------------

    def retire(self, version: str) -> None:
        """Retire a version that has no name any more: its slot is cleared when the last user has left."""
        if self.residency.is_resident(version):
            self._retired_at[version] = time.monotonic()
            self.residency.retire(version)
            self._sweep()

    def restore(self, version: str) -> None:
        """End the retirement of a version that has a name again."""
        self.residency.restore(version)
        self._retired_at.pop(version, None)

    def _sweep(self) -> None:
        """Clear the slots of retired versions without users, in the background."""
        for version in self.residency.leaving():
            slot = self.residency.remove(version)
            task = asyncio.get_running_loop().create_task(self._drain(slot, version))
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)

    async def _drain(self, slot: int, version: str) -> None:
        # Calls and requests reach the engine in order, so this call comes after the aborts and steps of the last user.
        try:
            await self._clear(slot, version)
        except Exception:
            logger.exception(
                "could not clear slot %d of retired version %s; the slot is not used any more", slot, version[:12]
            )
            return
        self.residency.give_back(slot)
        self._count_used()
        seconds = time.monotonic() - self._retired_at.pop(version, time.monotonic())
        self._metrics.swap_seconds.labels("drain").observe(seconds)
        self._assign_slots()
        logger.info("drained version=%s slot=%d", version[:12], slot)

    async def wait_drained(self) -> None:
        """Wait until no retired version is being cleared."""
        while self._draining:
            await asyncio.gather(*self._draining)

    async def _clear(self, slot: int, version: str) -> None:
        """Clear a slot on every worker, and count the last firings of its gates."""
        self._count_firings(await ask(self._workers, "edits_clear", slot))
        self._firings.forget(version)

    # -- gates -------------------------------------------------------------------------------------------------------

    async def follow_firings(self) -> None:
        """Read the counters of gates periodically, independent of the store."""
        await repeat(FIRINGS_SECONDS, self.read_firings, "could not read the firings of gates; trying again")

    async def read_firings(self) -> None:
        """Count the firings of the gates on the device. If it fails, the next call counts them."""
        if any(self._info(version).fires for version in self.residency.residents()):
            try:
                self._count_firings(await ask(self._workers, "edits_firings"))
            except EditsError as error:
                logger.warning("could not read the firings of gates; trying again: %s", error)

    def _count_firings(self, answers: list[dict[str, Any]]) -> None:
        """Count each engine's first worker only, because workers that divide a model see the same tokens."""
        for worker, answer in enumerate(answers):
            for version, tokens, times in answer["firings"] if answer["rank"] == 0 else ():
                name = self._info(version).name
                new_tokens, new_firings = self._firings.count(name, version, worker, tokens, times)
                self._fired(version, new_firings, new_tokens)
