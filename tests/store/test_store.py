"""The versioned store: what is published stays, what is promoted is the end of a chain, and who is late is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bundles import random_bundle
from tests.support.fakes import BASE, FlakyBackend, Overtaken, cheaply
from tests.support.store import bundle, create, keeps_the_protocol, keys, promoted
from vllm_edits.edit_store import Bundle, EditStore, TagEntry, check
from vllm_edits.edit_store.backends import Backend, LocalFolder, open_backend
from vllm_edits.edit_store.canonical import canonical_json, sha256
from vllm_edits.edit_store.errors import (
    AmbiguousVersion,
    BundleRefused,
    Conflict,
    EditsError,
    NotFound,
    StoreCorrupt,
    StoreUnavailable,
)


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path}"


@pytest.fixture
def store(url: str) -> EditStore:
    return EditStore(url, create=True)


@pytest.fixture
def folder(tmp_path: Path) -> EditStore:
    """A store whose files can be looked at."""
    return EditStore(str(tmp_path / "store"), create=True)


# -- bundles -----------------------------------------------------------------------------------------------------------


def test_a_published_bundle_comes_back_as_it_was(store: EditStore, url: str) -> None:
    """By whoever opens the store, with its record; nothing is promoted by publishing."""
    made = bundle()
    version = store.publish(made, actor="ada")
    again = EditStore(url)
    assert version == made.version
    assert again.bundle(version) == made
    assert check(again.bundle(version), BASE).keys() == {"layers.0.resid/offset/vector"}
    assert [(record.version, record.label, record.actor) for record in again.versions("polite")] == [
        (version, "1", "ada")
    ]
    assert again.names() == ["polite"]
    assert again.heads() == {}


@pytest.mark.parametrize("url", ["folder", "memory"], indirect=True)
def test_publishing_twice_is_harmless(store: EditStore) -> None:
    """Objects are written once: the first record stays."""
    store.publish(bundle(), actor="ada")
    before = keys(store)
    store.publish(bundle(), actor="bob")
    assert keys(store) == before
    assert [record.actor for record in store.versions("polite")] == ["ada"]


def test_a_refused_bundle_leaves_nothing_behind(store: EditStore) -> None:
    made = bundle()
    with pytest.raises(BundleRefused):
        store.publish(Bundle(made.manifest, made.tensor_bytes[:-4]))
    assert keys(store) == set()


def test_the_same_bundle_made_twice_is_the_same_version() -> None:
    """Identity is content: nothing of the process that made it is in it."""
    assert len({create().version for _ in range(30)}) == 1


def test_versions_that_share_numbers_share_a_blob(store: EditStore) -> None:
    for label in "123":
        store.publish(bundle(label))
    assert len([key for key in keys(store) if key.startswith("blobs/")]) == 1
    assert len(store.versions("polite")) == 3


# -- tags --------------------------------------------------------------------------------------------------------------


def test_promoting_appends_to_a_chained_history(store: EditStore) -> None:
    first, second = store.publish(bundle("1")), store.publish(bundle("2"))
    store.promote(f"polite@{first}", actor="ada", reason="ready")
    store.promote(f"polite@{second[:6]}")
    store.promote("polite@prod", tag="beta")
    entries = store.history("polite")
    assert [(entry.sequence, entry.operation, entry.version) for entry in entries] == [
        (1, "promote", first),
        (2, "promote", second),
    ]
    assert (entries[0].actor, entries[0].reason, entries[0].previous_sha256) == ("ada", "ready", None)
    assert entries[1].previous_sha256 == sha256(entries[0].to_bytes())
    assert store.heads() == {"polite": {"prod": entries[1], "beta": store.history("polite", "beta")[0]}}
    assert store.resolve("polite") == store.resolve("polite@beta") == second
    assert store.tags("polite") == ["beta", "prod"]


operations = st.lists(st.sampled_from(["1", "2", "3", "rollback", "withdraw"]), max_size=12)


@cheaply
@given(operations)
def test_a_rollback_undoes_the_last_promotion_that_is_not_undone(operations: list[str]) -> None:
    """Against a stack: promoting pushes, rolling back pops, the bottom cannot be popped. Nothing is ever deleted.

    A withdrawal lies on top of the stack until it is rolled back or something is promoted in its place.
    """
    store = EditStore(f"memory://{next(numbers)}", create=True)
    versions = {label: store.publish(bundle(label)) for label in "123"}
    stack: list[str] = []
    done = 0
    for operation in operations:
        if operation == "withdraw":
            if stack[-1:] in ([], ["withdrawn"]):
                with pytest.raises(NotFound, match="nothing to withdraw" if not stack else "was withdrawn by"):
                    store.withdraw("polite")
                continue
            assert store.withdraw("polite").version == versions[stack[-1]]
            stack.append("withdrawn")
        elif operation != "rollback":
            store.promote(f"polite@{versions[operation]}")
            stack = [each for each in stack if each != "withdrawn"]
            stack += [operation] if stack[-1:] != [operation] else []
        elif len(stack) < 2:
            with pytest.raises(NotFound, match="no earlier version"):
                store.rollback("polite")
            continue
        else:
            stack.pop()
            assert store.rollback("polite").operation == "rollback"
        done += 1
        if stack[-1] == "withdrawn":
            assert store.heads() == {}
            with pytest.raises(NotFound, match=r"was withdrawn by .* vllm-edits rollback polite --tag prod"):
                store.resolve("polite")
        else:
            assert store.resolve("polite") == versions[stack[-1]]
    assert [entry.sequence for entry in store.history("polite")] == list(range(1, done + 1))


numbers = count()


@pytest.mark.parametrize(
    ("reference", "tag", "said"),
    [
        ("polit", "prod", "Did you mean 'polite'"),
        ("polite@bta", "prod", "Did you mean 'beta'"),
        ("polite@bta", "prod", "vllm-edits promote polite@<version> --tag bta"),
        ("polite@ffffff", "prod", "has no version ffffff"),
        ("Polite", "prod", "is not the name of a variant"),
        ("polite@", "prod", "is not the name of a variant"),
        ("../polite", "prod", "is not the name of a variant"),
        ("polite@beta", "Prod", "cannot be a tag"),
        ("polite@beta", "../prod", "cannot be a tag"),
        ("polite@beta", "deadbeef", "cannot be a tag"),
    ],
)
def test_an_unknown_or_impossible_name_is_refused_and_nothing_written(
    store: EditStore, reference: str, tag: str, said: str
) -> None:
    store.promote(f"polite@{store.publish(bundle())}", tag="beta")
    before = keys(store)
    with pytest.raises(NotFound) as refusal:
        store.promote(reference, tag=tag)
    assert said in str(refusal.value)
    assert keys(store) == before
    store.promote("polite@beta", tag="prod")


@pytest.mark.parametrize(
    "look",
    [
        lambda store: store.rollback("polite", tag="../../tags"),
        lambda store: store.rollback("../polite"),
        lambda store: store.history("polite", "../prod"),
        lambda store: store.versions("../versions"),
    ],
)
def test_names_that_are_no_names_are_not_found_wherever_they_are_given(
    folder: EditStore, look: Callable[[EditStore], Any]
) -> None:
    promoted(folder, "1", "2")
    with pytest.raises(NotFound):
        look(folder)


def labels_with_equal_digits() -> tuple[str, str]:
    """Two labels whose versions share their first six digits: a few thousand tries, by the birthday paradox."""
    data = bundle("0000000").manifest.to_bytes()
    seen: dict[str, str] = {}
    for number in count():
        label = f"{number:07}"
        digits = sha256(data.replace(b'"label":"0000000"', f'"label":"{label}"'.encode()))[:6]
        if digits in seen:
            return seen[digits], label
        seen[digits] = label
    raise AssertionError


def test_a_version_may_be_abbreviated_until_it_is_ambiguous(store: EditStore) -> None:
    first, second = (store.publish(bundle(label)) for label in labels_with_equal_digits())
    assert first[:6] == second[:6]
    with pytest.raises(AmbiguousVersion, match=first[:16]):
        store.resolve(f"polite@{first[:6]}")
    for version in (first, second):
        assert store.resolve(f"polite@{version[:20]}") == store.resolve(f"polite@{version}") == version
    with pytest.raises(NotFound, match="nothing is promoted as"):
        store.resolve(f"polite@{first[:5]}")  # fewer than six digits read as a tag


# -- what somebody else did to the bytes -------------------------------------------------------------------------------


def entry_path(store: EditStore, sequence: int) -> Path:
    return Path(store.url) / f"tags/polite/prod/{sequence:020d}.json"


def rewrite(path: Path, **changes: Any) -> None:
    entry = TagEntry.model_validate_json(path.read_bytes())
    path.write_bytes(entry.model_copy(update=changes).to_bytes())


@pytest.mark.parametrize(
    "tamper",
    [
        lambda store: rewrite(entry_path(store, 1), reason="another"),
        lambda store: rewrite(entry_path(store, 2), version="f" * 64),
        lambda store: rewrite(entry_path(store, 2), name="other"),
        lambda store: rewrite(entry_path(store, 3), previous_sha256=None),
        lambda store: rewrite(entry_path(store, 3), sequence=2),
        lambda store: entry_path(store, 1).unlink(),
        lambda store: entry_path(store, 2).unlink(),
        lambda store: entry_path(store, 2).write_bytes(entry_path(store, 1).read_bytes()),
        lambda store: entry_path(store, 3).rename(entry_path(store, 4)),
        lambda store: entry_path(store, 2).write_bytes(b"{}"),
        lambda store: entry_path(store, 3).write_bytes(b""),
    ],
)
def test_a_rewritten_or_missing_entry_breaks_the_chain(folder: EditStore, tamper: Callable[[EditStore], Any]) -> None:
    """History and rollback refuse it; before, both worked (positive control)."""
    promoted(folder, "1", "2", "3")
    assert len(folder.history("polite")) == 3
    tamper(folder)
    with pytest.raises(StoreCorrupt, match="polite@prod"):
        folder.history("polite")
    with pytest.raises(StoreCorrupt, match="polite@prod"):
        folder.rollback("polite")


def test_replaced_bytes_are_never_taken_for_a_version(folder: EditStore) -> None:
    """Neither manifest nor numbers: a promotion of what no longer matches its digest is refused."""
    (version,) = promoted(folder, "1")
    root = Path(folder.url)
    manifest, blob = next(root.glob("manifests/sha256/*/*")), next(root.glob("blobs/sha256/*/*"))
    good = manifest.read_bytes()
    manifest.write_bytes(good.replace(b'"label":"1"', b'"label":"2"'))
    with pytest.raises(StoreCorrupt, match=version[:12]):
        folder.bundle(version)
    manifest.write_bytes(good)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleRefused, match="digest"):
        folder.promote(f"polite@{version}")
    blob.unlink()
    with pytest.raises(NotFound, match="tensors of version"):
        folder.promote(f"polite@{version}")
    assert len(folder.history("polite")) == 1


def test_a_foreign_file_among_the_entries_is_harmless_or_named(folder: EditStore) -> None:
    """A copy tool's or a desktop's droppings must not end every look at the store."""
    (version,) = promoted(folder, "1")
    (Path(folder.url) / "tags/polite/prod/.DS_Store").touch()
    try:
        assert folder.heads()["polite"]["prod"].version == version
    except EditsError as error:
        assert ".DS_Store" in str(error)  # noqa: PT017  either is right


# -- several at once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["promote", "rollback"])
def test_who_appends_second_is_told_and_changes_nothing(store: EditStore, url: str, operation: str) -> None:
    versions = promoted(store, "1", "2")
    late = Overtaken(url)
    late.overtake = lambda: store.promote(f"polite@{versions[0]}")
    with pytest.raises(Conflict, match="vllm-edits history polite --tag prod"):
        late.promote(f"polite@{versions[1]}") if operation == "promote" else late.rollback("polite")
    assert [entry.version for entry in store.history("polite")] == [*versions, versions[0]]
    late.promote(f"polite@{versions[1]}")


def test_a_rollback_overtaken_by_a_promotion_is_a_conflict(store: EditStore, url: str) -> None:
    """Who rolls back 2 to 1 must not undo a promotion of 3 that he never saw."""
    first, second, third = *promoted(store, "1", "2"), store.publish(bundle("3"))
    late = Overtaken(url)
    late.overtake = lambda: store.promote(f"polite@{third}")
    with pytest.raises(Conflict):
        late.rollback("polite")
    assert [entry.version for entry in store.history("polite")] == [first, second, third]


RACER = """
import sys
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.errors import Conflict
store, won = EditStore(sys.argv[1]), 0
print("ready", flush=True)
sys.stdin.readline()
for _ in range(6):
    try:
        store.promote(sys.argv[2])
        won += 1
    except Conflict:
        pass
print(won)
"""


@pytest.mark.long
def test_eight_processes_promote_at_once_and_every_win_is_an_entry(folder: EditStore) -> None:
    """No entry is lost, none is written twice, the chain holds, and nothing is left in staging."""
    version = folder.publish(bundle())
    command = [sys.executable, "-c", RACER, folder.url, f"polite@{version}"]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    entries = folder.history("polite")
    assert len(entries) == sum(won) >= 6
    assert len({entry.nonce for entry in entries}) == len(entries)
    assert list(Path(folder.url, ".staging").iterdir()) == []


class Crashing(FlakyBackend):
    """A backend whose process dies before its n-th write."""

    def __init__(self, inner: Backend, writes: int) -> None:
        super().__init__(inner)
        self.writes = writes

    def create(self, key: str, data: bytes) -> None:
        if self.writes == 0:
            raise KeyboardInterrupt
        self.writes -= 1
        super().create(key, data)

    def put(self, key: str, data: bytes) -> None:
        if self.writes == 0:
            raise KeyboardInterrupt
        self.writes -= 1
        super().put(key, data)


@pytest.mark.parametrize("writes", range(7))
def test_a_crash_between_any_two_writes_leaves_the_old_or_the_new(store: EditStore, url: str, writes: int) -> None:
    """What was promoted stays promoted and whole, and doing it again works."""
    (old,) = promoted(store, "1")
    new = bundle("2")
    dying = EditStore(url)
    dying.backend = Crashing(dying.backend, writes)
    if writes < 6:
        with pytest.raises(KeyboardInterrupt):
            dying.promote(f"polite@{dying.publish(new)}")
    else:  # the six writes of a publication with its promotion (positive control)
        dying.promote(f"polite@{dying.publish(new)}")
    after = EditStore(url)
    assert after.resolve("polite") == (old if writes < 6 else new.version)
    check(after.bundle(after.resolve("polite")))
    assert len(after.history("polite")) == (1 if writes < 6 else 2)
    after.promote(f"polite@{after.publish(new)}")
    assert after.resolve("polite") == new.version


def test_half_written_files_of_a_crash_are_never_seen(folder: EditStore) -> None:
    """They lie in staging, where nobody looks; objects appear by one atomic link."""
    (version,) = promoted(folder, "1")
    staging = Path(folder.url, ".staging")
    (staging / "4711-dead").write_bytes(b'{"half":')
    assert EditStore(folder.url).heads()["polite"]["prod"].version == version
    assert folder.names() == ["polite"]
    promoted(folder, "2")
    assert [path.name for path in staging.iterdir()] == ["4711-dead"]


# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_store_is_created_once_and_only_on_request(url: str) -> None:
    with pytest.raises(StoreUnavailable, match=r"expected store\.json.*vllm-edits init --store"):
        EditStore(url)
    promoted(EditStore(url, create=True), "1")
    assert EditStore(url, create=True).names() == EditStore(url).names() == ["polite"]


@pytest.mark.parametrize(
    ("written", "error", "said"),
    [
        (
            canonical_json({"format": "vllm-edits-store", "version": 2}),
            StoreUnavailable,
            "expected format vllm-edits-store version 1",
        ),
        (canonical_json({"format": "other"}), StoreUnavailable, "Use a matching vllm-edits"),
        (b"[]", StoreUnavailable, "Use a matching vllm-edits"),
        (b"{", StoreCorrupt, "is not JSON"),
        (b"\xff\xfe", StoreCorrupt, "is not JSON"),
    ],
)
def test_a_folder_of_another_format_is_refused(
    tmp_path: Path, written: bytes, error: type[EditsError], said: str
) -> None:
    """Also where one might be created: nothing there is overwritten."""
    (tmp_path / "store.json").write_bytes(written)
    for may_create in (False, True):
        with pytest.raises(error, match=said):
            EditStore(str(tmp_path), create=may_create)
    assert (tmp_path / "store.json").read_bytes() == written


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for may_create in (False, True):
        with pytest.raises(StoreUnavailable, match=r"store .*file/store: .*[Nn]ot a directory"):
            EditStore(str(tmp_path / "file" / "store"), create=may_create)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(folder: EditStore) -> None:
    root = Path(folder.url)
    root.chmod(0o500)
    try:
        with pytest.raises(StoreUnavailable, match="Permission denied"):
            folder.publish(bundle())
    finally:
        root.chmod(0o700)


def test_a_store_that_vanished_is_unavailable_not_empty(folder: EditStore) -> None:
    """An unmounted disk: whoever asks must not hear that there is nothing."""
    promoted(folder, "1")
    Path(folder.url).rename(folder.url + "-gone")
    with pytest.raises(StoreUnavailable):
        folder.heads()


@pytest.mark.parametrize("url", ["ftp://bucket/store", "http://example.org/store"])
def test_a_url_nobody_can_open_is_refused(url: str) -> None:
    with pytest.raises(StoreUnavailable, match="expected a folder or one of file://"):
        EditStore(url)


def test_a_file_url_is_the_folder(folder: EditStore) -> None:
    promoted(folder, "1")
    assert EditStore(f"file://{folder.url}").names() == ["polite"]


def test_importing_the_store_imports_neither_torch_nor_vllm() -> None:
    """An author's laptop needs neither; nor may it be slow to ask a store something."""
    looked_for = {"torch", "vllm", "transformers"}
    script = f"import sys, vllm_edits.edit_store.cli; print(sorted({looked_for} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"


# -- backends ----------------------------------------------------------------------------------------------------------


def test_both_backends_keep_the_protocol(url: str) -> None:
    keeps_the_protocol(open_backend(url))


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_a_key_cannot_leave_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="not a store key"):
        LocalFolder(tmp_path / "store").create(key, b"")
    assert list(tmp_path.iterdir()) == []


def test_every_stored_json_object_is_canonical(folder: EditStore) -> None:
    """One spelling each, so that digests can be compared across machines."""
    promoted(folder, "1", "2")
    found = list(Path(folder.url).rglob("*.json"))
    assert len(found) == 1 + 2 + 2 + 1 + 2
    for path in found:
        assert canonical_json(json.loads(path.read_bytes())) == path.read_bytes()


READS_ONLY = """
import os, sys
from pathlib import Path
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.reading.cache import NodeCache
from vllm_edits.edit_store.errors import EditsError
from vllm_edits.edit_store.reading.reader import Reader
from tests.support.bundles import random_bundle
from tests.support.fakes import BASE

bundle, (url, cache, version) = random_bundle("polite", BASE, seed=2), sys.argv[1:]
bundle.version.encode("utf-16be")  # so that no module is looked for once this user may not
os.setgid(54321), os.setuid(54321)
reader = Reader(EditStore(url), None, NodeCache(Path(cache)))
assert reader.look().heads["polite"]["prod"].version == version
assert len(reader.bundle(version).tensor_bytes)
store = EditStore(url)
promote, withdraw = lambda: store.promote(f"polite@{version}"), lambda: store.withdraw("polite")
for write in (lambda: store.publish(bundle), promote, withdraw):
    try:
        write()
    except EditsError as error:
        print(error)
"""


@pytest.mark.long
@pytest.mark.skipif(os.getuid() != 0, reason="becomes a user that may only read")
@pytest.mark.parametrize("form", ["a folder", "a projected volume"])
def test_a_store_that_may_only_be_read_is_followed_and_never_half_written(open_to_all: Path, form: str) -> None:
    """Mounted read-only, or as Kubernetes projects files, by links through ..data. Writers are refused at once."""
    folder = open_to_all / "store"
    store = EditStore(str(folder), create=True)
    version = store.publish(random_bundle("polite", BASE, seed=1))
    store.promote(f"polite@{version}")
    if form == "a projected volume":
        projected = open_to_all / "projected"
        shutil.copytree(folder, projected / "..2026_11_27")
        (projected / "..data").symlink_to("..2026_11_27")
        for each in folder.iterdir():
            (projected / each.name).symlink_to(f"..data/{each.name}")
        folder = projected
    cache = open_to_all / "cache"
    cache.mkdir()
    before = sorted(map(str, folder.rglob("*")))
    for each in (folder, *folder.rglob("*")):
        each.chmod(0o755 if each.is_dir() else 0o444)
    cache.chmod(0o777)
    command = [sys.executable, "-c", READS_ONLY, str(folder), str(cache), version]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Permission denied") == 3, ran.stdout
    assert sorted(map(str, folder.rglob("*"))) == before
