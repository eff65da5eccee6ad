"""The trust file: public keys with roles and dates, and the number of signatures that are needed.

It fails closed: a version or a promotion counts only with enough valid signatures of different keys with the right
role. Dates are compared with the present time, never with the date in a signature: else a stolen old key could sign for
the past. To rotate a key: add the new key, sign the promoted versions with it, and let the old key expire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AwareDatetime, Field

from vllm_edits.edit_store.bundle import Manifest
from vllm_edits.edit_store.errors import EditsError, Reason, SettingsError
from vllm_edits.edit_store.record import FrozenRecord
from vllm_edits.edit_store.signing import Role, Signature, public_key


class Enforcement(StrEnum):
    """The treatment of missing signatures: refuse (require), log a warning (warn), or do not check (off)."""

    REQUIRE = "require"
    WARN = "warn"
    OFF = "off"


class TrustedKey(FrozenRecord):
    """A public key with its roles and its dates."""

    name: str = Field(min_length=1, description="name of the key's holder")
    public: str = Field(description="the public key, PEM")
    roles: Annotated[tuple[Role, ...], Field(min_length=1)]
    not_before: AwareDatetime | None = None
    not_after: AwareDatetime | None = None

    @property
    def key(self) -> Any:
        """The key itself. EditsError if the PEM is not an Ed25519 public key."""
        return public_key(self.public)


class TrustPolicy(FrozenRecord):
    """The trust file."""

    schema_version: Literal[1] = 1
    authors_needed: int = Field(default=1, ge=1, description="signatures a version needs")
    promoters_needed: int = Field(default=1, ge=1, description="signatures a promotion needs")
    privileged: bool = Field(default=False, description="whether versions that take safety away are accepted")
    keys: tuple[TrustedKey, ...] = ()

    @classmethod
    def load(cls, path: Path, *, unfinished: bool = False) -> TrustPolicy:
        """Read a trust file. SettingsError lists every error in it.

        An `unfinished` file, which is being edited, may ask for more signatures than its keys can give.
        """
        try:
            policy = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise SettingsError(
                f"trust file {path} cannot be read: {error.strerror}. Check the path, or make the file with: "
                "vllm-edits trust add"
            ) from None
        except pydantic.ValidationError as error:
            lines = [f"  - {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
            raise SettingsError("\n".join([f"trust file {path} is invalid:", *lines])) from None
        if problems := policy.broken() + ([] if unfinished else policy.unsatisfiable()):
            raise SettingsError("\n".join([f"trust file {path} is invalid:", *(f"  - {each}" for each in problems)]))
        return policy

    def save(self, path: Path) -> None:
        """Write the file in a form for people. `privileged` is left out where it is false, as in older files."""
        left_out = set() if self.privileged else {"privileged"}
        path.write_text(self.model_dump_json(indent=2, exclude_none=True, exclude=left_out) + "\n")

    def needed(self, role: Role) -> int:
        """The number of signatures of different keys that this role needs."""
        return self.authors_needed if role is Role.AUTHOR else self.promoters_needed

    def broken(self) -> list[str]:
        """Errors in the keys: invalid, listed twice, or with wrong dates."""
        found: list[str] = []
        seen: dict[str, str] = {}
        for trusted in self.keys:
            try:
                keyid = trusted.key.keyid
            except EditsError as error:
                found.append(f"key {trusted.name!r}: {error}")
                continue
            if keyid in seen:
                found.append(
                    f"keys {seen[keyid]!r} and {trusted.name!r} are the same key, which would count twice. Remove one"
                )
            seen[keyid] = trusted.name
            if trusted.not_before and trusted.not_after and trusted.not_before >= trusted.not_after:
                found.append(f"key {trusted.name!r}: expected not_after later than not_before")
        return found

    def unsatisfiable(self) -> list[str]:
        """Roles that need more signatures than they have keys. Without any key, no signature is needed."""
        holders = {role: sum(role in trusted.roles for trusted in self.keys) for role in Role}
        return [
            f"{self.needed(role)} {role} signature(s) are needed, but only {count} key(s) have the role {role}. Add "
            "keys, or lower the threshold"
            for role, count in holders.items()
            if self.keys and count < self.needed(role)
        ]

    def privileges(self, manifest: Manifest, what: str) -> list[Reason]:
        """The reason why a version that takes safety away is not accepted, even if it is signed. Empty if it is."""
        if not manifest.privileged or self.privileged:
            return []
        told = "it is privileged: it takes safety away, and this trust file does not allow that"
        return [Reason("privileged", f"{what}: {told} (vllm-edits trust privileged FILE allow)")]

    def check(
        self, role: Role, digest: str, what: str, signatures: Sequence[Signature], *, at: datetime | None = None
    ) -> list[Reason]:
        """Reasons why the object with this digest is not trusted. Empty if enough keys of the role signed it."""
        at = at or datetime.now(UTC)
        about = [
            signature
            for signature in signatures
            if signature.statement.predicate_type == role.predicate_type
            and signature.statement.subject[0].digest.sha256 == digest
        ]
        if not about:
            return [Reason("unsigned", f"{what}: expected {self.needed(role)} {role} signature(s), found none")]
        valid: set[str] = set()
        reasons: list[Reason] = []
        for signature in about:
            reason = self._fault(signature, role, at)
            if reason is None:
                valid.add(signature.keyid)
            else:
                reasons.append(Reason(reason.code, f"{what}: {reason.message}"))
        if len(valid) >= self.needed(role):
            return []
        told = f"expected {self.needed(role)} valid {role} signature(s) of different keys, found {len(valid)}"
        return [*reasons, Reason("below_threshold", f"{what}: {told}")]

    def _fault(self, signature: Signature, role: Role, at: datetime) -> Reason | None:
        trusted = next((each for each in self.keys if each.key.keyid == signature.keyid), None)
        if trusted is None:
            return Reason("untrusted_key", f"signed by key {signature.keyid[:12]}, which is not in the trust file")
        who = f"{trusted.name} ({signature.keyid[:12]})"
        if role not in trusted.roles:
            return Reason("wrong_role", f"signed by {who}, whose key does not have the role {role}")
        if not signature.made_by(trusted.key):
            return Reason("bad_signature", f"the signature names the key of {who}, but was not made with it")
        ends = [end for end in (trusted.not_after, signature.statement.predicate.expires_at) if end is not None]
        if ends and at > min(ends):
            return Reason("expired", f"the signature of {who} expired on {min(ends):%Y-%m-%d %H:%M}")
        if trusted.not_before and at < trusted.not_before:
            return Reason("not_yet_valid", f"the key of {who} is valid only from {trusted.not_before:%Y-%m-%d %H:%M}")
        return None


@dataclass(frozen=True)
class Trust:
    """A trust policy, and how a server enforces it."""

    policy: TrustPolicy = field(default_factory=TrustPolicy)
    enforcement: Enforcement = Enforcement.OFF

    @classmethod
    def configured(cls, file: str | None, enforcement: Enforcement | None) -> Trust:
        """The trust that the settings ask for. Default: signatures are required if the trust file holds a key."""
        policy = TrustPolicy() if file is None else TrustPolicy.load(Path(file))
        if enforcement is None:
            enforcement = Enforcement.REQUIRE if policy.keys else Enforcement.OFF
        if enforcement is not Enforcement.OFF and not policy.keys:
            raise SettingsError(
                f"signatures are set to {enforcement}, but no key is trusted. Name a trust file with at least one key "
                "(vllm-edits trust add FILE KEY.pub --role author --role promoter), or set signatures to off"
            )
        return cls(policy, enforcement)
