"""The reading side of a store, as a server uses it: follow the tags, weigh signatures, keep this node's copies."""

from __future__ import annotations

from vllm_edits.edit_store.bundle import Bundle, Manifest
from vllm_edits.edit_store.errors import CannotSign, Reason
from vllm_edits.edit_store.experiments.state import ExperimentEntry
from vllm_edits.edit_store.reading.cache import NodeCache
from vllm_edits.edit_store.reading.follow import Follower, Look, Seen
from vllm_edits.edit_store.signing import Role
from vllm_edits.edit_store.storage.store import EditStore, TagEntry
from vllm_edits.edit_store.trust import Enforcement, Trust


class Reader:
    """One store, one trust policy, one cache folder. `look` is for one thread at a time, the rest for any."""

    def __init__(self, store: EditStore, trust: Trust | None = None, cache: NodeCache | None = None) -> None:
        self.trust = trust or Trust()
        self._store = store
        self._cache = cache or NodeCache()
        self._follower = Follower(store, Seen(self._cache.folder, store.url), self._counts)

    def writable(self) -> EditStore:
        """The store, to append to. CannotSign where entries must be signed and there is no key for that."""
        if self.trust.enforcement is Enforcement.REQUIRE and not self._store.signs:
            raise CannotSign(
                "entries must be signed, but this server has no signing key. Set edits.signing_key_file, or make the "
                "change with `vllm-edits` and --key"
            )
        return self._store

    @property
    def url(self) -> str:
        """The store's URL."""
        return self._store.url

    def look(self) -> Look:
        """What every tag promotes now, for one small read per tag. StoreUnavailable when the store is gone."""
        return self._follower.look()

    def resolve(self, reference: str) -> str:
        """The version that a reference means now."""
        return self._store.resolve(reference)

    def manifest(self, version: str) -> Manifest:
        """The manifest of a version, its digest checked."""
        return self._store.manifest(version)

    def bundle(self, version: str) -> Bundle:
        """A version with its tensors, from this node's copy where the store is remote."""
        return self._cache.bundle(self._store, version)

    def doubts(self, entry: TagEntry) -> list[Reason]:
        """What is missing for this promotion and its version to be believed; empty also when nobody asks for it."""
        if self.trust.enforcement is Enforcement.OFF:
            return []
        what = f"{entry.name}@{entry.tag} entry {entry.sequence}"
        return [*self._unsigned(Role.PROMOTER, entry.digest, what), *self.author_doubts(entry.name, entry.version)]

    def author_doubts(self, name: str, version: str) -> list[Reason]:
        """What is missing for a version to be believed, whoever promotes it; empty also when nobody asks for it."""
        if self.trust.enforcement is Enforcement.OFF:
            return []
        return self._unsigned(Role.AUTHOR, version, f"version {version[:12]} of {name}")

    def _unsigned(self, role: Role, digest: str, what: str) -> list[Reason]:
        """What the trust file asks for, and the store does not have, over the object of that digest."""
        return self.trust.policy.check(role, digest, what, self._store.signatures(digest))

    def _counts(self, entry: ExperimentEntry) -> bool:
        """Whether promoters have signed for what is done to an experiment, where that is asked for."""
        if self.trust.enforcement is not Enforcement.REQUIRE:
            return True
        return not self._unsigned(Role.PROMOTER, entry.digest, f"experiment {entry.experiment} entry {entry.sequence}")

    def believed(self, entry: TagEntry) -> TagEntry | None:
        """This entry, or the newest one before it that can be believed: what a server that never stopped serves."""
        if self.trust.enforcement is not Enforcement.REQUIRE:
            return entry
        history = self._store.history(entry.name, entry.tag)[: entry.sequence]
        return next((each for each in reversed(history) if not self.doubts(each)), None)
