"""Brings versions from the store to the workers: fetches, verifies, checks the reservation, and stages them.

It runs in the API process that owns the slots. A bundle is verified twice. Here, so that an invalid bundle is refused
with all reasons before any worker is asked. And in every worker (loaded.py), which reads the store itself and installs
only versions that it has checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.bundle import Manifest
from vllm_edits.edit_store.errors import NotTrusted, Reason, SettingsError
from vllm_edits.edit_store.reading.reader import Reader
from vllm_edits.edit_store.storage.store import TagEntry
from vllm_edits.edit_store.trust import Enforcement
from vllm_edits.plugin.graph.reservation import Reservation
from vllm_edits.plugin.plan import of_items
from vllm_edits.plugin.serving.growth import Growth
from vllm_edits.plugin.serving.probing import Prober
from vllm_edits.plugin.serving.slots import Slots
from vllm_edits.plugin.serving.swap import Phase
from vllm_edits.plugin.short_turns import in_thread
from vllm_edits.plugin.version_info import NO_INFO, VersionInfo
from vllm_edits.server_config.settings import read_reserve

logger = logging.getLogger("vllm.edits")

Timed = Callable[[Phase], AbstractContextManager[None]]
"""Times a phase of a swap."""


def _untimed(_phase: Phase) -> AbstractContextManager[None]:
    return nullcontext()


class KnownVersions:
    """The facts about versions that were read. They are small and never change, so they are kept."""

    def __init__(self) -> None:
        self._info: dict[str, VersionInfo] = {}

    def __getitem__(self, version: str) -> VersionInfo:
        """The facts about a version, or NO_INFO if it was never read."""
        return self._info.get(version, NO_INFO)

    def __contains__(self, version: str) -> bool:
        return version in self._info

    def add(self, version: str, info: VersionInfo) -> None:
        """Record the facts about a version."""
        self._info[version] = info


class Versions:
    """Fetches, verifies and stages versions."""

    def __init__(
        self, reader: Reader, known: KnownVersions, slots: Slots, growth: Growth, prober: Prober, *, base: BaseModelRef
    ) -> None:
        self.reader = reader
        self.known = known
        self._slots = slots
        self._growth = growth
        self._prober = prober
        self._base = base

    async def check(self, version: str, timed: Timed = _untimed, *, per_request: bool = False) -> None:
        """Fetch and verify a version. BundleRefused lists every reason. Clients see nothing of it.

        per_request: it needs a slot. AwaitsCapacity if the reservation grows for it; InstallRefused if it cannot.
        """
        with timed("fetch"):
            bundle = await in_thread(self.reader.bundle, version)
        with timed("verify"):
            await in_thread(verify.check, bundle, self._base)
            self._know(version, bundle.manifest)
            self._prober.require_probes(version)
            if per_request:
                self._growth.require(version, bundle.manifest)

    async def prepare(self, version: str, timed: Timed = _untimed) -> None:
        """Do all phases before the install: fetch, verify and stage, so that every worker has it ready for a slot."""
        await self.check(version, timed, per_request=True)
        with timed("stage"):
            await self._slots.stage(version)

    async def needs(self, ref: str, default_tag: str) -> Reservation:
        """The capacity that a version of the store needs. BundleRefused if it is not valid for this model."""
        if "@" not in ref:
            ref = f"{ref}@{default_tag}"
        # Not by `check`: a version that no promoter and no author has signed must not become a known one.
        bundle = await in_thread(self.reader.bundle, await in_thread(self.reader.resolve, ref))
        await in_thread(verify.check, bundle, self._base)
        return self._growth.needs(bundle.manifest)

    def capacity(self, reserve: Iterable[object], scopes: int) -> Reservation:
        """The capacity of profiles and entries, as in the setting `reserve`. SettingsError if one is not valid for this
        model, or if it is `promoted`: which versions those are is not known here."""
        items = read_reserve(reserve)
        if "promoted" in items:
            raise SettingsError("the profile promoted holds no entries. Name the versions to make capacity for")
        made = of_items(items, supported(self._base.architecture), self._base.widths)
        return made | Reservation({}, scopes)

    async def info(self, name: str, version: str) -> VersionInfo:
        """The facts about a version, read before the first request for it. NotTrusted if its author is not trusted."""
        if version not in self.known:
            await self.require_author(name, version)
            self._know(version, await in_thread(self.reader.manifest, version))
        return self.known[version]

    def _know(self, version: str, manifest: Manifest) -> None:
        self.known.add(version, VersionInfo.of(manifest))
        self._prober.know(version, manifest)

    # -- signatures ---------------------------------------------------------------------------------------------------

    async def require_promoter(self, entry: TagEntry) -> None:
        """NotTrusted if signatures are required and missing. With signatures = warn, only a log line."""
        self._require_trusted(
            f"{entry.name}@{entry.tag} entry {entry.sequence}", await in_thread(self.reader.untrusted, entry)
        )

    async def require_author(self, name: str, version: str) -> None:
        """The same for a version without a promotion. A client may name it, so only its author can have signed it."""
        reasons = await in_thread(self.reader.untrusted_author, name, version)
        self._require_trusted(f"version {version[:12]} of {name}", reasons)

    def _require_trusted(self, what: str, reasons: list[Reason]) -> None:
        if not reasons:
            return
        refusal = NotTrusted(what, reasons)
        if self.reader.trust.enforcement is Enforcement.REQUIRE:
            raise refusal
        logger.warning("served without trusted signatures, because edits.signatures is warn: %s", refusal)
