"""Whom a server believes: enough valid signatures of different keys of the right role, now, over this very object."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.store import bundle
from vllm_edits.edit_store import EditStore, Role, SigningKey, TrustedKey, TrustPolicy
from vllm_edits.edit_store.errors import EditsError, SettingsError
from vllm_edits.edit_store.signing import MAX_ENVELOPE_BYTES, read_envelopes

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DIGEST, OTHER = "a" * 64, "b" * 64


@dataclass(frozen=True)
class Person:
    """Somebody with a key."""

    name: str
    key: SigningKey

    def trusted(self, *roles: Role, begin: datetime | None = None, end: datetime | None = None) -> TrustedKey:
        return TrustedKey(name=self.name, public=self.key.public_pem(), roles=roles, not_before=begin, not_after=end)

    def signs(self, digest: str = DIGEST, role: Role = Role.AUTHOR, end: datetime | None = None) -> bytes:
        return self.key.sign(role, digest, "polite", expires_at=end)


@pytest.fixture(scope="module")
def alice() -> Person:
    return Person("alice", SigningKey.generate())


@pytest.fixture(scope="module")
def bob() -> Person:
    return Person("bob", SigningKey.generate())


def codes(policy: TrustPolicy, *envelopes: bytes, role: Role = Role.AUTHOR, at: datetime = NOW) -> list[str]:
    """What is held against the object of DIGEST, [] when it is trusted."""
    return [reason.code for reason in policy.check(role, DIGEST, "it", read_envelopes(envelopes), at=at)]


def test_a_signature_of_a_trusted_author_is_believed(alice: Person) -> None:
    assert codes(TrustPolicy(keys=(alice.trusted(Role.AUTHOR),)), alice.signs()) == []


def test_without_a_signature_nothing_is_believed(alice: Person) -> None:
    assert codes(TrustPolicy(keys=(alice.trusted(Role.AUTHOR),))) == ["unsigned"]


def test_a_stranger_is_not_believed(alice: Person, bob: Person) -> None:
    policy = TrustPolicy(keys=(alice.trusted(Role.AUTHOR),))
    assert codes(policy, bob.signs()) == ["untrusted_key", "below_threshold"]
    assert codes(policy, bob.signs(), alice.signs()) == [], "nor does a stranger spoil what somebody else vouches for"


def test_roles_are_apart(alice: Person) -> None:
    """An author cannot promote, and a signature over a version is none over a promotion of the same digest."""
    author = TrustPolicy(keys=(alice.trusted(Role.AUTHOR),))
    assert codes(author, alice.signs(role=Role.PROMOTER), role=Role.PROMOTER) == ["wrong_role", "below_threshold"]
    both = TrustPolicy(keys=(alice.trusted(Role.AUTHOR, Role.PROMOTER),))
    assert codes(both, alice.signs(role=Role.AUTHOR), role=Role.PROMOTER) == ["unsigned"]
    assert codes(both, alice.signs(role=Role.PROMOTER), role=Role.PROMOTER) == []


def test_a_signature_over_something_else_does_not_count(alice: Person) -> None:
    assert codes(TrustPolicy(keys=(alice.trusted(Role.AUTHOR),)), alice.signs(OTHER)) == ["unsigned"]


def forged(envelope: bytes, **changes: str) -> bytes:
    """The envelope with its first signature changed."""
    found = json.loads(envelope)
    found["signatures"][0].update(changes)
    return json.dumps(found).encode()


def test_a_signature_that_is_not_theirs_is_refused(alice: Person, bob: Person) -> None:
    """Bob signs and writes Alice's keyid on it; and Alice's own signature is put under another statement."""
    policy = TrustPolicy(keys=(alice.trusted(Role.AUTHOR),))
    assert codes(policy, forged(bob.signs(), keyid=alice.key.keyid)) == ["bad_signature", "below_threshold"]
    mine, other = json.loads(alice.signs(OTHER)), json.loads(alice.signs())
    moved = json.dumps({**other, "signatures": mine["signatures"]}).encode()
    assert codes(policy, moved) == ["bad_signature", "below_threshold"]


def test_two_of_two_must_be_two_people(alice: Person, bob: Person) -> None:
    policy = TrustPolicy(keys=(alice.trusted(Role.AUTHOR), bob.trusted(Role.AUTHOR)), authors_needed=2)
    assert codes(policy, alice.signs(), alice.signs()) == ["below_threshold"]
    assert codes(policy, alice.signs(), bob.signs()) == []


def test_windows_are_held_against_the_present(alice: Person) -> None:
    day = timedelta(days=1)
    policy = TrustPolicy(keys=(alice.trusted(Role.AUTHOR, begin=NOW - day, end=NOW + day),))
    assert codes(policy, alice.signs(), at=NOW) == []
    assert codes(policy, alice.signs(), at=NOW + 2 * day) == ["expired", "below_threshold"]
    assert codes(policy, alice.signs(), at=NOW - 2 * day) == ["not_yet_valid", "below_threshold"]


def test_a_signature_may_run_out_before_its_key(alice: Person) -> None:
    policy = TrustPolicy(keys=(alice.trusted(Role.AUTHOR),))
    short = alice.signs(end=NOW)
    assert codes(policy, short, at=NOW) == []
    assert codes(policy, short, at=NOW + timedelta(seconds=1)) == ["expired", "below_threshold"]


def test_rotation_needs_no_pause(alice: Person, bob: Person) -> None:
    """The new key is added, what is promoted is signed with it too, the old one runs out."""
    policy = TrustPolicy(keys=(alice.trusted(Role.AUTHOR, end=NOW), bob.trusted(Role.AUTHOR)))
    later = NOW + timedelta(days=1)
    assert codes(policy, alice.signs(), at=later) == ["expired", "below_threshold"]
    assert codes(policy, alice.signs(), bob.signs(), at=later) == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"", b"{}", b"[]", b"null", b"\xff", b'{"payload":"!","payloadType":"x","signatures":[]}',
        b'{"payload":"e30=","payloadType":"application/vnd.in-toto+json","signatures":[{"keyid":1,"sig":"AA=="}]}',
        b'{"payload":"e30=","payloadType":"application/vnd.in-toto+json","signatures":7}',
        b"[" * 100_000, b" " * (MAX_ENVELOPE_BYTES + 1),
    ],
)  # fmt: skip
def test_garbage_beside_a_signature_is_passed_over(alice: Person, garbage: bytes) -> None:
    policy = TrustPolicy(keys=(alice.trusted(Role.AUTHOR),))
    assert read_envelopes([garbage]) == []
    assert codes(policy, garbage, alice.signs(), garbage) == []


# -- the trust file ----------------------------------------------------------------------------------------------------


def test_a_trust_file_is_read_as_it_was_written(tmp_path: Path, alice: Person) -> None:
    policy = TrustPolicy(keys=(alice.trusted(Role.AUTHOR, Role.PROMOTER, end=NOW),))
    policy.save(tmp_path / "trust.json")
    assert TrustPolicy.load(tmp_path / "trust.json") == policy


def test_everything_wrong_with_a_trust_file_is_said_at_once(tmp_path: Path, alice: Person) -> None:
    path = tmp_path / "trust.json"
    double = alice.trusted(Role.AUTHOR).model_copy(update={"name": "also alice"})
    broken = alice.trusted(Role.AUTHOR).model_copy(update={"name": "nobody", "public": "no key"})
    backwards = Person("carol", SigningKey.generate()).trusted(Role.AUTHOR, begin=NOW, end=NOW)
    TrustPolicy(keys=(alice.trusted(Role.AUTHOR), double, broken, backwards)).save(path)
    with pytest.raises(SettingsError) as refused:
        TrustPolicy.load(path)
    for told in ("'alice' and 'also alice' are the same key", "'nobody': expected an Ed25519",
                 "'carol': expected not_after", "1 promoter signature(s) are needed, but only 0 key(s)"):  # fmt: skip
        assert told in str(refused.value)


@pytest.mark.parametrize(
    ("written", "told"),
    [(None, "cannot be read"), ("{", "Invalid JSON"), ('{"keyz": []}', "keyz"), ('{"authors_needed": 0}', "greater")],
)
def test_a_file_that_is_no_trust_file_is_refused(tmp_path: Path, written: str | None, told: str) -> None:
    path = tmp_path / "trust.json"
    if written is not None:
        path.write_text(written)
    with pytest.raises(SettingsError, match=told):
        TrustPolicy.load(path)


# -- keys and stores ---------------------------------------------------------------------------------------------------


def test_a_private_key_is_read_back_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    key = SigningKey.generate()
    public = key.save(tmp_path / "alice.key")
    assert (tmp_path / "alice.key").stat().st_mode & 0o777 == 0o600
    assert public.read_text() == key.public_pem()
    assert SigningKey.load(tmp_path / "alice.key").keyid == key.keyid
    with pytest.raises(EditsError, match="never overwritten"):
        SigningKey.generate().save(tmp_path / "alice.key")


@pytest.mark.parametrize("name", ["missing.key", "alice.pub", "empty.key"])
def test_a_file_that_is_no_private_key_is_named(tmp_path: Path, name: str) -> None:
    SigningKey.generate().save(tmp_path / "alice.key")
    (tmp_path / "empty.key").touch()
    with pytest.raises(EditsError, match=rf"{name} is not a private key.*vllm-edits keygen"):
        SigningKey.load(tmp_path / name)


def test_a_signing_store_signs_what_it_publishes_and_promotes(tmp_path: Path, alice: Person) -> None:
    """The signature over an entry is there as soon as the entry is; without a signer there is none."""
    plain = EditStore(str(tmp_path / "store"), create=True)
    store = EditStore(plain.url, signer=alice.key)
    policy = TrustPolicy(keys=(alice.trusted(Role.AUTHOR, Role.PROMOTER),))
    signed, unsigned = store.publish(bundle("1")), plain.publish(bundle("2"))
    entry, later = store.promote(f"polite@{signed}"), plain.promote(f"polite@{unsigned}")
    for role, digest, trusted in (
        (Role.AUTHOR, signed, True), (Role.AUTHOR, unsigned, False),
        (Role.PROMOTER, entry.digest, True), (Role.PROMOTER, later.digest, False),
    ):  # fmt: skip
        reasons = policy.check(role, digest, "it", store.signatures(digest))
        assert (not reasons) is trusted
