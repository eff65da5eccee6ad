"""An append-only log in a store: one object per entry, numbered from 1, chained by sha256, written only if absent.

    <folder>/00000000000000000001.json
    <folder>/00000000000000000002.json    names the sha256 of the bytes before it

If two writers have both read entry n, both try to create entry n + 1, and the backend accepts one. The number alone
determines the order; times are information. Entries are never rewritten: a later entry corrects an earlier one.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import rfc8785
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from vllm_edits.edit_store.backends import AlreadyExists, Backend, get_many, get_or_none
from vllm_edits.edit_store.canonical import Digest, canonical_json, now, sha256
from vllm_edits.edit_store.errors import Overtaken, StoreCorrupt, StoreUnavailable

MAX_ENTRY_BYTES = 1 << 16
_ENTRY_FILE = re.compile(r"([0-9]{20})\.json")
_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.05


class Entry(BaseModel):
    """The fields of every entry of every log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence: int = Field(ge=1)
    previous_sha256: Digest | None
    actor: str
    reason: str
    at: AwareDatetime
    nonce: str

    def to_bytes(self) -> bytes:
        """The canonical bytes that are stored."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """sha256 of the stored bytes. The next entry contains it, and promoters sign it."""
        return sha256(self.to_bytes())


E = TypeVar("E", bound=Entry)


class Log(Generic[E]):
    """The log in one folder of a store. `what` is its name in errors; `see` is the command that shows it.

    `require` is called with every entry that is read. It raises StoreCorrupt for an entry that does not belong here.
    """

    def __init__(
        self, backend: Backend, folder: str, entry_type: type[E], what: str, see: str,
        *, require: Callable[[E], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._backend = backend
        self._folder = folder
        self._type = entry_type
        self._what = what
        self._see = see
        self._require = require

    def get(self, sequence: int) -> E | None:
        """One entry, or None if the log is shorter. It costs one small read."""
        try:
            return self._parse(self._backend.get(self._key(sequence)), sequence)
        except KeyError:
            return None

    def head(self) -> E | None:
        """The last entry, or None for an empty log."""
        sequences = self._sequences()
        return self.get(sequences[-1]) if sequences else None

    def history(self) -> list[E]:
        """Every entry, oldest first. The whole chain is checked."""
        sequences = self._sequences()
        if sequences != list(range(1, len(sequences) + 1)):
            missing = next(number for number, found in enumerate([*sequences, 0], 1) if number != found)
            raise StoreCorrupt(
                f"history of {self._what} is broken: entry {missing} is missing, although entry {sequences[-1]} "
                "exists. Restore the entry from a copy of the store"
            )
        chain: list[E] = []
        stored = get_many(self._backend, [self._key(sequence) for sequence in sequences])
        for sequence, data in zip(sequences, stored, strict=True):
            chain.append(self._follows(chain[-1] if chain else None, self._parse(data, sequence)))
        return chain

    def after(self, known: E | None) -> list[E]:
        """The entries after a known entry, oldest first. It costs one small read each, and one more."""
        new: list[E] = []
        while (entry := self.get((known.sequence if known else 0) + 1)) is not None:
            new.append(self._follows(known, entry))
            known = entry
        return new

    def append(self, head: E | None, *, before: Callable[[E], None] = lambda _: None, **fields: Any) -> E:
        """Write the entry after `head`. Overtaken if `head` is not the last entry any more.

        `before` is called with the entry before it is written, for example to store a signature. If the store's answer
        was lost, the entry is read back: its nonce shows whether it is this entry.
        """
        entry = self._type(
            sequence=head.sequence + 1 if head else 1, previous_sha256=head.digest if head else None,
            at=now(), nonce=secrets.token_hex(8), **fields,
        )  # fmt: skip
        before(entry)
        key, data = self._key(entry.sequence), entry.to_bytes()
        trouble: StoreUnavailable | None = None
        for attempt in range(_ATTEMPTS):
            try:
                self._backend.create(key, data)
            except AlreadyExists:
                found = get_or_none(self._backend, key)
                if found is None:  # S3 may answer a racing write with "exists" although neither was written: try again
                    continue
                if found == data:
                    return entry
                raise Overtaken(
                    f"another writer changed {self._what} at the same time, so nothing was written. Look at "
                    f"`{self._see}`, then try again"
                ) from None
            except StoreUnavailable as error:
                trouble = error
                time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt)
            else:
                return entry
        raise StoreUnavailable(
            f"entry {entry.sequence} of {self._what} could not be confirmed after {_ATTEMPTS} attempts, so it is "
            "unknown "
            f"whether it was written. Look at `{self._see}` when the store answers again. {trouble or ''}".strip()
        )

    def _key(self, sequence: int) -> str:
        return f"{self._folder}/{sequence:020d}.json"

    def _sequences(self) -> list[int]:
        """The numbers of the entries in order. Other files are ignored."""
        names = (item.key.rpartition("/")[2] for item in self._backend.list(self._folder + "/"))
        return sorted(int(match[1]) for name in names if (match := _ENTRY_FILE.fullmatch(name)))

    def _parse(self, data: bytes, sequence: int) -> E:
        where = f"entry {sequence} of {self._what}"
        if len(data) > MAX_ENTRY_BYTES:
            raise StoreCorrupt(f"{where}: expected at most {MAX_ENTRY_BYTES} bytes, found {len(data)}")
        try:
            entry = self._type.model_validate_json(data)
        except ValidationError as error:
            raise StoreCorrupt(f"{where} cannot be read: {error}") from None
        if entry.sequence != sequence:
            raise StoreCorrupt(f"{where}: expected the number {sequence} in it, found {entry.sequence}")
        try:
            canonical = entry.to_bytes()
        except (rfc8785.CanonicalizationError, ValueError):  # a sequence beyond 2^53
            canonical = b""
        if canonical != data:
            raise StoreCorrupt(f"{where}: expected canonical JSON (RFC 8785). It was not written by this program")
        self._require(entry)
        return entry

    def _follows(self, previous: E | None, entry: E) -> E:
        if entry.previous_sha256 != (previous.digest if previous else None):
            raise StoreCorrupt(
                f"history of {self._what} is broken at entry {entry.sequence}: it does not contain the digest of the "
                "entry before. Restore the entry from a copy of the store"
            )
        return entry
