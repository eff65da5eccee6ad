"""The versioned store: immutable bundles, and append-only tag histories that say which is promoted.

    store.json                                 format and its version
    blobs/sha256/<ab>/<digest>                 tensor files
    manifests/sha256/<ab>/<digest>.json        manifests; the digest is the version
    versions/<name>/<digest>.json              that a version was published under a name, by whom and when
    tags/<name>/<tag>/<20-digit sequence>.json one entry per promotion or rollback, chained by sha256

Objects are written in that order and every object is written once. The tag entry is the commit point: a crash before it
leaves garbage, never half a state. Order is by sequence alone; times are information.
"""

from __future__ import annotations

import getpass
import json
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edit_store import verify
from edit_store.backends import AlreadyExists, Backend, open_backend
from edit_store.bundle import Bundle, Digest, Manifest, Name, canonical_json, sha256
from edit_store.errors import (
    AmbiguousVersion,
    Conflict,
    NotFound,
    StoreCorrupt,
    StoreUnavailable,
    nearest,
)
from edit_store.refs import DEFAULT_TAG, Ref, is_name, is_version_prefix

FORMAT, FORMAT_VERSION = "vllm-edits-store", 1
FORMAT_KEY = "store.json"
_ENTRY_FILE = re.compile(r"/([0-9]{20})\.json$")


class Published(BaseModel):
    """The record that a version was published under a name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    version: Digest
    label: str
    actor: str
    at: datetime


class TagEntry(BaseModel):
    """One line of a tag's history. The last one says what is promoted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    tag: Name
    sequence: int = Field(ge=1)
    previous_sha256: Digest | None
    version: Digest
    operation: Literal["promote", "rollback"]
    actor: str
    reason: str
    at: datetime
    nonce: str

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))


Heads = Mapping[str, Mapping[str, TagEntry]]
"""Promoted entries by name, then tag."""


class EditStore:
    """A store at a URL (a folder path by default). Safe to use from many processes at once."""

    def __init__(self, url: str, *, create: bool = False) -> None:
        self._backend: Backend = open_backend(url)
        self.url = self._backend.url
        self._check_format(create)

    def _check_format(self, create: bool) -> None:
        try:
            found = json.loads(self._backend.get(FORMAT_KEY))
        except KeyError:
            if not create:
                raise StoreUnavailable(
                    f"no edit store at {self.url}: expected {FORMAT_KEY}. "
                    f"Create one with: vllm-edits init --store {self.url}"
                ) from None
            found = {"format": FORMAT, "version": FORMAT_VERSION}
            self._backend.put(FORMAT_KEY, canonical_json(found))
        except ValueError as error:
            raise StoreCorrupt(f"store {self.url}: {FORMAT_KEY} is not JSON: {error}") from error
        if found != {"format": FORMAT, "version": FORMAT_VERSION}:
            raise StoreUnavailable(
                f"store {self.url}: expected format {FORMAT} version {FORMAT_VERSION}, found {found}. "
                "Use a matching vllm-edits"
            )

    # -- bundles ---------------------------------------------------------------------------------------------------

    def publish(self, bundle: Bundle, *, actor: str | None = None) -> str:
        """Check and store a bundle; returns its version. Publishing the same bundle twice is harmless."""
        verify.check(bundle)
        manifest, version = bundle.manifest, bundle.version
        self._backend.put(_blob_key(manifest.tensors.sha256), bundle.tensor_bytes)
        self._backend.put(_manifest_key(version), manifest.to_bytes())
        record = Published(name=manifest.name, version=version, label=manifest.label, actor=actor or _user(), at=_now())
        self._backend.put(_version_key(manifest.name, version), canonical_json(record.model_dump(mode="json")))
        return version

    def manifest(self, version: str) -> Manifest:
        """The manifest of a version, its digest checked."""
        data = self._get(_manifest_key(version), f"version {version[:12]}")
        if sha256(data) != version:
            raise StoreCorrupt(
                f"manifest of version {version[:12]} has digest {sha256(data)[:12]}; restore it from a copy"
            )
        return Manifest.from_bytes(data, f"manifest of version {version[:12]}")

    def bundle(self, version: str) -> Bundle:
        """A version with its tensors. The caller checks it with `verify.check` against the model it serves."""
        manifest = self.manifest(version)
        return Bundle(manifest, self._get(_blob_key(manifest.tensors.sha256), f"tensors of version {version[:12]}"))

    def names(self) -> list[str]:
        """Every name something was published under."""
        return sorted({key.split("/")[1] for key in self._backend.list("versions/")})

    def versions(self, name: str) -> list[Published]:
        """Every version published under a name, oldest first."""
        _require_name(name)
        keys = list(self._backend.list(f"versions/{name}/"))
        if not keys:
            raise NotFound(f"nothing is published under {name!r} in {self.url}.{nearest(name, self.names())}")
        records = [Published.model_validate_json(self._backend.get(key)) for key in keys]
        return sorted(records, key=lambda record: (record.at, record.version))

    # -- tags ------------------------------------------------------------------------------------------------------

    def tags(self, name: str) -> list[str]:
        """Tags of a name."""
        return sorted({key.split("/")[2] for key in self._backend.list(f"tags/{name}/")})

    def history(self, name: str, tag: str = DEFAULT_TAG) -> list[TagEntry]:
        """All entries of a tag, oldest first, their chain checked."""
        entries: list[TagEntry] = []
        previous: str | None = None
        sequences = self._sequences(name, tag)
        for sequence in sequences:
            data = self._backend.get(_entry_key(name, tag, sequence))
            entry = _parse_entry(data, name, tag)
            if entry.previous_sha256 != previous or entry.sequence != sequence or sequence != len(entries) + 1:
                raise StoreCorrupt(
                    f"history of {name}@{tag} is broken at entry {sequence}: it does not follow the one before"
                )
            entries.append(entry)
            previous = sha256(data)
        return entries

    def head(self, name: str, tag: str = DEFAULT_TAG) -> TagEntry | None:
        """What is promoted, or None for a tag without history."""
        sequences = self._sequences(name, tag)
        return _parse_entry(self._backend.get(_entry_key(name, tag, sequences[-1])), name, tag) if sequences else None

    def _sequences(self, name: str, tag: str) -> list[int]:
        """Numbers of a tag's entries in order; files that are no entries are not looked at."""
        _require_name(name)
        _require_name(tag)
        found = map(_ENTRY_FILE.search, self._backend.list(f"tags/{name}/{tag}/"))
        return sorted(int(match[1]) for match in found if match is not None)

    def heads(self) -> Heads:
        """What every tag of every name promotes now. StoreUnavailable when the store is gone: gone is not empty."""
        self._check_format(create=False)
        keys = (key for key in self._backend.list("tags/") if _ENTRY_FILE.search(key))
        pairs = sorted({tuple(key.split("/")[1:3]) for key in keys})
        heads: dict[str, dict[str, TagEntry]] = {}
        for name, tag in pairs:
            head = self.head(name, tag)
            if head is not None:
                heads.setdefault(name, {})[tag] = head
        return heads

    def resolve(self, reference: str) -> str:
        """The version that `name`, `name@tag` or `name@digest-prefix` means now."""
        ref = Ref.parse(reference)
        if ref.is_version:
            matches = [record.version for record in self.versions(ref.name) if record.version.startswith(ref.selector)]
            if len(matches) > 1:
                raise AmbiguousVersion(
                    f"{ref} fits {len(matches)} versions: {', '.join(match[:16] for match in matches)}"
                )
            if not matches:
                raise NotFound(f"{ref.name!r} has no version {ref.selector}. See: vllm-edits history {ref.name}")
            return matches[0]
        head = self.head(ref.name, ref.selector)
        if head is None:
            self.versions(ref.name)  # says so when the name itself is unknown
            raise NotFound(
                f"nothing is promoted as {ref}.{nearest(ref.selector, self.tags(ref.name))} "
                f"Promote a version with: vllm-edits promote {ref.name}@<version> --tag {ref.selector}"
            )
        return head.version

    def promote(
        self, reference: str, *, tag: str = DEFAULT_TAG, reason: str = "", actor: str | None = None
    ) -> TagEntry:
        """Append an entry that makes the referenced version the promoted one of `tag`."""
        if not is_name(tag) or is_version_prefix(tag):
            raise NotFound(f"{tag!r} cannot be a tag: expected a lower-case name that does not read as a version")
        name = Ref.parse(reference).name
        head = self.head(name, tag)
        version = self.resolve(reference)
        verify.check(self.bundle(version))
        return self._append(head, name, tag, version, operation="promote", reason=reason, actor=actor)

    def rollback(self, name: str, *, tag: str = DEFAULT_TAG, reason: str = "", actor: str | None = None) -> TagEntry:
        """Append an entry that returns to the version promoted before the present one."""
        history = self.history(name, tag)
        version = _before_last(history)
        if version is None:
            self.versions(name)  # says so when the name itself is unknown
            raise NotFound(f"{name}@{tag} has no earlier version to return to")
        return self._append(history[-1], name, tag, version, operation="rollback", reason=reason, actor=actor)

    def _append(self, head: TagEntry | None, name: str, tag: str, version: str, **change: Any) -> TagEntry:
        """Write the entry after `head`, on which the change was decided; Conflict when it is the head no more."""
        change["actor"] = change["actor"] or _user()
        entry = TagEntry(
            name=name,
            tag=tag,
            sequence=head.sequence + 1 if head else 1,
            previous_sha256=sha256(head.to_bytes()) if head else None,
            version=version,
            **change,
            at=_now(),
            nonce=secrets.token_hex(8),
        )
        try:
            self._backend.create(_entry_key(name, tag, entry.sequence), entry.to_bytes())
        except AlreadyExists:
            raise Conflict(
                f"{name}@{tag} was changed by somebody else meanwhile; look at "
                f"`vllm-edits history {name} --tag {tag}` and decide again"
            ) from None
        return entry

    def _get(self, key: str, what: str) -> bytes:
        try:
            return self._backend.get(key)
        except KeyError:
            raise NotFound(f"{what} is not in store {self.url}") from None


def _require_name(name: str) -> None:
    if not is_name(name):
        raise NotFound(f"{name!r} cannot be a name or a tag: expected lower-case letters, digits, '.', '_' and '-'")


def _before_last(history: list[TagEntry]) -> str | None:
    """The version to return to. A rollback undoes one promotion; a second one goes further back, not forth."""
    stack: list[str] = []
    for entry in history:
        if entry.operation == "rollback" and len(stack) > 1:
            stack.pop()
        elif not stack or stack[-1] != entry.version:
            stack.append(entry.version)
    return stack[-2] if len(stack) > 1 else None


def _parse_entry(data: bytes, name: str, tag: str) -> TagEntry:
    try:
        entry = TagEntry.model_validate_json(data)
    except ValidationError as error:
        raise StoreCorrupt(f"an entry of {name}@{tag} cannot be read: {error}") from error
    if (entry.name, entry.tag) != (name, tag):
        raise StoreCorrupt(f"an entry of {name}@{tag} was written for {entry.name}@{entry.tag}")
    return entry


def _blob_key(digest: str) -> str:
    return f"blobs/sha256/{digest[:2]}/{digest}"


def _manifest_key(version: str) -> str:
    return f"manifests/sha256/{version[:2]}/{version}.json"


def _version_key(name: str, version: str) -> str:
    return f"versions/{name}/{version}.json"


def _entry_key(name: str, tag: str, sequence: int) -> str:
    return f"tags/{name}/{tag}/{sequence:020d}.json"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
