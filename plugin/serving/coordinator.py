"""What an API server process asks of whoever owns the slots, in the same process or in another one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from vllm_edits.edit_store.errors import AmbiguousVersion, EditsError, NotFound, NotServed
from vllm_edits.edit_store.trust import Enforcement
from vllm_edits.plugin.experiments.evaluation_context import NO_CONTEXT, EvaluationContext
from vllm_edits.plugin.experiments.records import Record
from vllm_edits.plugin.serving.lease import Lease
from vllm_edits.plugin.serving.reconcile import Reconciler
from vllm_edits.plugin.serving.variants import Choice


class CannotSign(EditsError):
    """Promotions must be signed, and this server has no key."""


class NotFollowed(EditsError):
    """A change stands in the store, and this server keeps what it served."""


@dataclass(frozen=True)
class TagChange:
    """A change of a variant's tag in the store. Of no tag: the server's default one."""

    operation: Literal["promote", "rollback", "withdraw"]
    name: str
    tag: str | None = None
    version: str = ""
    """digest or its beginning, of what is promoted"""
    reason: str = ""
    actor: str = ""


@dataclass(frozen=True)
class Served:
    """What clients may name: each variant's name with its bundle and version, and whether the base model is served."""

    variants: Sequence[tuple[str, str, str]]
    base: bool
    experiments: Sequence[str] = ()
    """names that only experiments give a meaning"""


class Coordinator(Protocol):
    """Whoever owns the slots. Its answers are plain data, but for leases."""

    async def lease(self, model: str, strength: float | None = None, context: EvaluationContext = NO_CONTEXT) -> Lease:
        """A slot for a request that names `model`; waits while all slots are in use. `context` decides its arm.

        NotFound, AmbiguousVersion, NotServed, RequestRefused; InstallRefused when the version cannot be brought in.
        """

    async def renew(self, choice: Choice | None) -> Lease:
        """A slot for a choice already made: the same version, whatever its name means by now. None: the base model."""

    async def served(self) -> Served:
        """What clients may name now."""

    async def status(self) -> Mapping[str, Any]:
        """What `GET /v1/edits` answers."""

    async def sync(self) -> Mapping[str, Any]:
        """Look at the store now and follow what moved; the swaps that were tried, and the last error."""

    async def change(self, change: TagChange) -> Mapping[str, Any]:
        """Append a change to the store and follow it at once; the entry, and the swap."""

    def ended(self, record: Record) -> None:
        """A request that took part in an experiment, or was answered twice, has ended."""

    async def feedback(self, request: str, metric: str, value: float) -> Mapping[str, Any]:
        """How a request went; NotFound, FeedbackRefused. What was counted."""


def lease_of(coordinator: Coordinator) -> Callable[[str], Awaitable[Lease]]:
    """Leases by what an arm serves, past any experiment."""
    return lambda serves: coordinator.lease(serves, None, EvaluationContext(serves=serves))


class LocalCoordinator:
    """The owner is in this process: its reconciler."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._core = reconciler

    async def lease(self, model: str, strength: float | None = None, context: EvaluationContext = NO_CONTEXT) -> Lease:
        try:
            return await self._core.lease(model, strength, context)
        except (NotFound, AmbiguousVersion) as error:
            if refusal := self._core.refusal(model):
                raise NotServed(f"This variant cannot be served: {refusal}") from error
            raise

    async def renew(self, choice: Choice | None) -> Lease:
        return await self._core.renew(choice)

    async def served(self) -> Served:
        table = self._core.table
        variants = []
        for name in table.names():
            variant, _, tag = name.partition("@")
            variants.append((name, variant, table.promoted[variant][tag or table.default_tag]))
        known = {*table.base_names, *table.names()}
        return Served(variants, table.in_weights is None, tuple(sorted(self._core.experiments.names - known)))

    async def status(self) -> Mapping[str, Any]:
        return self._core.status()

    async def sync(self) -> Mapping[str, Any]:
        swaps = await self._core.sync(retry_refused=True)
        await self._core.slots.read_firings()
        return {"swaps": [asdict(swap) for swap in swaps], "last_error": self._core.last_error}

    def ended(self, record: Record) -> None:
        self._core.experiments.ended(record)

    async def feedback(self, request: str, metric: str, value: float) -> Mapping[str, Any]:
        return self._core.experiments.feedback(request, metric, value)

    async def change(self, change: TagChange) -> Mapping[str, Any]:
        core = self._core
        if core.reader.trust.enforcement is Enforcement.REQUIRE and not core.reader.store.signs:
            raise CannotSign(
                "promotions must be signed, and this server has no key: set edits.signing_key_file, or use "
                "`vllm-edits promote --key` on the store"
            )
        entry = await asyncio.to_thread(self._append(change))
        swaps = await core.sync(retry_refused=True)
        swap = next((swap for swap in swaps if (swap.variant, swap.tag) == (entry.name, entry.tag)), None)
        if swap is not None and swap.error:
            raise NotFollowed(
                f"the {change.operation} stands in the store, but this server keeps what it served: {swap.error}"
            )
        return {"entry": entry.model_dump(mode="json"), "swap": asdict(swap) if swap else None}

    def _append(self, change: TagChange) -> Callable[[], Any]:
        store = self._core.reader.store
        said = {"tag": change.tag or self._core.table.default_tag, "reason": change.reason, "actor": change.actor}
        if change.operation == "promote":
            return lambda: store.promote(f"{change.name}@{change.version}", **said)
        if change.operation == "rollback":
            return lambda: store.rollback(change.name, **said)
        return lambda: store.withdraw(change.name, **said)
