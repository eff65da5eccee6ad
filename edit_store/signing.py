"""Signatures over versions and promotions: DSSE envelopes with in-toto statements, signed with Ed25519 keys.

    attestations/sha256/<ab>/<subject digest>/<sha256 of the envelope>.json

The subject is the sha256 of a manifest (signed by an author) or of a tag entry (signed by a promoter). A manifest names
the digest of its tensors, and an entry the digest of the entry before it, so one small signature covers everything.
Signatures are detached: they are stored before the object that they sign is committed, and more can be added later.

Sources: DSSE v1.0.2 (secure-systems-lab/dsse), in-toto Statement v1 (in-toto/attestation).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field, ValidationError

from vllm_edits.edit_store.canonical import Digest, canonical_json, now, sha256
from vllm_edits.edit_store.errors import EditsError
from vllm_edits.edit_store.record import FrozenRecord

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_ENVELOPE_BYTES = 1 << 14
PRIVATE_SUFFIX, PUBLIC_SUFFIX = ".key", ".pub"


class Role(StrEnum):
    """The role of a key: author (signs versions) or promoter (signs promotions)."""

    AUTHOR = "author"
    PROMOTER = "promoter"

    @property
    def predicate_type(self) -> str:
        """The type of the statement. It keeps an author's signature from being read as a promoter's."""
        return f"urn:vllm-edits:{self}:v1"


class _InTotoRecord(FrozenRecord):
    model_config = ConfigDict(populate_by_name=True)


class _Digests(_InTotoRecord):
    sha256: Digest


class _Subject(_InTotoRecord):
    name: str
    digest: _Digests


class _Predicate(_InTotoRecord):
    signed_at: AwareDatetime
    expires_at: AwareDatetime | None


class Statement(_InTotoRecord):
    """The signed statement: the object, the role, and the date of expiry. The signature names the key."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type", default="https://in-toto.io/Statement/v1")
    subject: tuple[_Subject, ...] = Field(min_length=1, max_length=1)
    predicate_type: str = Field(alias="predicateType")
    predicate: _Predicate


@dataclass(frozen=True)
class SigningKey:
    """An Ed25519 private key, from a PEM file that only its owner may read."""

    signer: Any

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key."""
        from securesystemslib.signer import CryptoSigner

        return cls(CryptoSigner.generate_ed25519())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a PKCS#8 PEM file. EditsError if it is not an Ed25519 private key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from securesystemslib.signer import CryptoSigner

        try:
            private = load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise EditsError(f"{path} is not a private key: {error}. Make one with: vllm-edits keygen {path}") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise EditsError(
                f"{path}: expected an Ed25519 key, found {type(private).__name__}. Make one with: vllm-edits keygen"
            )
        return cls(CryptoSigner(private))

    @property
    def keyid(self) -> str:
        """The key's id in signatures: a digest of its public key."""
        return str(self.signer.public_key.keyid)

    def save(self, path: Path) -> Path:
        """Write the private key to `path`, readable by its owner only, and the public key beside it as `.pub`."""
        public = path.with_suffix(PUBLIC_SUFFIX)
        for taken in (path, public):
            if taken.exists():
                raise EditsError(f"{taken} exists already, and a key is never overwritten. Choose another file name")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.signer.private_bytes)
        public.write_text(self.public_pem())
        return public

    def public_pem(self) -> str:
        """The public key as PEM."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        key = _crypto_key(self.signer.public_key)
        return str(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())

    def sign(self, role: Role, digest: str, name: str, *, expires_at: datetime | None = None) -> bytes:
        """Sign the object with this digest in a role; returns the envelope. `name` is for people."""
        from securesystemslib.dsse import Envelope

        statement = Statement(
            subject=(_Subject(name=name, digest=_Digests(sha256=digest)),),
            predicate_type=role.predicate_type,
            predicate=_Predicate(signed_at=now(), expires_at=expires_at),
        )
        envelope = Envelope(canonical_json(statement.model_dump(mode="json", by_alias=True)), PAYLOAD_TYPE, {})
        envelope.sign(self.signer)
        return canonical_json(envelope.to_dict())


@dataclass(frozen=True)
class Signature:
    """One signature of an envelope with its statement. It is not verified yet."""

    statement: Statement
    keyid: str
    signed: bytes
    """the DSSE pre-authentication encoding"""
    raw: Any

    def made_by(self, public_key: Any) -> bool:
        """True if this key made the signature."""
        from securesystemslib.exceptions import UnverifiedSignatureError

        try:
            public_key.verify_signature(self.raw, self.signed)
        except UnverifiedSignatureError:
            return False
        return True


def read_envelopes(stored: Sequence[bytes]) -> list[Signature]:
    """Every signature in the readable envelopes. Unreadable ones are ignored, because any writer may store garbage."""
    return [signature for data in stored for signature in _read_envelope(data)]


def _read_envelope(data: bytes) -> list[Signature]:
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import FormatError

    if len(data) > MAX_ENVELOPE_BYTES:
        return []
    try:
        envelope = Envelope.from_dict(json.loads(data))
        if envelope.payload_type != PAYLOAD_TYPE:
            return []
        statement = Statement.model_validate_json(envelope.payload)
        return [Signature(statement, keyid, envelope.pae(), raw) for keyid, raw in envelope.signatures.items()]
    except (ValidationError, FormatError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def public_key(pem: str) -> Any:
    """A securesystemslib key from PEM. EditsError if it is not an Ed25519 public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, TypeError) as error:
        raise EditsError(f"expected an Ed25519 public key in PEM form, found: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise EditsError(f"expected an Ed25519 public key, found {type(key).__name__}")
    return SSlibKey.from_crypto(key)


def _crypto_key(key: Any) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.keyval["public"]))


def attestation_folder(subject: str) -> str:
    """The folder of the signatures over a digest."""
    return f"attestations/sha256/{subject[:2]}/{subject}/"


def attestation_key(subject: str, envelope: bytes) -> str:
    """The key of an envelope. It contains the envelope's own digest, so no signature replaces another."""
    return attestation_folder(subject) + f"{sha256(envelope)}.json"
