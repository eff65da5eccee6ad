"""Versions on their way out of the store: fetched, verified, held against the room there is, staged in every worker.

A bundle is verified twice. Here, so that one that breaks a rule is refused with all its reasons before any worker is
asked; and in every worker (loader.py), which reads the store by itself and installs nothing that it has not checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.bundle import Bundle
from vllm_edits.edit_store.errors import InstallRefused, NotTrusted, Reason
from vllm_edits.edit_store.reading.reader import Reader
from vllm_edits.edit_store.storage.store import TagEntry
from vllm_edits.edit_store.trust import Enforcement
from vllm_edits.plugin.graph.reservation import Reservation, SlotBytes
from vllm_edits.plugin.serving.slots import Slots
from vllm_edits.plugin.serving.swap import Phase
from vllm_edits.plugin.short_turns import in_thread
from vllm_edits.plugin.version_info import NO_INFO, VersionInfo

logger = logging.getLogger("vllm.edits")

Timed = Callable[[Phase], AbstractContextManager[None]]
"""Times a phase of a swap."""


def _untimed(_phase: Phase) -> AbstractContextManager[None]:
    return nullcontext()


class KnownVersions:
    """What is known of versions that were looked at. Small, and the same for ever, so never dropped."""

    def __init__(self) -> None:
        self._info: dict[str, VersionInfo] = {}

    def __getitem__(self, version: str) -> VersionInfo:
        """What is known of a version; of one that was never looked at, nothing."""
        return self._info.get(version, NO_INFO)

    def __contains__(self, version: str) -> bool:
        return version in self._info

    def add(self, version: str, info: VersionInfo) -> None:
        """Remember a version."""
        self._info[version] = info


class Versions:
    """Brings versions out of the store, as far as a slot or the weights want them."""

    def __init__(
        self, reader: Reader, known: KnownVersions, slots: Slots, *, base: BaseModelRef, reservation: Reservation,
        slot_bytes: SlotBytes,
    ) -> None:  # fmt: skip
        self.reader = reader
        self.known = known
        self._slots = slots
        self._base = base
        self._reservation = reservation
        self._slot_bytes = slot_bytes

    async def check(self, version: str, timed: Timed = _untimed) -> Bundle:
        """Fetch a version and verify it. BundleRefused with every reason; nothing of this is visible to clients."""
        with timed("fetch"):
            bundle = await in_thread(self.reader.bundle, version)
        with timed("verify"):
            await in_thread(verify.check, bundle, self._base)
        self.known.add(version, VersionInfo.of(bundle.manifest))
        return bundle

    async def stage(self, name: str, version: str, timed: Timed = _untimed) -> None:
        """Fetch and verify a version, and have every worker make it ready for a slot.

        InstallRefused where the room that is reserved does not hold it.
        """
        bundle = await self.check(version, timed)
        if missing := self._reservation.missing(bundle.manifest, self._slot_bytes):
            raise InstallRefused(f"version {version[:12]} of {name!r}", missing)
        with timed("stage"):
            await self._slots.make_ready(version)

    async def info(self, name: str, version: str) -> VersionInfo:
        """What must be known of a version before a request for it is served. NotTrusted where its author is not."""
        if version not in self.known:
            await self.require_author(name, version)
            self.known.add(version, VersionInfo.of(await in_thread(self.reader.manifest, version)))
        return self.known[version]

    # -- whom to believe -----------------------------------------------------------------------------------------------

    async def require_promoter(self, entry: TagEntry) -> None:
        """NotTrusted when signatures are required and missing; where they are only wished for, a line in the log."""
        self._weigh(f"{entry.name}@{entry.tag} entry {entry.sequence}", await in_thread(self.reader.doubts, entry))

    async def require_author(self, name: str, version: str) -> None:
        """The same for a version that no tag promotes: a client may name it, so nobody has vouched for it yet."""
        doubts = await in_thread(self.reader.author_doubts, name, version)
        self._weigh(f"version {version[:12]} of {name}", doubts)

    def _weigh(self, what: str, doubts: list[Reason]) -> None:
        if not doubts:
            return
        refusal = NotTrusted(what, doubts)
        if self.reader.trust.enforcement is Enforcement.REQUIRE:
            raise refusal
        logger.warning("served without trusted signatures, because edits.signatures is warn: %s", refusal)
