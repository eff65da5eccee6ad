"""The versioned store: immutable bundles, and append-only histories of tags that say which version is promoted.

    store.json                                   format and its version
    blobs/sha256/<ab>/<digest>                   tensor files
    manifests/sha256/<ab>/<digest>.json          manifests; the digest is the version
    attestations/sha256/<ab>/<digest>/…          signatures over manifests and tag entries
    versions/<name>/<digest>.json                the record of a publication: name, version, actor, time
    index/<20-digit sequence>.json               every tag with a history, in the order of their first entries
    tags/<name>/<tag>/<20-digit sequence>.json   one entry per promotion, rollback or pin, chained by sha256
    experiments/<20-digit sequence>.json         one entry per change of any experiment, likewise

Objects are written in this order. The tag entry is the commit point: a crash before it leaves garbage, never an
incomplete state. FORMAT.md describes the format for authors of other programs.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.backends import (
    AlreadyExists,
    Backend,
    get_many,
    in_pieces,
    open_backend,
    require_exclusive_create,
)
from vllm_edits.edit_store.bundle import Bundle, BundleName, Manifest, Name
from vllm_edits.edit_store.canonical import Digest, canonical_json, now, sha256
from vllm_edits.edit_store.errors import (
    AmbiguousVersion,
    Conflict,
    NotFound,
    StoreCorrupt,
    StoreUnavailable,
    nearest,
)
from vllm_edits.edit_store.refs import DEFAULT_TAG, Ref, is_bundle_name, is_name, is_version_prefix
from vllm_edits.edit_store.signing import (
    Role,
    Signature,
    SigningKey,
    attestation_folder,
    attestation_key,
    read_envelopes,
)
from vllm_edits.edit_store.storage.intents import relying_on
from vllm_edits.edit_store.storage.log import E, Entry, Log
from vllm_edits.edit_store.tensor_file import MAX_TENSOR_FILE_BYTES

FORMAT, FORMAT_VERSION = "vllm-edits-store", 1
FORMAT_KEY = "store.json"

_exclusive: set[str] = set()
"""Stores whose create-if-absent this process has tested."""


class Published(BaseModel):
    """The record of a publication of a version under a name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: BundleName
    version: Digest
    label: str
    actor: str
    at: AwareDatetime


class TagEntry(Entry):
    """One entry in the history of a tag. The last entry says which version is promoted."""

    name: BundleName
    tag: Name
    version: Digest
    operation: Literal["promote", "rollback", "pin", "unpin", "withdraw"]

    @property
    def pinned(self) -> bool:
        """True if the tag is pinned when this is its last entry."""
        return self.operation == "pin"

    @property
    def withdrawn(self) -> bool:
        """True if the tag promotes nothing when this is its last entry. `version` is the withdrawn one."""
        return self.operation == "withdraw"


class IndexEntry(Entry):
    """One entry of the index: a tag that has a history, or is about to have one."""

    name: BundleName
    tag: Name


TagKey = tuple[str, str]
"""Name and tag."""

Heads = Mapping[str, Mapping[str, TagEntry]]
"""Promoted entries by name, then tag."""


class EditStore:
    """A store at a URL (a folder path by default). Safe to use from many processes at once.

    With a `signer`, each publication is signed as author, and each promotion as promoter.
    """

    def __init__(self, url: str, *, create: bool = False, signer: SigningKey | None = None) -> None:
        self.backend: Backend = open_backend(url)
        self.url = self.backend.url
        self._signer = signer
        self.check_format(create=create)

    @property
    def signs(self) -> bool:
        """True if this object signs what it writes."""
        return self._signer is not None

    def check_format(self, *, create: bool = False) -> None:
        """StoreUnavailable if there is no store of this format. A missing store is not an empty store."""
        expected = {"format": FORMAT, "version": FORMAT_VERSION}
        try:
            found = json.loads(self.backend.get(FORMAT_KEY))
        except KeyError:
            if not create:
                raise StoreUnavailable(
                    f"no edit store at {self.url}: expected {FORMAT_KEY}. "
                    f"Create one with: vllm-edits init --store {self.url}"
                ) from None
            self._require_writable()
            self.backend.put(FORMAT_KEY, canonical_json(expected))
            return
        except ValueError as error:
            raise StoreCorrupt(f"store {self.url}: {FORMAT_KEY} is not JSON: {error}") from error
        if found != expected:
            raise StoreUnavailable(
                f"store {self.url}: expected format {FORMAT} version {FORMAT_VERSION}, found {found}. "
                "Use a matching vllm-edits"
            )

    def _require_writable(self) -> None:
        """Test create-if-absent before the first write of this process, because the tag logs depend on it."""
        if self.url not in _exclusive:
            require_exclusive_create(self.backend)
            _exclusive.add(self.url)

    # -- bundles ---------------------------------------------------------------------------------------------------

    def publish(self, bundle: Bundle, *, actor: str | None = None) -> str:
        """Check and store a bundle; returns its version. Publishing the same bundle again repairs damaged objects."""
        verify.check(bundle)
        manifest, version = bundle.manifest, bundle.version
        record = Published(name=manifest.name, version=version, label=manifest.label, actor=actor or _user(), at=now())
        signatures = [] if self._signer is None else [self._signer.sign(Role.AUTHOR, version, manifest.name)]
        self.put_version(bundle, signatures, record)
        return version

    def put_version(self, bundle: Bundle, signatures: Sequence[bytes], record: Published) -> None:
        """Write all objects of a version. `record` is stored only if the version was not published here before."""
        self._require_writable()
        blob, version = bundle.manifest.tensors.sha256, bundle.version
        with relying_on(self.backend, [version, blob]):
            self.backend.put(blob_key(blob), bytes(bundle.tensor_bytes))
            self.backend.put(manifest_key(version), bundle.manifest.to_bytes())
            for envelope in signatures:
                self.attest(version, envelope)
            key = version_key(record.name, version)
            try:
                self.backend.create(key, canonical_json(record.model_dump(mode="json")))
            except AlreadyExists:  # the first record stays; writing it again resets its age, which gc looks at
                self.backend.put(key, self.backend.get(key))

    def manifest(self, version: str) -> Manifest:
        """The manifest of a version. Its digest is checked."""
        data = self._get(manifest_key(version), f"version {version[:12]}")
        if sha256(data) != version:
            raise StoreCorrupt(
                f"manifest of version {version[:12]} has the digest {sha256(data)[:12]}. Publish the version again "
                "from a copy"
            )
        return Manifest.from_bytes(data, f"manifest of version {version[:12]}")

    def bundle(self, version: str) -> Bundle:
        """A version with its tensors. The caller must check it with `verify.check`."""
        return self.with_tensors(version, self.manifest(version))

    def with_tensors(
        self, version: str, manifest: Manifest, progress: Callable[[int], None] = lambda _: None
    ) -> Bundle:
        """The same, for a manifest that was read already. `progress` is called with the size of each piece."""
        size, pieces = min(manifest.tensors.size, MAX_TENSOR_FILE_BYTES), []
        try:
            for piece in in_pieces(self.backend, blob_key(manifest.tensors.sha256), size):
                pieces.append(piece)
                progress(len(piece))
        except KeyError:
            raise NotFound(
                f"the tensors of version {version[:12]} are not in store {self.url}. Publish the version again from a "
                "copy"
            ) from None
        return Bundle(manifest, b"".join(pieces))

    def names(self) -> list[str]:
        """Every name under which a version was published."""
        return sorted({item.key.split("/")[1] for item in self.backend.list("versions/")})

    def version_digests(self, name: str) -> list[str]:
        """Every version published under a name, in no order. It costs one listing."""
        _require_name(name)
        digests = [item.key.rpartition("/")[2].removesuffix(".json") for item in self.backend.list(f"versions/{name}/")]
        if not digests:
            raise NotFound(f"nothing is published under {name!r} in {self.url}.{nearest(name, self.names())}")
        return digests

    def versions(self, name: str) -> list[Published]:
        """Every version published under a name with its record, oldest first."""
        keys = [version_key(name, digest) for digest in self.version_digests(name)]
        records = [_parse_published(data, key) for key, data in zip(keys, get_many(self.backend, keys), strict=True)]
        return sorted(records, key=lambda record: (record.at, record.version))

    def record(self, name: str, version: str) -> Published:
        """The record of the publication of a version under a name."""
        key = version_key(name, version)
        return _parse_published(self._get(key, f"the record that {name}@{version[:12]} was published"), key)

    # -- signatures ------------------------------------------------------------------------------------------------

    def attest(self, subject: str, envelope: bytes) -> None:
        """Store a signature over the object with this digest. Signatures are added, never replaced."""
        self.backend.put(attestation_key(subject, envelope), envelope)

    def attestations(self, subject: str) -> list[bytes]:
        """Every stored envelope over the object with this digest."""
        keys = sorted(item.key for item in self.backend.list(attestation_folder(subject)))
        return list(get_many(self.backend, keys))

    def signatures(self, subject: str) -> list[Signature]:
        """Every readable signature over the object with this digest. They are not verified: see trust.py."""
        return read_envelopes(self.attestations(subject))

    # -- tags ------------------------------------------------------------------------------------------------------

    def index(self) -> Log[IndexEntry]:
        """The index: the log of all tags with a history."""
        return Log(self.backend, "index", IndexEntry, "the index of tags", "vllm-edits verify")

    def tag_log(self, name: str, tag: str) -> Log[TagEntry]:
        """The log of one tag."""
        _require_name(name)
        if not is_name(tag):
            raise NotFound(f"{tag!r} cannot be a tag: expected lower-case letters, digits, '.', '_' and '-'")
        see = f"vllm-edits history {name} --tag {tag}"
        folder, what = f"tags/{name}/{tag}", f"{name}@{tag}"
        return Log(self.backend, folder, TagEntry, what, see, require=lambda entry: _require_of(entry, name, tag))

    def all_tags(self) -> list[tuple[str, str]]:
        """Every (name, tag) with a history."""
        return sorted({(entry.name, entry.tag) for entry in self.index().history()})

    def tags(self, name: str) -> list[str]:
        """Tags of a name."""
        return [tag for each, tag in self.all_tags() if each == name]

    def history(self, name: str, tag: str = DEFAULT_TAG) -> list[TagEntry]:
        """All entries of a tag, oldest first. Their chain is checked."""
        return self.tag_log(name, tag).history()

    def head(self, name: str, tag: str = DEFAULT_TAG) -> TagEntry | None:
        """The last entry of a tag, or None for a tag without history."""
        return self.tag_log(name, tag).head()

    def heads(self) -> Heads:
        """The promoted entry of every tag of every name. StoreUnavailable if the store is missing."""
        self.check_format()
        heads: dict[str, dict[str, TagEntry]] = {}
        for name, tag in self.all_tags():
            head = self.head(name, tag)
            if head is not None and not head.withdrawn:
                heads.setdefault(name, {})[tag] = head
        return heads

    def resolve(self, reference: str) -> str:
        """The version that `name`, `name@tag` or `name@digest-prefix` refers to now."""
        ref = Ref.parse(reference)
        if ref.is_version:
            matches = [version for version in self.version_digests(ref.name) if version.startswith(ref.selector)]
            if len(matches) > 1:
                raise AmbiguousVersion(
                    f"{ref} matches {len(matches)} versions: {', '.join(match[:16] for match in matches)}. Give more "
                    "digits"
                )
            if not matches:
                raise NotFound(f"{ref.name!r} has no version {ref.selector}. See: vllm-edits list {ref.name}")
            return matches[0]
        head = self.head(ref.name, ref.selector)
        if head is None:
            self.version_digests(ref.name)  # says so when the name itself is unknown
            raise NotFound(
                f"nothing is promoted as {ref}.{nearest(ref.selector, self.tags(ref.name))} "
                f"Promote a version with: vllm-edits promote {ref.name}@<version> --tag {ref.selector}"
            )
        return _promoting(head).version

    def promote(
        self, reference: str, *, tag: str = DEFAULT_TAG, reason: str = "", actor: str | None = None
    ) -> TagEntry:
        """Append an entry that promotes the referenced version under `tag`."""
        if not is_name(tag) or is_version_prefix(tag):
            raise NotFound(f"{tag!r} cannot be a tag: expected a lower-case name that does not look like a version")
        self._require_writable()
        name = Ref.parse(reference).name
        head = _movable(self.head(name, tag))
        version = self.resolve(reference)
        manifest = self.manifest(version)
        with relying_on(self.backend, [version, manifest.tensors.sha256]):
            verify.check(self.with_tensors(version, manifest))
            if head is None:
                self._announce(name, tag, reason, actor)
            return self._append(head, name, tag, version=version, operation="promote", reason=reason, actor=actor)

    def rollback(self, name: str, *, tag: str = DEFAULT_TAG, reason: str = "", actor: str | None = None) -> TagEntry:
        """Append an entry that returns to the version that was promoted before the present one."""
        history = self.history(name, tag)
        version = _before_last(history)
        if version is None:
            self.version_digests(name)  # says so when the name itself is unknown
            raise NotFound(
                f"{name}@{tag} has no earlier version to roll back to. See: vllm-edits history {name} --tag {tag}"
            )
        head = _movable(history[-1])
        return self._append(head, name, tag, version=version, operation="rollback", reason=reason, actor=actor)

    def withdraw(self, name: str, *, tag: str = DEFAULT_TAG, reason: str = "", actor: str | None = None) -> TagEntry:
        """Append an entry after which the tag promotes nothing. A rollback or a promotion ends the withdrawal."""
        head = _movable(self.head(name, tag))
        if head is None:
            self.version_digests(name)  # says so when the name itself is unknown
            raise NotFound(f"nothing is promoted as {name}@{tag}: there is nothing to withdraw")
        version = _promoting(head).version
        return self._append(head, name, tag, version=version, operation="withdraw", reason=reason, actor=actor)

    def pin(
        self, name: str, *, tag: str = DEFAULT_TAG, remove: bool = False, reason: str = "", actor: str | None = None
    ) -> TagEntry:
        """Append an entry that pins a tag, or with `remove` unpins it. The promoted version stays the same."""
        head = self.head(name, tag)
        if head is None:
            raise NotFound(f"nothing is promoted as {name}@{tag}: there is nothing to pin")
        if _promoting(head).pinned != remove:
            raise Conflict(f"{name}@{tag} is {'pinned already' if head.pinned else 'not pinned'}")
        operation = "unpin" if remove else "pin"
        return self._append(head, name, tag, version=head.version, operation=operation, reason=reason, actor=actor)

    def _announce(self, name: str, tag: str, reason: str, actor: str | None) -> None:
        """Add a tag to the index before its first entry. A follower of the index then finds that entry, or none yet."""
        index = self.index()
        while True:
            known = index.history()
            if any((entry.name, entry.tag) == (name, tag) for entry in known):
                return
            try:
                index.append(known[-1] if known else None, name=name, tag=tag, reason=reason, actor=actor or _user())
            except Conflict:  # another tag began at this moment: look again
                continue
            return

    def _append(self, head: TagEntry | None, name: str, tag: str, *, actor: str | None, **change: str) -> TagEntry:
        return self.append(self.tag_log(name, tag), head, f"{name}@{tag}", actor=actor, name=name, tag=tag, **change)

    def append(self, log: Log[E], head: E | None, what: str, *, actor: str | None, **fields: Any) -> E:
        """Append to a log of this store; with a signer, sign the entry as promoter. `what` names it in signatures."""
        self._require_writable()

        def signed(entry: E) -> None:
            if self._signer is not None:
                called = f"{what} entry {entry.sequence}"
                self.attest(entry.digest, self._signer.sign(Role.PROMOTER, entry.digest, called))

        return log.append(head, before=signed, actor=actor or _user(), **fields)

    def _get(self, key: str, what: str) -> bytes:
        try:
            return self.backend.get(key)
        except KeyError:
            raise NotFound(f"{what} is not in store {self.url}") from None


def _require_name(name: str) -> None:
    if not is_bundle_name(name):
        raise NotFound(f"{name!r} cannot be a name: expected lower-case letters, digits, '.', '_' and '-'")


def _movable(head: TagEntry | None) -> TagEntry | None:
    """Return the head. Conflict if it is pinned."""
    if head is not None and head.pinned:
        raise Conflict(
            f"{head.name}@{head.tag} is pinned to {head.version[:12]} by {head.actor} since {head.at:%Y-%m-%d %H:%M}"
            f"{': ' + head.reason if head.reason else ''}. "
            f"Remove the pin with: vllm-edits pin {head.name} --tag {head.tag} --remove"
        )
    return head


def _promoting(head: TagEntry) -> TagEntry:
    """Return the head. NotFound if it promotes nothing."""
    if head.withdrawn:
        raise NotFound(
            f"{head.name}@{head.tag} was withdrawn by {head.actor} at {head.at:%Y-%m-%d %H:%M}"
            f"{': ' + head.reason if head.reason else ''}. "
            f"Serve it again with: vllm-edits rollback {head.name} --tag {head.tag}"
        )
    return head


def _before_last(history: list[TagEntry]) -> str | None:
    """The version that a rollback returns to. A rollback undoes one promotion, a second rollback the one before it.

    After a withdrawal it is the withdrawn version. A promotion after a withdrawal replaces the withdrawal.
    """
    stack: list[str] = []
    withdrawn = False
    for entry in history:
        if entry.operation == "rollback" and not withdrawn and len(stack) > 1:
            stack.pop()
        elif not entry.withdrawn and (not stack or stack[-1] != entry.version):
            stack.append(entry.version)
        withdrawn = entry.withdrawn
    before = stack if withdrawn else stack[:-1]
    return before[-1] if before else None


def _require_of(entry: TagEntry, name: str, tag: str) -> None:
    if (entry.name, entry.tag) != (name, tag):
        raise StoreCorrupt(f"entry {entry.sequence} of {name}@{tag} was written for {entry.name}@{entry.tag}")


def _parse_published(data: bytes, key: str) -> Published:
    try:
        record = Published.model_validate_json(data)
    except ValidationError as error:
        raise StoreCorrupt(f"{key} cannot be read: {error}") from None
    if version_key(record.name, record.version) != key:
        raise StoreCorrupt(f"{key} was written for {record.name}@{record.version[:12]}")
    return record


def blob_key(digest: str) -> str:
    """The key of a tensor file."""
    return f"blobs/sha256/{digest[:2]}/{digest}"


def manifest_key(version: str) -> str:
    """The key of a manifest."""
    return f"manifests/sha256/{version[:2]}/{version}.json"


def version_key(name: str, version: str) -> str:
    """The key of the record of a publication."""
    return f"versions/{name}/{version}.json"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
