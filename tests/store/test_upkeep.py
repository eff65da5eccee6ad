"""Keeping a store healthy: whatever is damaged is found, garbage goes and nothing else, versions travel whole."""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.fakes import BASE, FlakyBackend
from tests.support.store import PROVENANCE, WHEN, bundle, keys, promoted
from vllm_edits.edit_store import (
    Bundle,
    EditStore,
    LowRank,
    Offset,
    Role,
    Scale,
    SigningKey,
    SubspaceFilter,
    TrustPolicy,
)
from vllm_edits.edit_store.compare import compare
from vllm_edits.edit_store.errors import BundleRefused, Conflict, EditsError, NotFound, StoreCorrupt
from vllm_edits.edit_store.storage.intents import condemned_key, relying_on
from vllm_edits.edit_store.storage.store import blob_key, manifest_key, version_key
from vllm_edits.edit_store.upkeep.audit import audit
from vllm_edits.edit_store.upkeep.collect import collect, plan
from vllm_edits.edit_store.upkeep.transfer import copy, export, read_export

HOUR = 3600


@pytest.fixture
def store(tmp_path: Path) -> EditStore:
    return EditStore(str(tmp_path / "store"), create=True)


def path_of(store: EditStore, key: str) -> Path:
    return Path(store.url, key)


def everything(store: EditStore) -> dict[str, bytes]:
    root = Path(store.url)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# -- verify ------------------------------------------------------------------------------------------------------------


def test_a_healthy_store_is_clean_and_left_alone(store: EditStore) -> None:
    signer = SigningKey.generate()
    signing = EditStore(store.url, signer=signer)
    promoted(signing, "1", "2")
    before = everything(store)
    found = audit(store)
    assert found.clean
    assert not found.garbage
    assert (found.versions, found.tags, found.entries, found.signatures) == (2, 1, 2, 4)
    assert found.bytes == 2 * len(bundle().tensor_bytes)
    assert everything(store) == before


Damage = Callable[[EditStore, str], None]


def flip_blob(store: EditStore, version: str) -> None:
    path = path_of(store, blob_key(store.manifest(version).tensors.sha256))
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")


def drop_blob(store: EditStore, version: str) -> None:
    path_of(store, blob_key(store.manifest(version).tensors.sha256)).unlink()


def change_manifest(store: EditStore, version: str) -> None:
    path = path_of(store, manifest_key(version))
    path.write_bytes(path.read_bytes().replace(b'"label":"2"', b'"label":"3"'))


def drop_manifest(store: EditStore, version: str) -> None:
    path_of(store, manifest_key(version)).unlink()


def drop_record(store: EditStore, version: str) -> None:
    path_of(store, version_key("polite", version)).unlink()


def garble_record(store: EditStore, version: str) -> None:
    path_of(store, version_key("polite", version)).write_text("{}")


def cut_history(store: EditStore, _: str) -> None:
    path_of(store, "tags/polite/prod/00000000000000000001.json").unlink()


def rewrite_history(store: EditStore, _: str) -> None:
    path = path_of(store, "tags/polite/prod/00000000000000000001.json")
    path.write_bytes(path.read_bytes().replace(b'"reason":""', b'"reason":"?"'))


def forget_tag(store: EditStore, _: str) -> None:
    path_of(store, "index/00000000000000000001.json").unlink()


def garble_signature(store: EditStore, _: str) -> None:
    path = next(Path(store.url, "attestations").rglob("*.json"))
    path.write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [
        flip_blob, drop_blob, change_manifest, drop_manifest, drop_record, garble_record, cut_history, rewrite_history,
        forget_tag, garble_signature,
    ],
)  # fmt: skip
def test_every_damage_is_found_and_says_what_mends_it(store: EditStore, damage: Damage) -> None:
    _, second = promoted(EditStore(store.url, signer=SigningKey.generate()), "1", "2")
    damage(store, second)
    findings = audit(store).findings
    assert findings
    assert all(finding.object and finding.problem and finding.fix for finding in findings)


@pytest.mark.parametrize("damage", [flip_blob, drop_blob, change_manifest, drop_manifest, drop_record])
def test_publishing_again_repairs_a_version(store: EditStore, damage: Damage) -> None:
    _, second = promoted(store, "1", "2")
    damage(store, second)
    assert not audit(store).clean
    store.publish(bundle("2"))
    assert audit(store).clean


# -- gc ----------------------------------------------------------------------------------------------------------------


def age(store: EditStore, hours: float = 48) -> None:
    """Make everything in the store older."""
    for path in Path(store.url).rglob("*"):
        if path.is_file():
            moment = path.stat().st_mtime - hours * HOUR
            os.utime(path, (moment, moment))


def numbered(number: int) -> Bundle:
    edits = [(Offset(site="layers.0.resid"), {"vector": np.full(8, float(number))})]
    return Bundle.create("polite", BASE, edits, PROVENANCE, created_at=WHEN)


def test_what_no_history_names_goes_and_nothing_else(store: EditStore) -> None:
    """Also versions that were rolled back stay: somebody may roll forward again."""
    kept = [store.publish(numbered(number)) for number in range(2)]
    for version in kept:
        store.promote(f"polite@{version}")
    store.rollback("polite")
    before = keys(store)
    dead = store.publish(numbered(2))
    age(store)
    young = store.publish(numbered(3))
    found = plan(store)
    assert found.versions == (dead,)
    assert keys(store) > before, "a plan deletes nothing"
    assert collect(store).versions == (dead,)
    assert set(store.version_digests("polite")) == {*kept, young}
    assert audit(store).clean
    assert not audit(store).garbage
    assert before < keys(store)
    assert collect(store).items == ()


def test_a_blob_that_another_version_shares_stays(store: EditStore) -> None:
    (promoted_version,) = promoted(store, "1")
    dead = store.publish(bundle("2"))
    age(store)
    assert collect(store).versions == (dead,)
    assert store.bundle(promoted_version).tensor_bytes == bundle().tensor_bytes


def test_what_crashed_writers_left_goes_with_age(store: EditStore) -> None:
    promoted(store, "1")
    store.backend.put(blob_key("c" * 64), b"half a publication")
    store.backend.put("intents/dead.json", b'["' + b"c" * 64 + b'"]')
    Path(store.url, ".staging", "4711-dead").write_bytes(b"?")
    assert collect(store).items == ()
    age(store)
    collect(store)
    collect(store)  # the first run spares what the dead writer's intent names, and forgets the intent
    assert not list(Path(store.url, ".staging").iterdir())
    assert not list(store.backend.list("intents/"))
    assert blob_key("c" * 64) not in keys(store)
    assert audit(store).clean


def test_a_writer_holds_a_collection_off(store: EditStore) -> None:
    dead = store.publish(numbered(0))
    age(store)
    with relying_on(store.backend, [dead]):
        assert collect(store).versions == ()
        assert store.bundle(dead)
    assert collect(store).versions == (dead,)


def test_a_collection_holds_writers_off(store: EditStore) -> None:
    """A mark left by a run that was killed says how to go on, and the next run takes it away."""
    version = store.publish(bundle())
    store.backend.put(condemned_key(version), b"")
    for write in (lambda: store.promote(f"polite@{version}"), lambda: store.publish(bundle())):
        with pytest.raises(Conflict, match="vllm-edits gc --run"):
            write()
    assert store.head("polite") is None
    collect(store)
    store.promote(f"polite@{version}")


class Interrupting(FlakyBackend):
    """Runs something at the moment before a given kind of write."""

    def __init__(self, inner: object, prefix: str, act: Callable[[], object]) -> None:
        super().__init__(inner)  # type: ignore[arg-type]
        self.prefix, self.act = prefix, act

    def delete(self, key: str) -> None:
        self._maybe(key)
        super().delete(key)

    def put(self, key: str, data: bytes) -> None:
        self._maybe(key)
        super().put(key, data)

    def _maybe(self, key: str) -> None:
        if key.startswith(self.prefix):
            act, self.act = self.act, lambda: None
            act()


@pytest.mark.parametrize("moment", ["condemned/", "versions/", "manifests/"])
def test_a_promotion_in_the_middle_of_a_collection_is_whole_or_refused(store: EditStore, moment: str) -> None:
    version = store.publish(numbered(0))
    age(store)
    outcome: list[str] = []

    def promote() -> None:
        try:
            EditStore(store.url).promote(f"polite@{version}")
            outcome.append("promoted")
        except (Conflict, NotFound) as error:
            outcome.append(type(error).__name__)

    collecting = EditStore(store.url)
    collecting.backend = Interrupting(collecting.backend, moment, promote)  # type: ignore[assignment]
    collect(collecting)
    assert outcome == (["promoted"] if moment == "condemned/" else ["Conflict"] if moment == "versions/" else outcome)
    assert audit(store).clean
    head = store.head("polite")
    assert (head is not None) is (outcome == ["promoted"])
    if head is not None:
        assert store.bundle(version)


def test_a_broken_history_stops_a_collection(store: EditStore) -> None:
    """What it named cannot be known, so nothing may be deleted."""
    promoted(store, "1", "2")
    store.publish(numbered(7))
    cut_history(store, "")
    age(store)
    before = everything(store)
    with pytest.raises(StoreCorrupt):
        collect(store)
    assert everything(store) == before


# -- copy, export, import ----------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> EditStore:
    return EditStore(f"memory://{tmp_path}/other", create=True)


def test_a_copy_has_everything_a_version_needs(store: EditStore, other: EditStore) -> None:
    signer = SigningKey.generate()
    version = EditStore(store.url, signer=signer).publish(bundle())
    assert copy(store, other, ["polite@" + version[:8]]) == [f"polite@{version}"]
    assert other.bundle(version).tensor_bytes == bundle().tensor_bytes
    assert other.versions("polite") == store.versions("polite")
    assert other.attestations(version) == store.attestations(version) != []
    assert other.head("polite") is None, "what is promoted is each store's own"
    assert audit(other).clean
    assert copy(store, other, ["polite@" + version[:8]]) == [f"polite@{version}"]


def test_a_copy_tells_its_progress_in_bytes(
    store: EditStore, other: EditStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_edits.edit_store.backends.protocol.PIECE_BYTES", 100)
    references = [f"polite@{store.publish(bundle(label))}" for label in ("one", "two")]
    size = len(bundle().tensor_bytes)
    told: list[tuple[str, int, int]] = []
    copy(store, other, references, lambda *what: told.append(what))
    assert {total for _, _, total in told} == {2 * size}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[0][1:] == (0, 2 * size)
    assert told[-1] == (references[1], 2 * size, 2 * size)
    assert len(told) == 6, "positive control: in pieces"
    assert [what for what, _, _ in told] == sorted((what for what, _, _ in told), key=references.index)


def test_an_export_is_one_file_with_everything(store: EditStore, other: EditStore, tmp_path: Path) -> None:
    version = EditStore(store.url, signer=SigningKey.generate()).publish(bundle())
    file = tmp_path / "polite.edits.tar"
    assert export(store, f"polite@{version}", file) == version
    package = read_export(file)
    assert package.put(other) == version
    assert other.versions("polite") == store.versions("polite")
    assert other.attestations(version) == store.attestations(version) != []
    with pytest.raises(EditsError, match="is not overwritten"):
        export(store, f"polite@{version}", file)
    export(store, f"polite@{version}", tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == file.read_bytes()


def repacked(file: Path, change: Callable[[dict[str, bytes]], None], kind: bytes = tarfile.REGTYPE) -> Path:
    """The exported file with its members changed."""
    with tarfile.open(file) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    change(members)
    changed = file.with_name("changed.tar")
    with tarfile.open(changed, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(data), kind
            archive.addfile(member, io.BytesIO(data))
    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda members: members.update({"edits.safetensors": members["edits.safetensors"][:-1] + b"\0"}), "digest"),
        (lambda members: members.update({"../../etc/passwd": b"x"}), "unexpected file"),
        (lambda members: members.update({"attestations/000.json": b" " * 100_000}), "at most"),
        (lambda members: members.update({"published.json": b"{}"}), "published.json"),
        (lambda members: members.update({"manifest.json": b"[" * 100_000}), "expected JSON"),
        (lambda members: members.pop("manifest.json"), "missing: manifest.json"),
        (lambda members: members.clear(), "expected published.json"),
    ],
)
def test_a_changed_export_is_refused(
    store: EditStore, tmp_path: Path, change: Callable[[dict[str, bytes]], None], said: str
) -> None:
    file = tmp_path / "polite.edits.tar"
    export(store, f"polite@{store.publish(bundle())}", file)
    assert read_export(repacked(file, lambda _: None)), "positive control"
    with pytest.raises(BundleRefused, match=said):
        read_export(repacked(file, change))


@pytest.mark.parametrize("data", [b"", b"no tar", b"\x1f\x8b\x08\x00" + b"\0" * 600, b"\0" * 10240])
def test_a_file_that_is_no_export_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "it.tar").write_bytes(data)
    with pytest.raises(BundleRefused):
        read_export(tmp_path / "it.tar")


def test_a_link_in_an_export_is_refused(store: EditStore, tmp_path: Path) -> None:
    file = tmp_path / "polite.edits.tar"
    export(store, f"polite@{store.publish(bundle())}", file)
    with pytest.raises(BundleRefused, match="unexpected file"):
        read_export(repacked(file, lambda _: None, tarfile.SYMTYPE))


# -- pin ---------------------------------------------------------------------------------------------------------------


def test_a_pinned_tag_does_not_move(store: EditStore) -> None:
    first, second = promoted(store, "1", "2")
    store.pin("polite", reason="incident 7", actor="nina")
    for move in (lambda: store.promote(f"polite@{first}"), lambda: store.rollback("polite")):
        with pytest.raises(Conflict, match=r"pinned to .* by nina .*: incident 7.*pin polite --tag prod --remove"):
            move()
    assert store.resolve("polite") == second
    store.promote(f"polite@{first}", tag="beta")
    store.pin("polite", remove=True)
    assert store.rollback("polite").version == first
    assert [entry.operation for entry in store.history("polite")] == ["promote", "promote", "pin", "unpin", "rollback"]


def test_a_pinned_tag_is_not_withdrawn_and_a_withdrawn_one_not_pinned(store: EditStore) -> None:
    """A pin would bring it back."""
    promoted(store, "1")
    store.pin("polite")
    with pytest.raises(Conflict, match="is pinned to"):
        store.withdraw("polite")
    store.pin("polite", remove=True)
    store.withdraw("polite", reason="incident 8", actor="nina")
    with pytest.raises(NotFound, match=r"was withdrawn by nina at .*: incident 8\. Serve it again with"):
        store.pin("polite")


def test_a_pin_twice_or_of_nothing_is_refused(store: EditStore) -> None:
    with pytest.raises(NotFound, match="nothing to pin"):
        store.pin("polite")
    promoted(store, "1")
    with pytest.raises(Conflict, match="not pinned"):
        store.pin("polite", remove=True)
    store.pin("polite")
    with pytest.raises(Conflict, match="pinned already"):
        store.pin("polite")


# -- diff --------------------------------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(0)
READ, WRITE = RANDOM.normal(size=(2, 16)), RANDOM.normal(size=(2, 8))
BASIS = np.linalg.qr(RANDOM.normal(size=(8, 2)))[0].T
TURN = np.linalg.qr(RANDOM.normal(size=(2, 2)))[0]
MEAN = RANDOM.normal(size=8)


def of(edit: object, **fields: object) -> Bundle:
    return Bundle.create("polite", BASE, [(edit, fields)], PROVENANCE, created_at=WHEN)  # type: ignore[list-item]


LOW_RANK = LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=2)
FILTER = SubspaceFilter(site="layers.0.resid", rank=2)


@pytest.mark.parametrize(
    ("old", "new", "moved"),
    [
        (of(LOW_RANK, read=READ, write=WRITE), of(LOW_RANK, read=READ * 2, write=WRITE / 2), 0.0),
        (of(LOW_RANK, read=READ, write=WRITE), of(LOW_RANK, read=READ, write=WRITE * 1.5), 0.5),
        (of(FILTER, basis=BASIS, mean=MEAN), of(FILTER, basis=TURN @ BASIS, mean=MEAN), 0.0),
        (of(Offset(site="layers.0.resid"), vector=MEAN), of(Offset(site="layers.0.resid"), vector=-MEAN), 2.0),
        (of(Scale(site="layers.0.attn.z"), factor=[1, 1]), of(Scale(site="layers.0.attn.z"), factor=[1, 0]), 0.5**0.5),
    ],
)
def test_how_far_an_edit_moved_is_what_it_does_not_how_it_is_written(old: Bundle, new: Bundle, moved: float) -> None:
    (change,) = compare(old, new).edits
    assert change.moved == pytest.approx(moved, abs=1e-5)
    assert change.change == ("changed" if moved else "same")


def test_a_difference_names_what_came_went_and_changed() -> None:
    old = of(Offset(site="layers.0.resid"), vector=MEAN)
    new = Bundle.create(
        "polite", BASE, [(LOW_RANK, {"read": READ, "write": WRITE})], PROVENANCE, created_at=WHEN, label="2"
    )
    found = compare(old, new)
    assert {(change.site, change.change) for change in found.edits} == {
        ("layers.0.resid", "removed"), ("layers.0.mlp.out", "added"),
    }  # fmt: skip
    assert found.fields == {"label": ("", "2")}


def test_ages_are_real(store: EditStore) -> None:
    """The helper above moves the clock that a collection looks at."""
    store.publish(bundle())
    age(store)
    assert all(item.modified < time.time() - 47 * HOUR for item in store.backend.list("blobs/"))


def test_policies_see_copied_signatures(store: EditStore, other: EditStore) -> None:
    signer = SigningKey.generate()
    version = EditStore(store.url, signer=signer).publish(bundle())
    copy(store, other, [f"polite@{version}"])
    from vllm_edits.edit_store import TrustedKey

    key = TrustedKey(name="a", public=signer.public_pem(), roles=(Role.AUTHOR, Role.PROMOTER))
    assert not TrustPolicy(keys=(key,)).check(Role.AUTHOR, version, "it", other.signatures(version))
