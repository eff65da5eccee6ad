"""A store that an earlier version wrote is read by this one, means the same, and is written byte for byte again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.store.golden.make import BEGIN, make
from vllm_edits.edit_store import Bundle, EditStore, Manifest, Published, Role, Scope, TrustPolicy, check
from vllm_edits.edit_store.bundle import LATER_FIELDS
from vllm_edits.edit_store.canonical import canonical_json, sha256
from vllm_edits.edit_store.compose import compose
from vllm_edits.edit_store.edits import Tensors
from vllm_edits.edit_store.errors import BundleRefused, EditsError, StoreCorrupt, StoreUnavailable
from vllm_edits.edit_store.experiments.experiment_log import Experiments, log_of
from vllm_edits.edit_store.signing import read_envelopes
from vllm_edits.edit_store.storage.store import manifest_key
from vllm_edits.edit_store.upkeep.audit import audit

GOLDEN = Path(__file__).parent / "golden"
EVERY_BYTE = "09d57298d55975480088b528bda5c8e2545fd910a24953076d1b1ac2b0da139a"
"""Digest of the digests of all its objects by key: nobody writes it anew without a word."""
VERSIONS = {
    "everything": "c86938feee95b9a4633154d06a2d9d84dd4dcfb2f23259525df5dd548aa20774",
    "polite 1": "39533aa864150d720a6f6276467f948cd06a2308d0314a8ff86216956db859b3",
    "polite 2": "c5b87d302a56df55e25bc0225a8e6e07e23899c7b7287739383810b2b9a995db",
    "polite+safe": "c7dfb4a4ae17936c98c65d560b00ac8b934d3d7dcc6f5b38cd4da674c0d462b3",
    "safe": "6a00a70ec09408ec504540e9aaec0a9c50c8659aa8f6207a5c981b8c3845d012",
}
PROMOTED = {
    ("everything", "prod"): "everything", ("polite", "prod"): "polite 2", ("polite", "staging.eu-1"): "polite 2",
    ("polite+safe", "prod"): "polite+safe", ("safe", "prod"): "safe",
}  # fmt: skip
JUNE = datetime(2026, 6, 1, tzinfo=UTC)

every_version = pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)


@pytest.fixture
def store(tmp_path: Path) -> EditStore:
    """A copy, since some of these tests write."""
    return EditStore(str(shutil.copytree(GOLDEN / "format-1", tmp_path / "store")))


def objects(folder: Path) -> dict[str, bytes]:
    """Everything in a store by its key."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def digest_of(found: dict[str, bytes]) -> str:
    return sha256(canonical_json({key: sha256(data) for key, data in found.items()}))


# -- what it is --------------------------------------------------------------------------------------------------------


def test_it_is_the_one_that_was_written_then() -> None:
    found = objects(GOLDEN / "format-1")
    assert digest_of(found) == EVERY_BYTE
    assert digest_of({**found, "store.json": found["store.json"] + b"\n"}) != EVERY_BYTE


def test_it_has_everything_of_its_format(store: EditStore) -> None:
    """What a format 1 may say, written down here: what came later is not in it."""
    manifests = [store.manifest(version) for version in VERSIONS.values()]
    edits = [edit for manifest in manifests for edit in manifest.edits]
    kinds = {"weight_delta", "scale", "low_rank", "gate", "subspace_filter", "offset"}
    assert {edit.kind for edit in edits} == kinds
    options = {(name, value) for edit in edits for name, value in edit if name not in {"site", "reads", "scope"}}
    assert options >= {
        ("layout", "dense"), ("layout", "sparse"), ("per", "head"), ("per", "channel"), ("bias", "scaled"), ("part", 2),
        ("normalise", True), ("onto", True), ("oblique", True), ("renorm", True), ("threshold", 5e-324),
        *(("activation", name) for name in ("relu", "jump_relu", "step", "silu", "sigmoid")),
    }  # fmt: skip
    assert {name for edit in edits for name, value in edit.scope if value != getattr(Scope(), name)} == {
        "segment", "first", "last", "tokens",
    }  # fmt: skip
    format_1 = Manifest.model_fields.keys() - set(LATER_FIELDS)
    assert all(any(getattr(manifest, name) for manifest in manifests) for name in format_1)
    done = {entry.operation for name, tag in store.all_tags() for entry in store.history(name, tag)}
    assert done == {"promote", "rollback", "pin", "unpin", "withdraw"}
    assert {entry.operation for entry in Experiments(store).history()} == {
        "create", "start", "widen", "hold", "resume", "withdraw", "promote", "stop",
    }  # fmt: skip


# -- it is read --------------------------------------------------------------------------------------------------------


def test_all_of_it_is_in_order_and_reading_changes_nothing(store: EditStore) -> None:
    found = audit(store)
    assert (found.findings, found.garbage) == ([], [])
    assert (found.versions, found.tags, found.entries, found.signatures) == (5, 6, 24, 28)
    assert digest_of(objects(Path(store.url))) == EVERY_BYTE


def test_every_tag_promotes_what_it_promoted(store: EditStore) -> None:
    heads = {(name, tag): entry for name, tags in store.heads().items() for tag, entry in tags.items()}
    assert {key: entry.version for key, entry in heads.items()} == {
        key: VERSIONS[name] for key, name in PROMOTED.items()
    }
    assert [key for key, entry in heads.items() if entry.pinned] == [("polite", "staging.eu-1")]
    gone = store.head("safe", "gone")
    assert gone is not None
    assert (gone.operation, gone.version) == ("withdraw", VERSIONS["safe"])
    assert [entry.operation for entry in store.history("polite")] == [
        "promote", "promote", "rollback", "pin", "unpin", "promote",
    ]  # fmt: skip


def test_its_tags_go_on_from_where_they_were(store: EditStore) -> None:
    assert store.rollback("polite").version == VERSIONS["polite 1"]
    assert store.rollback("safe", tag="gone").version == VERSIONS["safe"]
    with pytest.raises(EditsError, match="is pinned to"):
        store.promote(f"polite@{VERSIONS['polite 1']}", tag="staging.eu-1")
    assert audit(store).findings == []


def test_experiments_stand_as_they_stood(store: EditStore) -> None:
    standings, without_effect = Experiments(store).standings()
    assert without_effect == []
    tone, style = standings["tone"], standings["style"]
    assert (tone.status, tone.seed, tone.began_at) == ("running", "tone/2", BEGIN + timedelta(minutes=30))
    assert [tone.coverage(BEGIN + timedelta(minutes=30 + later)) for later in (0, 59, 60)] == [0.1, 0.1, 0.1 + 0.2]
    assert (style.status, style.promoted_arm) == ("promoted", "safe")
    assert tone.document.arm("milder").serves == f"polite@{VERSIONS['polite 1']}"


def test_signatures_count_for_what_they_counted(store: EditStore) -> None:
    """Alice wrote and promoted all but one; Bob approved one promotion, until July."""
    policy = TrustPolicy.load(GOLDEN / "trust.json")
    two = policy.model_copy(update={"promoters_needed": 2})

    def codes(role: Role, digest: str, policy: TrustPolicy = policy, at: datetime = JUNE) -> list[str]:
        return [reason.code for reason in policy.check(role, digest, "it", store.signatures(digest), at=at)]

    assert {name: codes(Role.AUTHOR, version) for name, version in VERSIONS.items()} == {
        "everything": [], "polite 1": [], "polite 2": [], "polite+safe": [], "safe": ["unsigned"],
    }  # fmt: skip
    heads = {key: store.head(*key) for key in PROMOTED}
    assert {key: codes(Role.PROMOTER, head.digest) for key, head in heads.items() if head} == {
        key: ["unsigned"] if key == ("safe", "prod") else [] for key in PROMOTED
    }
    head = heads["polite", "prod"]
    assert head is not None
    assert codes(Role.PROMOTER, head.digest, two) == []
    assert codes(Role.PROMOTER, head.digest, two, JUNE + timedelta(days=60)) == ["expired", "below_threshold"]
    assert [codes(Role.PROMOTER, entry.digest) for entry in Experiments(store).history()] == [[]] * 11


@every_version
def test_every_version_keeps_every_rule(store: EditStore, version: str) -> None:
    bundle = store.bundle(version)
    assert bundle.version == version
    check(bundle)
    with pytest.raises(BundleRefused, match="truncated or replaced"):
        check(Bundle(bundle.manifest, bundle.tensor_bytes[:-1] + b"\xff"))


# -- and written again -------------------------------------------------------------------------------------------------


def test_what_this_program_writes_is_the_same_store(tmp_path: Path) -> None:
    """The same numbers, texts, keys and times, through the API, from an empty folder on."""
    make(tmp_path)
    assert objects(tmp_path / "format-1") == objects(GOLDEN / "format-1")
    assert (tmp_path / "trust.json").read_bytes() == (GOLDEN / "trust.json").read_bytes()


@every_version
def test_a_manifest_that_was_read_is_written_as_it_was(store: EditStore, version: str) -> None:
    stored = store.backend.get(manifest_key(version))
    manifest = Manifest.from_bytes(stored)
    again = [manifest, Manifest.model_validate(manifest.model_dump()), Manifest.model_validate_json(stored)]
    assert {each.to_bytes() for each in again} == {stored}
    assert manifest.model_copy(update={"label": manifest.label + "x"}).to_bytes() != stored


def fields_of(edit: object, tensors: Tensors) -> Tensors:
    """An edit's own tensors by field, found by their names as FORMAT.md says."""
    part = "" if edit.part == 1 else f".{edit.part}"  # type: ignore[attr-defined]
    prefix = f"{edit.site}/{edit.kind}{part}/"  # type: ignore[attr-defined]
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


@every_version
def test_a_bundle_made_of_the_same_parts_is_the_same_version(store: EditStore, version: str) -> None:
    bundle = store.bundle(version)
    manifest, tensors = bundle.manifest, check(bundle)
    pairs = [(edit, fields_of(edit, tensors)) for edit in manifest.edits]
    kept = ("description", "label", "strength", "parts", "measurements", "created_at")

    def made(**changes: object) -> Bundle:
        fields = {name: getattr(manifest, name) for name in kept} | changes
        return Bundle.create(manifest.name, manifest.base, pairs, manifest.provenance, **fields)  # type: ignore[arg-type]

    assert (made().version, made().tensor_bytes) == (version, bundle.tensor_bytes)
    assert made(created_at=manifest.created_at + timedelta(microseconds=1)).version != version


def test_a_composition_of_the_same_versions_is_the_same_version(store: EditStore) -> None:
    parts = [store.bundle(VERSIONS[name]) for name in ("polite 2", "safe")]
    assert compose(parts).version == VERSIONS["polite+safe"]
    assert compose(parts[::-1]).version != VERSIONS["polite+safe"]


def entries(store: EditStore) -> Iterator[tuple[str, bytes]]:
    """Every entry of every log by its key, as this program writes what it has read."""
    logs = [("index", store.index()), ("experiments", log_of(store))]
    logs += [(f"tags/{name}/{tag}", store.tag_log(name, tag)) for name, tag in store.all_tags()]
    for folder, log in logs:
        for entry in log.history():
            again = type(entry).model_validate_json(entry.to_bytes())
            yield f"{folder}/{entry.sequence:020d}.json", again.to_bytes()


def test_an_entry_that_was_read_is_written_as_it_was(store: EditStore) -> None:
    stored = objects(GOLDEN / "format-1")
    logged = {key: data for key, data in stored.items() if key.startswith(("index/", "tags/", "experiments/"))}
    assert dict(entries(store)) == logged
    records = {key: data for key, data in stored.items() if key.startswith("versions/")}
    assert len(records) == len(VERSIONS)
    for data in records.values():
        assert canonical_json(Published.model_validate_json(data).model_dump(mode="json")) == data


# -- and what is not as it was is found --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "before", "after", "named"),
    [
        ("blobs/*/*/*", b"vllm-edits", b"vllm-edith", "version "),
        ("manifests/*/*/*", b'"part":1', b'"part":2', "version "),
        ("versions/safe/*", b'"version":"6', b'"version":"7', "versions of safe"),
        ("index/*1.json", b"Alice", b"Mallory", "index"),
        ("tags/polite/prod/*3.json", b"rollback", b"promote", "polite@prod"),
        ("experiments/*5.json", b"0.30000000000000004", b"0.30000000000000005", "experiments"),
        ("attestations/*/*/*/*", b'"sig":"', b'"sig":"0', "attestations/"),
    ],
)
def test_one_change_in_any_object_is_found(
    store: EditStore, files: str, before: bytes, after: bytes, named: str
) -> None:
    path = min(Path(store.url).glob(files))
    data = path.read_bytes()
    assert before in data
    path.write_bytes(data.replace(before, after, 1))
    assert audit(store).findings[0].object.startswith(named)


def test_a_store_of_another_format_is_refused(store: EditStore) -> None:
    path = Path(store.url) / "store.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    with pytest.raises(StoreUnavailable, match="expected format vllm-edits-store version 1"):
        EditStore(store.url)


def rekeyed(data: bytes) -> bytes:
    """The same object with its keys in the order of their code points, as `sort_keys` has them."""
    return json.dumps(json.loads(data), sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


RESPELLED: dict[str, Callable[[bytes], bytes]] = {
    "1e-7": lambda data: data.replace(b"1e-7", b"1e-07"),
    "1e-6": lambda data: data.replace(b"0.000001", b"1e-06"),
    "1e+21": lambda data: data.replace(b"1e+21", b"1e21"),
    "1e20": lambda data: data.replace(b"100000000000000000000", b"1e+20"),
    "0.1": lambda data: data.replace(b":0.1,", b":0.10,"),
    "100": lambda data: data.replace(b":100,", b":100.0,"),
    "0": lambda data: data.replace(b'"base":0,', b'"base":-0.0,'),
    "a third": lambda data: data.replace(b"0.3333333333333333", b"0.33333333333333331"),
    "5e-324": lambda data: data.replace(b"5e-324", b"4.9406564584124654e-324"),
    "escape": lambda data: data.replace("ö".encode(), b"\\u00f6"),
    "slash": lambda data: data.replace(b" / ", b" \\/ "),
    "space": lambda data: data.replace(b'":', b'": '),
    "order": rekeyed,
    "time": lambda data: data.replace(b".123456+05:30", b".123456000+05:30"),
    "repeated": lambda data: data.replace(b'"schema_version":1', b'"schema_version":1,"schema_version":1'),
}
"""Other spellings of what stands in a manifest: the same value, other bytes, another digest."""


@pytest.mark.parametrize("respell", RESPELLED.values(), ids=RESPELLED)
def test_the_same_manifest_spelled_otherwise_is_no_version(store: EditStore, respell: Callable[[bytes], bytes]) -> None:
    """Else one bundle had two versions. It lies where its digest says, so nothing but its spelling is wrong."""
    stored = store.backend.get(manifest_key(VERSIONS["everything"]))
    assert Manifest.model_validate_json(respell(stored)) == Manifest.from_bytes(stored)
    other = respell(stored)
    assert other != stored
    store.backend.put(manifest_key(sha256(other)), other)
    with pytest.raises(BundleRefused, match="expected canonical JSON"):
        store.manifest(sha256(other))


@pytest.mark.parametrize("respell", ["1e-7", "1e+21", "0.1", "a third", "5e-324", "escape", "slash", "space"])
def test_the_same_entry_spelled_otherwise_is_no_entry(store: EditStore, respell: str) -> None:
    path = Path(store.url) / "experiments" / f"{1:020d}.json"
    data = path.read_bytes()
    other = RESPELLED[respell](data)
    assert other != data
    path.write_bytes(other)
    with pytest.raises(StoreCorrupt, match="expected canonical JSON"):
        Experiments(store).history()


def test_a_signature_under_another_name_is_not_believed(store: EditStore) -> None:
    """Both signatures over one promotion, each with Alice's key named in it: one of them is hers."""
    policy = TrustPolicy.load(GOLDEN / "trust.json")
    alice, bob = (trusted.key.keyid.encode() for trusted in policy.keys)
    head = store.head("polite")
    assert head is not None

    def codes(*envelopes: bytes) -> list[str]:
        return [
            each.code for each in policy.check(Role.PROMOTER, head.digest, "it", read_envelopes(envelopes), at=JUNE)
        ]

    hers, his = sorted(store.attestations(head.digest), key=lambda envelope: bob in envelope)
    assert alice in hers
    assert codes(hers) == codes(his) == []
    assert codes(his.replace(bob, alice)) == ["bad_signature", "below_threshold"]
