"""Growth of the reservation while the server serves: makes capacity for versions that do not fit, without a restart.

It runs in the API process that owns the slots, in a task of its own, so that no swap, rollback or request waits for it.

    planned    every worker checks the larger reservation, and begins to make it
    compiling  every worker compiles its model with it, or loads the code from vLLM's cache
    waiting    versions in slots are written into the new slots; installs wait, for milliseconds
    switching  every worker exchanges its edits and its code between two steps

A failure in any phase leaves the old reservation serving, in every worker of every engine. The version that needed the
capacity is then refused, until it is promoted again, the store is read on demand, or the reservation grows for another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from vllm_edits.edit_store.bundle import Manifest
from vllm_edits.edit_store.byte_sizes import sized
from vllm_edits.edit_store.errors import BundleRefused, EditsError, InstallRefused, Reason
from vllm_edits.plugin.graph.reservation import Reservation, SlotBytes, is_growable
from vllm_edits.plugin.metrics import Metrics
from vllm_edits.plugin.plan import Plan
from vllm_edits.plugin.serving.slots import Slots
from vllm_edits.plugin.serving.workers import Workers, ask
from vllm_edits.server_config.settings import Grow

logger = logging.getLogger("vllm.edits")

POLL_SECONDS = 0.01
MOST_POLL_SECONDS, POLL_SHARE = 5.0, 0.1
"""Workers that compile are asked seldom, after a tenth of the time that has passed: vLLM's workers spin on their core
for a second after each call, and the compiler would have to share it."""

JOIN_SECONDS = 0.2
"""Before a growth for a version: all that one poll of the store finds grow together, and the model is compiled once."""

Phase = Literal["planned", "compiling", "waiting", "switching"]
PHASES: tuple[Phase, ...] = ("planned", "compiling", "waiting", "switching")


class Ended(Protocol):
    """Called when no growth runs any more."""

    async def __call__(self, *, grown: bool) -> None:
        """grown: the reservation is larger than before."""


class AwaitsCapacity(EditsError):
    """A version does not fit yet, and the reservation is growing for it. What was served before keeps serving."""


@dataclass
class GrowthRun:
    """One growth, for the status. `error` is empty if the new reservation serves."""

    wanted_by: list[str]
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    phase: Phase | Literal["done"] = "planned"
    seconds: dict[Phase, float] = field(default_factory=dict)
    """by phase that has ended"""
    longest_pause_seconds: float = 0.0
    """the longest time that a worker stood between two steps"""
    error: str = ""


class Growth:
    """The reservation of all workers, which grows on demand."""

    def __init__(
        self, reservation: Reservation, workers: Workers, slots: Slots, metrics: Metrics, *, slot_bytes: SlotBytes,
        grow: Grow, headroom: float, limit_bytes: int | None, ended: Ended,
    ) -> None:  # fmt: skip
        """headroom: factor on ranks. ended: called after growths, to follow promotions that waited for them."""
        self.reservation = reservation
        self.policy = grow
        self.last: GrowthRun | None = None
        self._workers = workers
        self._slots = slots
        self._metrics = metrics
        self._slot_bytes = slot_bytes
        self._headroom = headroom
        self._limit_bytes = limit_bytes
        self._ended = ended
        self._wanted: dict[str, Reservation] = {}
        self._failed: dict[str, EditsError] = {}
        self._running: asyncio.Task[None] | None = None
        self._tell()

    # -- asking --------------------------------------------------------------------------------------------------------

    def require(self, version: str, manifest: Manifest) -> None:
        """Return if a version fits. Else, with `grow = auto`, begin to grow for it, and raise AwaitsCapacity.

        InstallRefused, with all reasons, if it cannot or may not be made to fit.
        """
        missing = self.reservation.missing(manifest, self._slot_bytes)
        if not missing:
            return
        what = f"version {version[:12]} of {manifest.name!r}"
        may_grow = self.policy == "auto" and is_growable(missing)
        if not may_grow:
            raise InstallRefused(what, [*missing, *self._advice(f"{manifest.name}@{version[:12]}", missing)])
        if (failure := self._failed.pop(what, None)) is not None:
            raise failure
        self._want({what: self.needs(manifest)}, after=JOIN_SECONDS)
        raise AwaitsCapacity(
            f"{what} does not fit into what is reserved, and the reservation is growing for it; what was served before "
            "keeps serving"
        )

    def _advice(self, ref: str, missing: list[Reason]) -> Iterator[Reason]:
        if self.policy != "auto" and any(reason.code == "capacity" for reason in missing):
            command = f"vllm-edits reserve grow {ref} --url URL"
            instead = f"Run `{command}`, or" if self.policy == "ask" else f"To grow on `{command}`, set it to ask; or"
            yield Reason("grow", f"edits.grow is {self.policy}. {instead} set edits.grow to auto, and restart")

    def needs(self, manifest: Manifest) -> Reservation:
        """The capacity to grow by for a version, with the operator's headroom on ranks."""
        return Reservation.for_versions([manifest]).with_headroom(self._headroom, manifest.base.widths)

    def start(self, what: str, needed: Reservation) -> None:
        """Begin to grow, as an operator asks. Nothing happens if it fits already. InstallRefused with `never`."""
        if self.policy == "never":
            raise InstallRefused(what, [Reason("grow", "edits.grow is never. Set it to ask or auto, and restart")])
        self._failed.pop(what, None)
        if (self.reservation | needed) != self.reservation:
            self._want({what: needed})

    async def wait(self) -> None:
        """Wait until no growth runs."""
        while self._running is not None:
            await asyncio.shield(self._running)

    def _want(self, wanted: Mapping[str, Reservation], *, after: float = 0.0) -> None:
        self._wanted.update(wanted)
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run(after))

    # -- growing -------------------------------------------------------------------------------------------------------

    async def _run(self, after: float) -> None:
        before = self.reservation
        try:
            await asyncio.sleep(after)
            while self._wanted:
                wanted, self._wanted = self._wanted, {}
                if not await self._try(wanted) and len(wanted) > 1:  # one of them may be to blame
                    for what, needed in wanted.items():
                        await self._try({what: needed})
        finally:
            self._running = None
        await self._ended(grown=self.reservation != before)

    async def _try(self, wanted: Mapping[str, Reservation]) -> bool:
        """Grow for several reservations at once. False if it fails; then nothing has changed."""
        target = self.reservation
        for needed in wanted.values():
            target = target | needed
        for what in wanted:
            self._failed.pop(what, None)  # of all together, before each by itself
        if target == self.reservation:
            return True
        run = self.last = GrowthRun(list(wanted))
        try:
            await self._grow(run, target)
        except Exception as error:  # noqa: BLE001  told to each that wanted it
            run.error = str(error)
            found = error.reasons if isinstance(error, BundleRefused) else (Reason("growth", str(error)),)
            reasons = [Reason(reason.code, f"in phase {run.phase}: {reason.message}") for reason in found]
            self._failed.update((what, InstallRefused(what, reasons)) for what in wanted)
            self._metrics.growths.labels("error").inc()
            logger.error("the reservation did not grow, phase=%s; all versions keep serving: %s", run.phase, error)  # noqa: TRY400
            await self._end(run, keep=False)
            return False
        finally:
            for phase, seconds in run.seconds.items():
                self._metrics.growth_seconds.labels(phase).observe(seconds)
            self._metrics.growth_longest_pause_seconds.set(run.longest_pause_seconds)
        run.phase = "done"
        self._metrics.growths.labels("ok").inc()
        self._tell()
        logger.info(
            "the reservation has grown for %s seconds=%s longest_pause=%.3f", ", ".join(wanted), run.seconds,
            run.longest_pause_seconds,
        )  # fmt: skip
        return True

    async def _grow(self, run: GrowthRun, target: Reservation) -> None:
        with self._phase(run, "planned"):
            await ask(self._workers, "edits_grow", target.to_settings(), target.scopes, self._limit_bytes)
        with self._phase(run, "compiling"):
            start = time.monotonic()
            while not {"carrying", "ready"}.issuperset(await self._poll(run)):  # noqa: ASYNC110  as in workers.py
                await asyncio.sleep(min(MOST_POLL_SECONDS, POLL_SECONDS + POLL_SHARE * (time.monotonic() - start)))
        with self._phase(run, "waiting"):
            await self._carried(run)
        async with self._slots.no_installs():
            with self._phase(run, "waiting"):
                await self._carried(run)  # versions that were installed in the meantime
            with self._phase(run, "switching"):
                while any("absent" in answer for answer in await self._asked(run, "edits_grow_switch")):
                    await self._carried(run)
                self.reservation = target
                self._slots.forget_ready()
                await self._end(run, keep=True)

    async def _carried(self, run: GrowthRun) -> None:
        """Wait until every worker has all versions in the new slots."""
        while set(await self._poll(run)) != {"ready"}:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)

    async def _poll(self, run: GrowthRun) -> list[str]:
        return [answer["phase"] for answer in await self._asked(run, "edits_grow_poll")]

    async def _asked(self, run: GrowthRun, method: str, *arguments: Any) -> list[dict[str, Any]]:
        answers = await ask(self._workers, method, *arguments)
        run.longest_pause_seconds = max(run.longest_pause_seconds, *(answer["pause"] for answer in answers))
        return answers

    async def _end(self, run: GrowthRun, *, keep: bool) -> None:
        """Let the workers drop what they do not need any more."""
        try:
            await self._asked(run, "edits_grow_end", keep)
        except EditsError:
            logger.exception("a worker could not %s the growth of the reservation", "end" if keep else "undo")

    @contextmanager
    def _phase(self, run: GrowthRun, phase: Phase) -> Iterator[None]:
        run.phase, before, start = phase, run.seconds.get(phase, 0.0), time.monotonic()
        for each in PHASES:
            self._metrics.growth_phase.labels(each).set(each == phase)
        try:
            yield
        finally:
            run.seconds[phase] = round(before + time.monotonic() - start, 3)
            self._metrics.growth_phase.labels(phase).set(0)

    def _tell(self) -> None:
        self._metrics.reserved_bytes.set(self._bytes())

    def _bytes(self) -> int:
        """Device memory of all slots in one worker."""
        return Plan.of(self.reservation, self._slot_bytes).total(self._slots.residency.slots)

    def status(self) -> Mapping[str, Any]:
        """The reservation and the last growth, as plain data."""
        reserved = self._bytes()
        return {
            "grow": self.policy,
            "bytes": reserved,
            "size": sized(reserved),
            "holds": str(self.reservation),
            "scopes": self.reservation.scopes,
            "growing": self._running is not None,
            "waiting": sorted(self._wanted),
            "failed": {what: str(error) for what, error in sorted(self._failed.items())},
            "last": None if self.last is None else vars(self.last) | {"seconds": dict(self.last.seconds)},
        }
