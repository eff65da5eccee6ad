"""The reconciler: turns store heads into installed versions, by swaps.

It runs in the API process that owns the slots, on one event loop. After each read of the store it does the following,
in this order, so that quick changes do not wait for slow ones: withdrawals and stops of experiments; a change of the
engine's weights (in its own task, because it may wait a minute for running requests); all other tags; versions of arms
of experiments. swap.py lists the phases of a swap. A failure before the switch is not visible to clients.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from vllm_edits.edit_store.errors import BundleRefused, EditsError, NotTrusted, Reason
from vllm_edits.edit_store.reading.follow import StoreState
from vllm_edits.edit_store.reading.reader import Reader
from vllm_edits.edit_store.storage.store import TagEntry, TagKey
from vllm_edits.edit_store.trust import Enforcement
from vllm_edits.plugin.experiments.live_experiments import LiveExperiments
from vllm_edits.plugin.metrics import OTHER, UNKNOWN, Metrics
from vllm_edits.plugin.serving.growth import AwaitsCapacity
from vllm_edits.plugin.serving.slots import Slots
from vllm_edits.plugin.serving.swap import Swap
from vllm_edits.plugin.serving.variants import BASE, VariantTable
from vllm_edits.plugin.serving.versions import Versions
from vllm_edits.plugin.serving.weights_mode import WeightsMode
from vllm_edits.plugin.serving.workers import Workers, prepare
from vllm_edits.plugin.short_turns import in_thread

logger = logging.getLogger("vllm.edits")

RESERVED_NAMES = (BASE, UNKNOWN, OTHER)
"""Names that headers and labels use for other things than variants."""


@dataclass(frozen=True)
class Refusal:
    """The reason why a tag's entry is not served. If it is not `lasting`, each read of the store tries it again."""

    sequence: int
    error: str
    lasting: bool
    awaits_capacity: bool
    """True if it is served when the reservation has grown for it"""


class Reconciler:
    """Makes the served versions equal to the promoted versions of the store."""

    def __init__(
        self, reader: Reader, *, versions: Versions, slots: Slots, experiments: LiveExperiments, weights: WeightsMode,
        workers: Workers, metrics: Metrics, base_names: tuple[str, ...], default_tag: str,
    ) -> None:  # fmt: skip
        self.reader = reader
        self.table = VariantTable(base_names, default_tag)
        self.followed: dict[TagKey, TagEntry] = {}
        """the entry of each tag that this server serves"""
        self.refused: dict[TagKey, Refusal] = {}
        self.broken: Mapping[TagKey, EditsError] = {}
        """histories that are broken or were cut"""
        self.last_swap: Swap | None = None
        self.last_error = ""
        self.heads_read_at: float | None = None
        self._versions = versions
        self._slots = slots
        self._experiments = experiments
        self._weights = weights
        self._workers = workers
        self._metrics = metrics
        self._syncing = asyncio.Lock()
        self._exchanging: asyncio.Task[Swap] | None = None
        metrics.signature_policy.labels(reader.trust.enforcement).set(1)
        if reader.trust.enforcement is Enforcement.OFF:
            logger.warning(
                "signatures are not checked: every writer of store %s can change what this server serves. "
                "To require signatures, set edits.trust_file",
                reader.url,
            )

    # -- looking at the store ----------------------------------------------------------------------------------------

    async def follow(self, poll_seconds: float) -> None:
        """Sync every `poll_seconds`. If the store cannot be read, all versions keep serving until the next attempt."""
        while True:
            await asyncio.sleep(poll_seconds)
            try:
                await self.sync()
            except Exception:  # the loop must continue after an error
                logger.exception("could not follow the store; the server keeps serving its present versions")
                self._metrics.store_errors.inc()
            self._metrics.store_head_age_seconds.set(self.head_age() or 0)

    async def sync(self, *, retry_refused: bool = False, wait_for_weights: bool = False) -> list[Swap]:
        """Read the store's heads once and follow every tag that moved. Returns the attempted swaps.

        retry_refused: also try promotions and arms that were refused.
        wait_for_weights: also wait for a change of the engine's weights, which else runs in the background.
        """
        swaps = await self._look_once(retry_refused=retry_refused)
        if wait_for_weights and self._exchanging is not None:
            swaps.append(await asyncio.shield(self._exchanging))
        return swaps

    async def _look_once(self, *, retry_refused: bool) -> list[Swap]:
        async with self._syncing:
            if self._exchanging is not None and self._exchanging.done():
                self._exchanging = None
            try:
                look = await in_thread(self.reader.look)
            except EditsError as error:
                self.last_error = str(error)
                self._metrics.store_errors.inc()
                logger.warning("could not read the store; the server keeps serving its present versions: %s", error)
                return []
            self.heads_read_at = time.monotonic()
            self._metrics.store_head_age_seconds.set(0)
            self._note_broken(look.broken)
            self._experiments.follow(look.experiments, look.passed_over)
            moved = [entry for entry in _entries(look) if self._has_moved(entry, retry_refused=retry_refused)]
            swaps = []
            # The weights come first, because that only starts a task.
            for entry in sorted(moved, key=lambda entry: (entry.name, entry.tag) != self._weights.key):
                if (entry.name, entry.tag) == self._weights.key:
                    self._start_weights_swap(entry)
                else:
                    swaps.append(await self._follow_tag(entry))
            await self._experiments.make_ready(retry_refused=retry_refused)
            self._tell_served()
            return swaps

    def _start_weights_swap(self, entry: TagEntry) -> None:
        """Follow the tag of the variant in the weights in a separate task. Only one such task runs."""
        if self._exchanging is None:
            self._exchanging = asyncio.get_running_loop().create_task(self._follow_tag(entry))
            self._exchanging.add_done_callback(_log_failure)

    def head_age(self) -> float | None:
        """Seconds since the store's heads were read, or None before the first read."""
        return None if self.heads_read_at is None else round(time.monotonic() - self.heads_read_at, 3)

    def _has_moved(self, entry: TagEntry, *, retry_refused: bool) -> bool:
        """True if an entry must be followed: it is new, or it was refused for a reason that may have passed."""
        known, refused = self.followed.get((entry.name, entry.tag)), self.refused.get((entry.name, entry.tag))
        if known is not None and known.sequence == entry.sequence:
            return False
        return not (refused and refused.lasting and refused.sequence == entry.sequence and not retry_refused)

    def _note_broken(self, broken: Mapping[TagKey, EditsError]) -> None:
        """Log each broken or cut history once. Their tags keep serving their present versions."""
        for key, error in broken.items():
            if str(error) != str(self.broken.get(key, "")):
                self.last_error = str(error)
                self._metrics.bundles_rejected.labels("history").inc()
                logger.error(
                    "history refused variant=%s@%s; the tag keeps serving its present version: %s", *key, error
                )
        self.broken = broken

    # -- following a tag ---------------------------------------------------------------------------------------------

    async def _follow_tag(self, entry: TagEntry) -> Swap:
        key, old = (entry.name, entry.tag), self._serving(entry)
        new = None if entry.withdrawn else entry.version
        swap = self.last_swap = Swap(entry.name, entry.tag, old, new)
        try:
            await self._versions.require_promoter(entry)
            if key == self._weights.key:
                await self._exchange_weights(swap, entry, new)
            else:
                if new is not None and new != old:
                    await self._install(swap, new)
                self._switch(swap, entry, new)
        except EditsError as error:
            if isinstance(error, NotTrusted) and key not in self.followed:  # at start: nothing is served for this tag
                await self._follow_last_trusted(entry)
            self.last_swap = swap
            swap.error, swap.awaits_capacity = str(error), isinstance(error, AwaitsCapacity)
            self._refuse(entry, swap, error)
            return swap
        self.refused.pop(key, None)
        self._metrics.swaps.labels("ok").inc()
        logger.info("swap committed variant=%s@%s version=%s seconds=%s", *key, (new or "none")[:12], swap.seconds)
        return swap

    def _serving(self, entry: TagEntry) -> str | None:
        return self.table.promoted.get(entry.name, {}).get(entry.tag)

    def _refuse(self, entry: TagEntry, swap: Swap, error: EditsError) -> None:
        """Record and log why an entry is not followed. The same reason is logged only once."""
        key, said = (entry.name, entry.tag), str(error)
        before = self.refused.get(key)
        self.refused[key] = Refusal(entry.sequence, said, error.lasting, swap.awaits_capacity)
        if before is not None and (before.sequence, before.error) == (entry.sequence, said) and not error.lasting:
            return
        if swap.awaits_capacity:
            logger.info("swap waits variant=%s@%s serving=%s: %s", *key, (self._serving(entry) or "nothing")[:12], said)
            return
        self.last_error = said
        reasons = error.reasons if isinstance(error, BundleRefused) else (Reason("error", said),)
        for reason in reasons:
            self._metrics.bundles_rejected.labels(reason.code).inc()
        self._metrics.swaps.labels("refused" if isinstance(error, BundleRefused) else "error").inc()
        logger.error(
            "swap refused variant=%s@%s phase=%s serving=%s: %s",
            *key, swap.failed_in or "none", (self._serving(entry) or "nothing")[:12], error,
        )  # fmt: skip

    async def _follow_last_trusted(self, entry: TagEntry) -> None:
        """Serve the newest trusted entry before this one, as a server that never stopped does."""
        head = await in_thread(self.reader.last_trusted, entry)
        if head is not None:
            await self._follow_tag(head)

    async def _install(self, swap: Swap, version: str) -> None:
        """Do all phases before the switch for a variant that is served per request."""
        self._require_name(swap.variant)
        await self._versions.prepare(version, partial(swap.phase, metrics=self._metrics))
        # At start there may be more variants than slots: the others are paged in by their first request.
        residency = self._slots.residency
        if swap.from_version is not None or residency.used < residency.slots:
            with swap.phase("install", self._metrics):
                if not await self._slots.install(version):
                    logger.info(
                        "all slots are in use: version %s of %r will be installed by its first request",
                        version[:12], swap.variant,
                    )  # fmt: skip

    async def _exchange_weights(self, swap: Swap, entry: TagEntry, new: str | None) -> None:
        """Follow the tag of the variant in the weights."""
        if new == self._weights.version and not self._weights.error:
            self._switch(swap, entry, new)
            return
        if new is not None:
            self._require_name(swap.variant)
            await self._versions.check(new, partial(swap.phase, metrics=self._metrics))
            with swap.phase("stage", self._metrics):
                await prepare(self._workers, "edits_stage_weights", "edits_weights_staged", new)

        def switch() -> None:
            self._switch(swap, entry, new)
            self.table = replace(self.table, in_weights=new, epoch=self._weights.epoch)

        try:
            await self._weights.exchange(new, entry.sequence, switch, lambda phase: swap.phase(phase, self._metrics))
        finally:
            self.table = replace(self.table, epoch=self._weights.epoch)

    def _require_name(self, variant: str) -> None:
        """BundleRefused if the variant's name is the base model's or a reserved name."""
        if variant in (*self.table.base_names, *RESERVED_NAMES):
            why = (
                f"{variant!r} is the base model's name or a reserved name here. Publish the variant under another name"
            )
            raise BundleRefused(f"variant {variant!r}", [Reason("name", why)])

    def _switch(self, swap: Swap, entry: TagEntry, new: str | None) -> None:
        """The commit point on this server: one reference is replaced."""
        old = self._serving(entry)
        with swap.phase("switch", self._metrics):
            self.table = self.table.moved(entry.name, entry.tag, new)
        self.followed[entry.name, entry.tag] = entry
        if new is not None:
            self._slots.restore(new)
        if old is not None and old != new:
            if old not in self.table.promoted.get(entry.name, {}).values():
                self._metrics.variant_info.labels(*self._metrics.labels(entry.name, old)).set(0)
            if old not in self.table.versions():
                self._slots.retire(old)
        self._tell_served()
        if new is not None:
            self._metrics.variant_info.labels(*self._metrics.labels(entry.name, new)).set(1)

    def _tell_served(self) -> None:
        """Tell the metrics which versions are served, by tags and by arms of experiments."""
        promoted = ((name, version) for name, tags in self.table.promoted.items() for version in tags.values())
        self._metrics.serves([*promoted, *self._experiments.versions()])

    def refusal(self, name: str, tag: str) -> str:
        """The reason why the promoted version of a tag is not served, or ''."""
        refusal = self.refused.get((name, tag))
        return refusal.error if refusal else ""


def _entries(look: StoreState) -> list[TagEntry]:
    return [entry for tags in look.heads.values() for entry in tags.values()]


def _log_failure(task: asyncio.Task[Swap]) -> None:
    """Log an unexpected error of the task."""
    if not task.cancelled() and (failure := task.exception()) is not None:
        logger.error(
            "could not change the engine's weights; the server keeps serving its present versions", exc_info=failure
        )
