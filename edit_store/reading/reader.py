"""The reader of a store in a server: follows tags, checks signatures, and keeps copies on the node."""

from __future__ import annotations

from vllm_edits.edit_store.bundle import Bundle, Manifest
from vllm_edits.edit_store.errors import CannotSign, Reason
from vllm_edits.edit_store.experiments.state import ExperimentEntry
from vllm_edits.edit_store.reading.cache import NodeCache
from vllm_edits.edit_store.reading.follow import Follower, Seen, StoreState
from vllm_edits.edit_store.signing import Role
from vllm_edits.edit_store.storage.store import EditStore, TagEntry
from vllm_edits.edit_store.trust import Enforcement, Trust


class Reader:
    """One store, one trust policy, one cache folder. `look` is for one thread at a time, other methods for any."""

    def __init__(self, store: EditStore, trust: Trust | None = None, cache: NodeCache | None = None) -> None:
        self.trust = trust or Trust()
        self._store = store
        self._cache = cache or NodeCache()
        self._follower = Follower(store, Seen(self._cache.folder, store.url), self._counts)

    def writable(self) -> EditStore:
        """The store for appending. CannotSign if entries must be signed, but there is no signing key."""
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

    def look(self) -> StoreState:
        """The last entry of every tag, with one small read per tag. StoreUnavailable if the store is missing."""
        return self._follower.look()

    def resolve(self, reference: str) -> str:
        """The version that a reference refers to now."""
        return self._store.resolve(reference)

    def manifest(self, version: str) -> Manifest:
        """The manifest of a version. Its digest is checked."""
        return self._store.manifest(version)

    def bundle(self, version: str) -> Bundle:
        """A version with its tensors. For a remote store, they are read from this node's copy."""
        return self._cache.bundle(self._store, version)

    def untrusted(self, entry: TagEntry) -> list[Reason]:
        """Reasons not to trust this promotion and its version. Empty if signatures are not checked."""
        if self.trust.enforcement is Enforcement.OFF:
            return []
        what = f"{entry.name}@{entry.tag} entry {entry.sequence}"
        unsigned = [
            *self._unsigned(Role.PROMOTER, entry.digest, what),
            *self._unsigned(Role.AUTHOR, entry.version, _called(entry.name, entry.version)),
        ]
        return unsigned or self._privileges(entry.name, entry.version)

    def untrusted_author(self, name: str, version: str) -> list[Reason]:
        """Reasons not to trust the author of a version. Empty if signatures are not checked."""
        if self.trust.enforcement is Enforcement.OFF:
            return []
        return self._unsigned(Role.AUTHOR, version, _called(name, version)) or self._privileges(name, version)

    def _privileges(self, name: str, version: str) -> list[Reason]:
        """The reason why a signed version is not accepted. What is not signed is not read: it need not be there."""
        if self.trust.policy.privileged:
            return []
        return self.trust.policy.privileges(self.manifest(version), _called(name, version))

    def _unsigned(self, role: Role, digest: str, what: str) -> list[Reason]:
        """Signatures over the object with this digest that the trust file needs, but the store does not have."""
        return self.trust.policy.check(role, digest, what, self._store.signatures(digest))

    def _counts(self, entry: ExperimentEntry) -> bool:
        """True if enough promoters have signed an entry of an experiment, or if signatures are not required."""
        if self.trust.enforcement is not Enforcement.REQUIRE:
            return True
        return not self._unsigned(Role.PROMOTER, entry.digest, f"experiment {entry.experiment} entry {entry.sequence}")

    def last_trusted(self, entry: TagEntry) -> TagEntry | None:
        """This entry, or the newest trusted entry before it. A server that never stopped serves the same."""
        if self.trust.enforcement is not Enforcement.REQUIRE:
            return entry
        history = self._store.history(entry.name, entry.tag)[: entry.sequence]
        return next((each for each in reversed(history) if not self.untrusted(each)), None)


def _called(name: str, version: str) -> str:
    return f"version {version[:12]} of {name}"
