"""The versions on the device: made ready by the workers, installed into slots, lent to requests, and cleared.

Which version sits in which slot is `Residency`'s to say; this object has the workers do it, and waits where no slot is
to be had. All methods run on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from edit_store.errors import BundleRefused, EditsError
from plugin.firings import Firings
from plugin.metrics import Metrics
from plugin.repeat import repeat
from plugin.residency import Plan, Residency
from plugin.share import require_agreement
from plugin.traits import TraitsOf
from plugin.workers import Workers, ask, prepare

logger = logging.getLogger("vllm.edits")

FIRINGS_SECONDS = 1.0
"""how often the device is asked what its gates did"""

Fired = Callable[[str, int, int], None]
"""Is told that gates of a version fired so often in so many tokens."""


class Slots:
    """So many slots on every worker, and what is done to fill and clear them."""

    def __init__(self, count: int, workers: Workers, metrics: Metrics, *, traits: TraitsOf, fired: Fired) -> None:
        self.residency = Residency(count)
        self._workers = workers
        self._metrics = metrics
        self._traits = traits
        self._fired = fired
        self._firings = Firings(metrics)
        self._ready: set[str] = set()  # versions in the memory of every worker, as far as is known
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._installing = asyncio.Lock()
        self._released = asyncio.Event()
        self._retired_at: dict[str, float] = {}
        self._draining: set[asyncio.Task[None]] = set()
        metrics.slots_total.set(count)

    # -- filling -----------------------------------------------------------------------------------------------------

    async def make_ready(self, version: str) -> None:
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
            await prepare(self._workers, "edits_stage", "edits_staged", version)
        except EditsError as failure:
            self._count_install(failure)
            raise
        self._ready.add(version)

    async def make_resident(self, version: str, *, acquire: bool = False) -> int:
        """Install a version on every worker, one install at a time; waits for a slot. Returns its slot."""
        await self.make_ready(version)  # needs no slot: a slow store keeps nobody else from being paged in
        async with self._installing:
            if not self.residency.is_resident(version):
                while (plan := self.residency.plan(version)) is None:
                    self._released.clear()
                    await self._released.wait()
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

    async def _install(self, plan: Plan, version: str) -> None:
        answers = await ask(self._workers, "edits_install", plan.slot, version, plan.evicted)
        while any("absent" in answer for answer in answers):  # a worker made room for others meanwhile
            self._ready.discard(version)
            await self.make_ready(version)
            answers = await ask(self._workers, "edits_install", plan.slot, version, plan.evicted)
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

    def _count_install(self, failure: BaseException | None) -> None:
        ended = "ok" if failure is None else "refused" if isinstance(failure, BundleRefused) else "error"
        self._metrics.installs.labels(ended).inc()
        self._count_used()

    def _count_used(self) -> None:
        self._metrics.slots_used.set(self.residency.used)

    # -- lending -----------------------------------------------------------------------------------------------------

    async def acquire(self, version: str) -> int:
        """The slot of a version for one more user, which is brought in if it has none; waits while all are in use."""
        if self.residency.is_resident(version):
            self._metrics.version_lookups.labels("device").inc()
            return self.residency.acquire(version)
        found, start = "host" if version in self._ready else "store", time.monotonic()
        slot = await self.make_resident(version, acquire=True)
        self._metrics.version_lookups.labels(found).inc()
        self._metrics.page_in_seconds.labels(found).observe(time.monotonic() - start)
        return slot

    def release(self, version: str) -> None:
        """One user less."""
        self.residency.release(version)
        self._released.set()
        self._sweep()

    # -- clearing ----------------------------------------------------------------------------------------------------

    def retire(self, version: str) -> None:
        """Nothing names this version any more: clear its slot when the last user has left."""
        if self.residency.is_resident(version):
            self._retired_at[version] = time.monotonic()
            self.residency.retire(version)
            self._sweep()

    def restore(self, version: str) -> None:
        """Something names this version again."""
        self.residency.restore(version)
        self._retired_at.pop(version, None)

    def _sweep(self) -> None:
        """Clear the slots of retired versions that nobody uses any more, in the background."""
        for version in self.residency.leaving():
            slot = self.residency.remove(version)
            task = asyncio.get_running_loop().create_task(self._drain(slot, version))
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)

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
        self._count_used()
        seconds = time.monotonic() - self._retired_at.pop(version, time.monotonic())
        self._metrics.swap_seconds.labels("drain").observe(seconds)
        self._released.set()
        logger.info("drained version=%s slot=%d", version[:12], slot)

    async def settle(self) -> None:
        """Wait until no retired version is being cleared."""
        while self._draining:
            await asyncio.gather(*self._draining)

    async def _clear(self, slot: int, version: str) -> None:
        """Make a slot neutral on every worker, and count what its gates did last."""
        self._count_firings(await ask(self._workers, "edits_clear", slot))
        self._firings.forget(version)

    # -- gates -------------------------------------------------------------------------------------------------------

    async def follow_firings(self) -> None:
        """Count for ever; not by the store's clock, which stands while the store is away."""
        await repeat(FIRINGS_SECONDS, self.read_firings, "the firings of gates were not read")

    async def read_firings(self) -> None:
        """Count how often the gates on the device have fired. Failing that, the next look counts them."""
        if any(self._traits(version).fires for version in self.residency.residents()):
            try:
                self._count_firings(await ask(self._workers, "edits_firings"))
            except EditsError as error:
                logger.warning("the firings of gates were not read: %s", error)

    def _count_firings(self, answers: list[dict[str, Any]]) -> None:
        """Workers that divide a model see the same tokens, so of each engine the word of its first worker counts."""
        for worker, answer in enumerate(answers):
            for version, tokens, times in answer["firings"] if answer["share"] == 0 else ():
                name = self._traits(version).name
                new_tokens, new_firings = self._firings.count(name, version, worker, tokens, times)
                self._fired(version, new_firings, new_tokens)
