"""The Hub as a channel, through the real huggingface_hub client against a stand-in for the Hub: see `hub_server`."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from loadtests.harness.hub_server import Blob, HubAnswer, HubRequest, HubServer, Repo, User
from vllm_edits.edit_store import (
    BaseModelRef,
    Bundle,
    EditStore,
    Measurement,
    Offset,
    Provenance,
    Role,
    SigningKey,
    SubspaceFilter,
    Widths,
)
from vllm_edits.edit_store.backends import LocalFolder
from vllm_edits.edit_store.bundle import MAX_MANIFEST_BYTES
from vllm_edits.edit_store.canonical import canonical_json, sha256
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.errors import (
    AmbiguousVersion,
    BundleRefused,
    Conflict,
    EditsError,
    NotFound,
    StoreCorrupt,
    StoreUnavailable,
)
from vllm_edits.edit_store.hub.model_card import BEGIN, END, plain, render
from vllm_edits.edit_store.hub.push_pull import Pulled, Pushed, pull, push
from vllm_edits.edit_store.storage.store import blob_key, version_key
from vllm_edits.edit_store.upkeep.transfer import Package

huggingface_hub = pytest.importorskip("huggingface_hub")
constants, bars = (importlib.import_module(f"huggingface_hub.{name}") for name in ("constants", "utils"))
# The client's own way to send a file is out of fashion in its network library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

ROOT = Path(__file__).parents[2]
REPO = "ada/edits"
ADA, READER, EVE, OLD = "hf_ada", "hf_ada_reads", "hf_eve", "hf_ada_of_last_year"
WIDTHS = Widths(layers=3, hidden=8, mlp=16, heads=2, kv_heads=2, head_dim=4, vocab=32)
BASE = BaseModelRef(
    name="lab/tiny", architecture="LlamaForCausalLM", widths=WIDTHS, files={"model.safetensors": "a" * 64}
)
WHEN = datetime(2026, 1, 1, tzinfo=UTC)

Attempt = Callable[[], object]


def bundle(label: str = "1", *, name: str = "polite", number: float = 0.5, **fields: Any) -> Bundle:
    """Bundles of different labels are different versions; those of one number share their tensors."""
    edits: list[tuple[Any, dict[str, Any]]] = [
        (Offset(site="layers.0.resid"), {"vector": np.full(8, number)}),
        (SubspaceFilter(site="layers.1.resid", rank=1), {"basis": np.eye(1, 8), "mean": np.zeros(8)}),
    ]
    made = Bundle.create(name, BASE, edits, Provenance(tool="tests", method="by hand"), created_at=WHEN, label=label)
    return Bundle(made.manifest.model_copy(update=fields), made.tensor_bytes)


def objects(store: EditStore) -> dict[str, bytes]:
    """Everything that versions are in a store."""
    folders = ("blobs/", "manifests/", "attestations/", "versions/")
    return {item.key: store.backend.get(item.key) for folder in folders for item in store.backend.list(folder)}


def folder_of(version: str, name: str = "polite") -> str:
    return f"{name}/{version}"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The client read the environment when it was imported. Here it may ask this machine, and caches nothing."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
    yield
    huggingface_hub.close_session()


@dataclass
class Channel:
    """A Hub, a store that signs and pushes as ada, and an empty one that pulls as whoever has no token."""

    hub: HubServer
    store: EditStore
    empty: EditStore
    author: SigningKey

    @property
    def repo(self) -> Repo:
        return self.hub.repos[REPO]

    def push(
        self, *references: str, store: EditStore | None = None, repo: str = REPO, token: str = ADA, **options: Any
    ) -> Pushed:
        return push(store or self.store, references, repo, endpoint=self.hub.url, token=token, **options)

    def pull(self, *references: str, store: EditStore | None = None, repo: str = REPO, **options: Any) -> Pulled:
        return pull(repo, store or self.empty, references=references, endpoint=self.hub.url, **options)

    def another_store(self, name: str) -> EditStore:
        return EditStore(f"memory://{self.store.url}/{name}", create=True)


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    author = SigningKey.generate()
    store = EditStore(str(tmp_path / "store"), create=True, signer=author)
    empty = EditStore(str(tmp_path / "empty"), create=True)
    with HubServer({ADA: User("ada"), READER: User("ada", may_write=False), EVE: User("eve")}) as hub:
        yield Channel(hub, store, empty, author)


@pytest.fixture
def version(channel: Channel) -> str:
    """A version that the store holds."""
    return channel.store.publish(bundle(), actor="ada")


# -- there and back ----------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_pulled_to_the_byte(channel: Channel) -> None:
    """Versions, records and signatures: both stores hold the same objects, and the key vouches for them in both."""
    store = channel.store
    first, second = store.publish(bundle("1"), actor="ada"), store.publish(bundle("2", number=2.0), actor="bob")
    store.attest(first, SigningKey.generate().sign(Role.AUTHOR, first, "polite"))
    pushed = channel.push(f"polite@{first}", f"polite@{second}")
    pulled = channel.pull()
    assert pushed.added == tuple(f"polite@{version}" for version in (first, second))
    assert (pulled.commit, set(pulled.versions)) == (pushed.commit, set(pushed.added))
    assert objects(channel.empty) == objects(channel.store)
    assert len(objects(channel.empty)) == 2 + 2 + 3 + 2
    assert channel.empty.bundle(first) == bundle("1")
    assert {record.version: record.actor for record in channel.empty.versions("polite")} == {
        first: "ada",
        second: "bob",
    }
    assert [each.made_by(channel.author.signer.public_key) for each in channel.empty.signatures(second)] == [True]


def test_a_version_in_a_repo_has_the_members_of_an_export(channel: Channel, version: str) -> None:
    """By the same names and of the same bytes; beside them is the card alone."""
    channel.push(f"polite@{version}")
    members = Package.of(channel.store, f"polite@{version}").members()
    repo, folder = channel.repo, folder_of(version)
    assert list(members) == ["published.json", "manifest.json", "edits.safetensors", "attestations/000.json"]
    assert {path: repo.content(path) for path in repo.head().tree if "/" in path} == {
        f"{folder}/{member}": data for member, data in members.items()
    }
    assert set(repo.head().tree) == {".gitattributes", "README.md", *(f"{folder}/{member}" for member in members)}


def test_a_push_is_one_commit_that_says_what_it_adds(channel: Channel) -> None:
    """On top of the head, under the summary that was asked for, or one that names what is new."""
    versions = [channel.store.publish(bundle(label)) for label in "12345"]
    channel.push(*(f"polite@{version}" for version in versions[:4]))
    pushed = channel.push(f"polite@{versions[4]}", message="the fifth")
    newest, older, first = channel.repo.history()
    assert (newest.oid, newest.parent, newest.title, newest.author) == (pushed.commit, older.oid, "the fifth", "ada")
    assert newest.description == f"polite@{versions[4]}"
    shown = ", ".join(f"polite@{version[:12]}" for version in versions[:3])
    assert (older.title, older.parent) == (f"Add {shown} and 1 more", first.oid)


def test_a_second_push_does_nothing_and_says_so(channel: Channel, version: str) -> None:
    """No commit, and nothing is uploaded."""
    first = channel.push(f"polite@{version}")
    channel.hub.requests.clear()
    second = channel.push(f"polite@{version}", "polite@" + version[:8])
    assert second == Pushed(REPO, "main", first.commit, False, (), (f"polite@{version}",))
    assert len(channel.repo.history()) == 2
    assert {request.method for request in channel.hub.requests} == {"GET", "HEAD"}


def test_a_push_adds_only_what_is_missing(channel: Channel, version: str) -> None:
    """A signature made later is added beside those that are there; who published first stays on record."""
    channel.push(f"polite@{version}")
    before = dict(channel.repo.head().tree)
    channel.pull()
    channel.empty.attest(version, SigningKey.generate().sign(Role.AUTHOR, version, "polite"))
    own = channel.empty.attestations(version)
    channel.empty.backend.delete(version_key("polite", version))
    channel.empty.put_version(bundle(), [], channel.store.versions("polite")[0].model_copy(update={"actor": "eve"}))
    pushed = channel.push(f"polite@{version}", store=channel.empty)
    after = channel.repo.head().tree
    assert pushed.added == (f"polite@{version}",)
    assert {path for path in after if after[path] != before.get(path)} == {
        f"{folder_of(version)}/attestations/001.json"
    }
    channel.pull(store=channel.store)
    assert channel.store.attestations(version) == own
    assert [record.actor for record in channel.store.versions("polite")] == ["ada"]
    assert not channel.push(f"polite@{version}", store=channel.empty).committed


def test_equal_tensors_travel_once(channel: Channel) -> None:
    """Up, down, and not at all where the store has them; a blob that was damaged there is fetched and mended."""
    versions = [channel.store.publish(bundle(label)) for label in "12"]
    channel.push(*(f"polite@{version}" for version in versions))
    assert len(channel.hub.sent("PUT", "^/cdn/")) == 1
    channel.pull()
    assert len(channel.hub.sent("GET", "^/cdn/")) == 1
    channel.pull()
    assert len(channel.hub.sent("GET", "^/cdn/")) == 1
    blob = blob_key(bundle().manifest.tensors.sha256)
    channel.empty.backend.put(blob, b"rotten")
    channel.pull()
    assert len(channel.hub.sent("GET", "^/cdn/")) == 2
    assert channel.empty.backend.get(blob) == bundle().tensor_bytes


def test_a_long_listing_is_read_to_its_end(channel: Channel) -> None:
    """Page by page."""
    versions = [channel.store.publish(bundle(label)) for label in "123"]
    with HubServer({ADA: User("ada")}, page=2) as paged:
        push(channel.store, [f"polite@{version}" for version in versions], REPO, endpoint=paged.url, token=ADA)
        pull(REPO, channel.empty, endpoint=paged.url)
        assert len(paged.sent("GET", "cursor=")) > 3
    assert objects(channel.empty) == objects(channel.store)


def test_branches_are_channels_of_their_own(channel: Channel) -> None:
    """What is pushed to one is not on another; a commit can be pulled by its digest after the branch went on."""
    old, new = (channel.store.publish(bundle(label)) for label in "12")
    first = channel.push(f"polite@{old}")
    channel.repo.branches["staging"] = first.commit
    staged = channel.push(f"polite@{new}", revision="staging")
    assert channel.repo.branches == {"main": first.commit, "staging": staged.commit}
    assert channel.pull().versions == (f"polite@{old}",)
    assert channel.pull(revision="staging").commit == staged.commit
    assert set(channel.empty.version_digests("polite")) == {old, new}
    channel.push(f"polite@{new}")
    assert channel.pull(revision=first.commit).versions == (f"polite@{old}",)


def test_some_versions_can_be_pulled(channel: Channel) -> None:
    """Those of a name, or one by the beginning of its digest. What is not there is said with what is."""
    one, two = (channel.store.publish(bundle(label)) for label in "12")
    terse = channel.store.publish(bundle(name="terse"))
    channel.push(f"polite@{one}", f"polite@{two}", f"terse@{terse}")
    assert channel.pull("terse", f"polite@{one[:8]}").versions == (f"terse@{terse}", f"polite@{one}")
    assert channel.empty.version_digests("polite") == [one]
    assert set(channel.pull("polite").versions) == {f"polite@{one}", f"polite@{two}"}
    with pytest.raises(NotFound, match=r"contains no 'polit', only polite, terse\. Did you mean 'polite'\?"):
        channel.pull("polit")
    with pytest.raises(NotFound, match="contains no version 000000 of 'polite'"):
        channel.pull("polite@000000")
    with pytest.raises(NotFound, match="polite@prod: expected a name or name@version, found a tag"):
        channel.pull("polite@prod")


def test_a_beginning_that_fits_two_versions_chooses_none(channel: Channel) -> None:
    twins = ["abcdef" + digit * 58 for digit in "01"]
    channel.hub.add(REPO).commit({f"{folder_of(twin)}/manifest.json": b"{}" for twin in twins})
    with pytest.raises(AmbiguousVersion, match="matches 2 versions: abcdef0000000000, abcdef1111111111"):
        channel.pull("polite@abcdef")


def test_a_repo_without_versions_says_so(channel: Channel) -> None:
    channel.hub.add(REPO).commit({"README.md": b"# soon", "picture.png": b"..."})
    with pytest.raises(NotFound, match=r"contains no versions\. Push a version with: vllm-edits hub push"):
        channel.pull()


# -- who is first ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["/tree/", "/lfs/", "/validate-yaml", "/commit/"])
def test_who_is_overtaken_gets_a_conflict_and_overwrites_nothing(channel: Channel, version: str, moment: str) -> None:
    """The winner's commit stays the head with all it holds; a second try adds to it, and the card lists both."""
    rival = channel.another_store("rival")
    theirs = rival.publish(bundle("rival", number=3.0))
    channel.push(f"polite@{channel.store.publish(bundle('0'))}")

    def overtake(request: HubRequest) -> None:
        if moment in request.path:
            channel.hub.before = lambda _: None
            channel.push(f"polite@{theirs}", store=rival)

    channel.hub.before = overtake
    with pytest.raises(Conflict, match=r"another commit was made .* so nothing was pushed .* Push again"):
        channel.push(f"polite@{version}")
    repo = channel.repo
    assert repo.head().description == f"polite@{theirs}"
    assert not any(path.startswith(folder_of(version)) for path in repo.head().tree)
    winner = {path: blob for path, blob in repo.head().tree.items() if path.startswith(folder_of(theirs))}
    assert {path: repo.content(path) for path in winner} == {
        f"{folder_of(theirs)}/{member}": data
        for member, data in Package.of(rival, f"polite@{theirs}").members().items()
    }

    again = channel.push(f"polite@{version}")
    assert again.committed
    assert winner.items() <= repo.head().tree.items()
    assert {theirs[:12], version[:12]} <= set(re.findall("`([0-9a-f]{12})`", repo.content("README.md").decode()))
    assert len(channel.pull().versions) == 3


def test_of_many_who_push_at_once_none_is_lost(channel: Channel) -> None:
    """Each gets through or is told; after they tried again, every version is there, one commit for each."""
    channel.hub.add(REPO)
    huggingface_hub.get_session()  # made here: version 1 makes one for each thread that finds none
    ready = threading.Barrier(4)
    told: list[bool | None] = []

    def publish_and_push(number: int) -> None:
        own = channel.another_store(str(number))
        reference = f"polite@{own.publish(bundle(str(number), number=number))}"
        ready.wait()
        while True:
            try:
                told.append(channel.push(reference, store=own).committed)
            except Conflict:
                told.append(None)
            else:
                return

    threads = [threading.Thread(target=publish_and_push, args=[number]) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert told.count(True) == 4
    assert len(channel.repo.history()) == 5
    assert len(channel.pull().versions) == 4


def test_a_head_that_was_seen_can_be_asked_for(channel: Channel, version: str) -> None:
    """Whoever looked at a commit, and decided, is told when it is the head no more. Nothing is uploaded then."""
    seen = channel.push(f"polite@{channel.store.publish(bundle('0'))}").commit
    newer = channel.push(f"polite@{version}", parent=seen[:8]).commit
    channel.hub.requests.clear()
    with pytest.raises(Conflict, match=f"at commit {seen[:12]}, found {newer[:12]}"):
        channel.push(f"polite@{channel.store.publish(bundle('2'))}", parent=seen)
    assert {request.method for request in channel.hub.requests} == {"GET"}


def test_a_lost_answer_is_an_unknown_end_and_pushing_again_is_harmless(channel: Channel, version: str) -> None:
    channel.hub.lose = lambda request: "/commit/" in request.path
    with pytest.raises(StoreUnavailable, match=r"It is unknown whether the commit was made\. Push again"):
        channel.push(f"polite@{version}")
    channel.hub.lose = lambda _: False
    assert channel.push(f"polite@{version}").present == (f"polite@{version}",)
    assert len(channel.repo.history()) == 2


# -- what is not believed ----------------------------------------------------------------------------------------------

Tamper = Callable[[Repo, str], dict[str, bytes | Blob | None]]


def flipped(repo: Repo, version: str) -> dict[str, bytes | Blob | None]:
    data = bytearray(repo.content(f"{folder_of(version)}/edits.safetensors"))
    data[-1] ^= 1
    return {f"{folder_of(version)}/edits.safetensors": bytes(data)}


def member(name: str, data: bytes | Blob | None) -> Tamper:
    return lambda _, version: {f"{folder_of(version)}/{name}": data}


def record(**changes: str) -> Tamper:
    def change(repo: Repo, version: str) -> dict[str, bytes | Blob | None]:
        path = f"{folder_of(version)}/published.json"
        return {path: canonical_json(json.loads(repo.content(path)) | changes)}

    return change


def whole_folder(to: Callable[[str], str]) -> Tamper:
    """A good version under another path."""
    return lambda repo, version: {
        path.replace(folder_of(version), to(version)): Blob(repo.content(path))
        for path in repo.head().tree
        if path.startswith(folder_of(version))
    }


def huge(size: int) -> Blob:
    return Blob(b"pointer", lfs="b" * 64, size=size)


@pytest.mark.parametrize(
    ("tamper", "code", "told"),
    [
        pytest.param(flipped, "digest", "truncated or replaced", id="a flipped byte"),
        pytest.param(member("manifest.json", bundle("2").manifest.to_bytes()), "archive", "its folder|is about polite@",
                     id="the manifest of another version"),
        pytest.param(member("manifest.json", bundle().manifest.to_bytes() + b" "), "not_canonical", "canonical",
                     id="a manifest spelt otherwise"),
        pytest.param(record(version="0" * 64), "archive", "published.json is about polite@000000000000",
                     id="the record of another version"),
        pytest.param(record(label="safe"), "archive", "labelled 'safe'", id="a record with another label"),
        pytest.param(record(at="2026-01-01T00:00:00"), "archive", "have timezone info", id="a time without its zone"),
        pytest.param(record(extra="x"), "archive", "extra", id="a record with another field"),
        pytest.param(member("edits.safetensors", None), "archive", "missing: edits.safetensors", id="no tensors"),
        pytest.param(member("published.json", None), "archive", "missing: published.json", id="no record"),
        pytest.param(whole_folder(lambda _: folder_of("0" * 64)), "archive", "its folder contains polite@",
                     id="under another version's path"),
        pytest.param(whole_folder(lambda version: f"rude/{version}"), "archive", "its folder contains polite@",
                     id="under another name's path"),
        pytest.param(member("edits.safetensors", huge((1 << 30) + 1)), "too_large",
                     "expected at most 1073741824 bytes, found 1073741825",
                     id="announced tensors too large"),
        pytest.param(member("manifest.json", huge(MAX_MANIFEST_BYTES + 1)), "too_large",
                     "manifest.json: expected at most 1048576 bytes, found 1048577",
                     id="an announced manifest too large"),
        pytest.param(lambda _, version: {f"{folder_of(version)}/attestations/{number:03}.json": b"{}"
                                         for number in range(101)}, "too_large", "expected at most 100 signatures",
                     id="too many signatures"),
        pytest.param(member("run.py", b"import os"), "unexpected_file", "run.py", id="one file more"),
        pytest.param(member("attestations/../../x.json", b""), "unexpected_file", r"attestations/\.\./\.\./x",
                     id="a path out of the folder"),
        pytest.param(lambda *_: {"../../etc/cron": b""}, "unexpected_file", r"\.\./\.\./etc", id="a path out of all"),
        pytest.param(lambda *_: {"/etc/passwd": b""}, "unexpected_file", "/etc/passwd", id="an absolute path"),
        pytest.param(lambda _, version: {f"..\\polite/{version}/manifest.json": b""}, "unexpected_file", "polite",
                     id="backslashes"),
        pytest.param(lambda _, version: {f"Polite/{version}/manifest.json": b""}, "unexpected_file", "Polite",
                     id="a name in capitals"),
        pytest.param(lambda *_: {"notes/todo": b""}, "unexpected_file", "notes/todo", id="a folder of no version"),
    ],
)  # fmt: skip
def test_what_was_tampered_with_is_refused_and_nothing_stored(
    channel: Channel, version: str, tamper: Tamper, code: str, told: str
) -> None:
    """Not even the good version that lies beside it."""
    good = channel.store.publish(bundle("good", name="terse"))
    channel.push(f"polite@{version}", f"terse@{good}")
    repo = channel.repo
    repo.commit(tamper(repo, version))
    with pytest.raises(BundleRefused) as refused:
        channel.pull()
    assert code in {reason.code for reason in refused.value.reasons}
    assert re.search(told, str(refused.value))
    assert objects(channel.empty) == {}


def test_an_announced_size_is_refused_before_anything_is_fetched(channel: Channel, version: str) -> None:
    channel.push(f"polite@{version}")
    channel.repo.commit(member("edits.safetensors", huge(1 << 40))(channel.repo, version))
    channel.hub.requests.clear()
    with pytest.raises(BundleRefused, match="at most 1073741824 bytes, found 1099511627776"):
        channel.pull()
    assert channel.hub.sent("GET", "resolve|cdn") == channel.hub.sent("HEAD", ".") == []


def test_a_file_that_is_not_as_long_as_announced_is_not_stored(channel: Channel, version: str) -> None:
    """The Hub's word on a size is no more believed than the repo's: a longer answer is cut off or refused."""
    channel.push(f"polite@{version}")
    digest = bundle().manifest.tensors.sha256
    channel.repo.large[digest] += b"more"
    with pytest.raises(EditsError, match="size"):
        channel.pull()
    assert objects(channel.empty) == {}


def test_a_digest_that_is_a_path_is_looked_up_nowhere(
    channel: Channel, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is asked for tensors that a repo names by digest, and only by digest."""
    channel.push(f"polite@{version}")
    blob = Blob(b"pointer", lfs="../../../store.json", size=400)
    channel.repo.commit(member("edits.safetensors", blob)(channel.repo, version))
    asked: list[str] = []
    get = LocalFolder.get

    def watched(backend: LocalFolder, key: str) -> bytes:
        asked.append(key)
        return get(backend, key)

    with monkeypatch.context() as watching:
        watching.setattr(LocalFolder, "get", watched)
        with pytest.raises(StoreUnavailable):
            channel.pull()
    assert asked == []
    assert objects(channel.empty) == {}


def test_a_repo_of_very_many_files_is_not_read(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_edits.edit_store.hub.hub_repo.MAX_FILES", 5)
    channel.hub.add(REPO).commit({f"{number}.txt": b"" for number in range(5)})
    with pytest.raises(BundleRefused, match="expected at most 5 files, found more"):
        channel.pull()


def test_every_reason_is_told_at_once(channel: Channel, version: str) -> None:
    """Of one version and of several; of very many files that do not belong there, the first."""
    other = channel.store.publish(bundle("other", name="terse", number=2.0))
    channel.push(f"polite@{version}", f"terse@{other}")
    repo = channel.repo
    repo.commit(flipped(repo, version) | record(label="safe")(repo, version))
    repo.commit({f"terse/{other}/published.json": b"{}"})
    with pytest.raises(BundleRefused) as refused:
        channel.pull()
    assert [reason.code for reason in refused.value.reasons] == ["digest", "archive", "archive"]
    with pytest.raises(BundleRefused) as refused:
        channel.pull("terse")
    assert [reason.code for reason in refused.value.reasons] == ["archive"]
    repo.commit({f"junk/{number}": b"" for number in range(50)})
    with pytest.raises(BundleRefused, match="and 30 more"):
        channel.pull()


def test_a_broken_version_does_not_stand_in_the_way_of_another(channel: Channel, version: str) -> None:
    """Where it was not asked for."""
    other = channel.store.publish(bundle("other", name="terse", number=2.0))
    channel.push(f"polite@{version}", f"terse@{other}")
    channel.repo.commit(flipped(channel.repo, version))
    assert channel.pull("terse").versions == (f"terse@{other}",)
    assert channel.empty.names() == ["terse"]


def test_garbage_among_signatures_is_passed_over(channel: Channel, version: str) -> None:
    """Anybody who may write there could put it, and it vouches for nothing."""
    channel.push(f"polite@{version}")
    channel.repo.commit({f"{folder_of(version)}/attestations/007.json": b"not an envelope"})
    channel.pull()
    assert objects(channel.empty) == objects(channel.store)


def test_nothing_is_pushed_beside_a_damaged_copy_of_it(channel: Channel, version: str) -> None:
    """The repo is left as it is for whoever finds out who changed it."""
    channel.push(f"polite@{version}")
    repo = channel.repo
    damaged = repo.commit(flipped(repo, version))
    with pytest.raises(
        StoreCorrupt, match=r"edits\.safetensors does not have the digest .* delete the version's folder"
    ):
        channel.push(f"polite@{version}", f"polite@{channel.store.publish(bundle('2'))}")
    assert repo.head() is damaged


def test_nothing_is_pushed_beside_a_version_whose_manifest_is_another(channel: Channel, version: str) -> None:
    """The card would list what is not there."""
    channel.push(f"polite@{version}")
    repo = channel.repo
    repo.commit(member("manifest.json", bundle("2").manifest.to_bytes())(repo, version))
    terse = channel.empty.publish(bundle(name="terse"))
    with pytest.raises(BundleRefused, match=r"expected the digest .* of manifest\.json, found"):
        channel.push(f"terse@{terse}", store=channel.empty)
    assert not any(path.startswith("terse/") for path in repo.head().tree)


def test_nothing_is_pushed_beside_a_version_under_another_name(channel: Channel, version: str) -> None:
    channel.push(f"polite@{version}")
    repo = channel.repo
    repo.commit(whole_folder(lambda version: f"rude/{version}")(repo, version))
    with pytest.raises(
        BundleRefused,
        match=f"rude@{version} in ada/edits .*\n.*expected the name 'rude' in the manifest, found 'polite'",
    ):
        channel.push(f"polite@{channel.store.publish(bundle('2'))}")


def test_a_version_has_so_many_signatures_and_no_more(channel: Channel, version: str) -> None:
    """More could not be pulled."""
    repo, folder = channel.hub.add(REPO), folder_of(version)
    repo.commit({f"{folder}/attestations/{number:03}.json": f"{number}".encode() for number in range(100)})
    with pytest.raises(EditsError, match="would have more than 100 signatures"):
        channel.push(f"polite@{version}")
    repo.commit({f"{folder}/attestations/042.json": None})
    channel.push(f"polite@{version}")
    assert repo.content(f"{folder}/attestations/042.json") == channel.store.attestations(version)[0]
    channel.pull()
    assert objects(channel.empty) == objects(channel.store)


def test_what_the_client_leaves_out_is_noticed(channel: Channel, version: str) -> None:
    """It skips what a .gitignore names, and calls that a success."""
    channel.hub.add(REPO).commit({".gitignore": b"*.json\n"})
    with pytest.raises(
        StoreCorrupt,
        match=r"does not contain polite/.*/published\.json.* Probably a \.gitignore in the repo excludes it",
    ):
        channel.push(f"polite@{version}")


# -- when it cannot be -------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_told(channel: Channel, version: str) -> None:
    """To who pushes and to who pulls, also where none is needed."""
    channel.push(f"polite@{version}")
    for attempt in (
        lambda: channel.push(f"polite@{version}", token=OLD), lambda: channel.pull(token=OLD)
    ):  # fmt: skip
        with pytest.raises(StoreUnavailable, match=r"does not accept this token for ada/edits.* `hf auth login`"):
            attempt()


@pytest.mark.parametrize(("token", "told"), [(READER, "write token"), (EVE, "write token")])
def test_who_may_not_write_is_told(channel: Channel, version: str, token: str, told: str) -> None:
    """A token that reads only, and somebody else's."""
    channel.hub.add(REPO)
    with pytest.raises(StoreUnavailable, match=f"this token has no write permission for ada/edits: .*{told}"):
        channel.push(f"polite@{version}", token=token)
    assert len(channel.repo.history()) == 1


def test_a_repo_is_made_where_its_owner_may(channel: Channel, version: str) -> None:
    """And nowhere else."""
    with pytest.raises(StoreUnavailable, match="has no write permission"):
        channel.push(f"polite@{version}", token=EVE)
    assert channel.hub.repos == {}
    channel.push(f"polite@{version}")
    assert not channel.repo.private


def test_a_private_repo_is_private(channel: Channel, version: str) -> None:
    """Who has no right to see it is told what he is told of one that is not there."""
    channel.push(f"polite@{version}", private=True)
    assert channel.repo.private
    for token in (None, EVE):
        with pytest.raises(EditsError, match=f"{REPO}.*`hf auth login`"):
            channel.pull(token=token)
    assert channel.pull(token=READER).versions == (f"polite@{version}",)


def test_private_versions_do_not_go_to_a_public_repo(channel: Channel, version: str) -> None:
    channel.hub.add(REPO)
    with pytest.raises(EditsError, match="expected a private repo, but ada/edits is public"):
        channel.push(f"polite@{version}", private=True)
    assert len(channel.repo.history()) == 1


def test_a_missing_repo_is_told(channel: Channel) -> None:
    with pytest.raises(NotFound, match="has no model repo ada/nothing, or this token cannot see it"):
        channel.pull(repo="ada/nothing", token=ADA)
    with pytest.raises(StoreUnavailable, match="or there is no such repo"):  # all that the Hub says without a token
        channel.pull(repo="ada/nothing")


def test_a_missing_revision_is_told_with_its_neighbours(channel: Channel, version: str) -> None:
    """To push to a new branch, make it; a push makes no repo for the sake of a branch."""
    made = channel.hub.add(REPO)
    made.branches["staging"] = made.branches["main"]
    told = r"has no revision 'stagin'\. Did you mean 'staging' or 'main'\? Make a branch with: hf repos branch create"
    with pytest.raises(NotFound, match=told):
        channel.pull(revision="stagin")
    with pytest.raises(NotFound, match=told):
        channel.push(f"polite@{version}", revision="stagin")
    with pytest.raises(NotFound, match="Push to main first"):
        channel.push(f"polite@{version}", repo="ada/new", revision="staging")
    assert list(channel.hub.repos) == [REPO]


def test_a_name_that_is_no_repo_is_told_before_anything_is_asked(channel: Channel, version: str) -> None:
    for name in ("edits", "ada/edits/more", "../edits", "ada/", ""):
        with pytest.raises(EditsError, match="not the name of a repo on the Hub: expected owner/name"):
            channel.pull(repo=name)
        with pytest.raises(EditsError, match="not the name of a repo on the Hub: expected owner/name"):
            channel.push(f"polite@{version}", repo=name)
    assert channel.hub.requests == []


def test_a_slash_after_the_address_is_none_before_the_path(channel: Channel, version: str) -> None:
    push(channel.store, [f"polite@{version}"], REPO, endpoint=f"{channel.hub.url}/", token=ADA)
    assert channel.hub.sent("POST", "/commit/")
    assert not channel.hub.sent(".*", "^//")


def test_a_version_that_the_store_lacks_is_told_before_anything_is_asked(channel: Channel, version: str) -> None:
    with pytest.raises(NotFound, match="nothing is published under 'polit'"):
        channel.push(f"polite@{version}", "polit")
    with pytest.raises(EditsError, match="nothing to push: name at least one version"):
        channel.push()
    assert channel.hub.requests == []


def test_a_hub_that_is_down_is_told(channel: Channel, version: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    told = f"{url} cannot be reached: .*refused.* Check the network and HF_ENDPOINT"
    with pytest.raises(StoreUnavailable, match=told):
        pull(REPO, channel.empty, endpoint=url)
    with pytest.raises(StoreUnavailable, match=told):
        push(channel.store, [f"polite@{version}"], REPO, endpoint=url, token=ADA)


@pytest.mark.parametrize("part", ["/revision/", "/tree/", "/resolve/", "resolve-cache", "/cdn/"])
def test_a_hub_that_fails_half_way_leaves_nothing_behind(channel: Channel, version: str, part: str) -> None:
    """However far a pull has come; and afterwards it succeeds."""
    channel.push(f"polite@{version}")
    channel.hub.fail = lambda request: (
        HubAnswer(503, {"error": "Service Unavailable"}) if part in request.path else None
    )
    with pytest.raises(StoreUnavailable, match=f"{channel.hub.url}.*503|503.*{channel.hub.url}"):
        channel.pull()
    assert objects(channel.empty) == {}
    channel.hub.fail = lambda _: None
    channel.pull()
    assert objects(channel.empty) == objects(channel.store)


@pytest.mark.parametrize(
    "part", ["/revision/", "/tree/", "/preupload/", "/lfs/", "/cdn/", "lfs-verify", "validate", "/commit/"]
)
def test_a_push_that_fails_half_way_commits_nothing(channel: Channel, version: str, part: str) -> None:
    """However far it has come; and afterwards it succeeds."""
    channel.hub.add(REPO)
    channel.hub.fail = lambda request: HubAnswer(500, {"error": "Internal Error"}) if part in request.path else None
    with pytest.raises(StoreUnavailable, match="500"):
        channel.push(f"polite@{version}")
    assert len(channel.repo.history()) == 1
    channel.hub.fail = lambda _: None
    assert channel.push(f"polite@{version}").committed


def test_being_asked_to_wait_is_told(channel: Channel) -> None:
    channel.hub.fail = lambda _: HubAnswer(429, {"error": "too many requests"})
    with pytest.raises(StoreUnavailable, match=r"limits the rate of requests: too many requests\. Try again later"):
        channel.pull()


def test_offline_mode_is_told(channel: Channel, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of a network error, and without a request."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for attempt in (channel.pull, lambda: channel.push(f"polite@{version}")):
        with pytest.raises(StoreUnavailable, match=r"HF_HUB_OFFLINE is set\. Unset it, or move versions as files"):
            attempt()
    assert channel.hub.requests == []


def test_an_endpoint_without_xet_is_told(channel: Channel, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real hf_xet, which no stand-in answers: what to set is said."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(StoreUnavailable, match="If only Xet is out of reach, set HF_HUB_DISABLE_XET=1"):
        channel.push(f"polite@{version}")


def test_without_the_client_it_is_said_what_to_install(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EditsError, match=r"huggingface_hub is not installed\. Install vllm-edits\[hub\]"):
        pull(REPO, channel.empty)


def test_the_client_is_imported_only_when_it_is_used() -> None:
    """Every other command starts without it, and without torch."""
    looked_for = {"vllm_edits.edit_store.hub.push_pull", "huggingface_hub", "torch"}
    code = f"import sys, vllm_edits.edit_store.cli; print(sorted({looked_for} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['vllm_edits.edit_store.hub.push_pull']\n"


# -- the card ----------------------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def row(card: str, version: str) -> list[str]:
    """The cells of a version's line."""
    (line,) = (line for line in card.splitlines() if f"`{version[:12]}`" in line)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_card_says_what_is_in_the_repo(channel: Channel) -> None:
    """What the Hub reads, a line for each version, and how to get it; an earlier push's versions stay listed."""
    measured = (Measurement(metric="refusals", base=0.25, edited=0.75, n=400),)
    made = bundle("v1", description="asks back | always", measurements=measured)
    first, second = channel.store.publish(made), channel.another_store("other")
    channel.push(f"polite@{first}")
    other = second.publish(bundle(name="terse"))
    channel.push(f"terse@{other}", store=second)
    card = channel.repo.content("README.md").decode()
    assert front_matter(card) == {
        "base_model": "lab/tiny", "base_model_relation": "adapter", "library_name": "vllm-edits",
        "tags": ["vllm-edits", "model-editing"],
    }  # fmt: skip
    assert row(card, first) == [
        "polite", "v1", f"`{first[:12]}`", "2026-01-01", r"offset, subspace\_filter", "2",
        "refusals: 0.25 → 0.75 (n=400)", r"asks back \| always", "by hand with tests",
    ]  # fmt: skip
    assert row(card, other)[:3] == ["terse", "1", f"`{other[:12]}`"]
    assert f"vllm-edits hub pull {REPO} --store ./store\nvllm-edits promote terse@{other[:12]} --store ./store" in card
    assert "vllm-edits serve lab/tiny --store ./store" in card


def test_what_people_wrote_on_the_card_is_kept(channel: Channel) -> None:
    """Their front matter, and their text before and after; only what stands between the marks is written anew."""
    one, two = (channel.store.publish(bundle(label)) for label in "12")
    channel.hub.add(REPO).commit({"README.md": b"---\nlicense: mit\ntags: [polite]\n---\n# Ours\n\nHello.\n"})
    channel.push(f"polite@{one}")
    repo = channel.repo
    card = repo.content("README.md").decode()
    assert front_matter(card)["license"] == "mit"
    assert front_matter(card)["tags"] == ["polite", "vllm-edits", "model-editing"]
    assert card.index("Hello.") < card.index(BEGIN)
    edited = card.replace("license: mit", "license: apache-2.0  # asked").replace(END, f"{END}\n\n## Contact\n\nada")
    repo.commit({"README.md": edited.encode()})
    assert not channel.push(f"polite@{one}").committed
    channel.push(f"polite@{two}")
    card = repo.content("README.md").decode()
    assert "license: apache-2.0  # asked" in card
    assert card.endswith("## Contact\n\nada\n")
    assert card.count(BEGIN) == card.count(END) == card.count("## Versions") == 1
    assert row(card, two)[1] == "2"


def test_a_card_that_was_spoilt_is_written_again(channel: Channel, version: str) -> None:
    """Also when no version is new; a push says that it committed, and that the version was there."""
    channel.push(f"polite@{version}")
    repo = channel.repo
    good = repo.content("README.md")
    repo.commit({"README.md": good.replace(version[:12].encode(), b"0" * 12)})
    again = channel.push(f"polite@{version}")
    assert (again.committed, again.added, again.present) == (True, (), (f"polite@{version}",))
    assert repo.content("README.md") == good
    assert repo.head().title == "Update the model card"


def test_a_card_that_cannot_be_read_is_not_overwritten(channel: Channel, version: str) -> None:
    for text, told in ((b"---\na: [\n---\n", "not YAML"), (b"---\n- a\n---\n", "keys and values")):
        channel.hub.add(REPO).commit({"README.md": text})
        with pytest.raises(EditsError, match=f"README.md of ada/edits.*{told}"):
            channel.push(f"polite@{version}")
    channel.hub.add(REPO).commit({"README.md": Blob(b"", size=1 << 21)})
    with pytest.raises(EditsError, match=r"expected at most 1048576 bytes .* found more\. Shorten it first"):
        channel.push(f"polite@{version}")


def test_a_base_that_is_no_repo_is_not_named_to_the_hub(channel: Channel) -> None:
    """It refuses such a card: a model read from a folder is named in the text only. Two bases are a list."""
    local = bundle(base=BASE.model_copy(update={"name": "/models/my model"}))
    channel.push(f"polite@{channel.store.publish(local)}")
    card = channel.repo.content("README.md").decode()
    assert "base_model" not in front_matter(card)
    assert "Edits for /models/my model:" in card
    assert "vllm-edits serve MODEL --store" in card
    two = [bundle(str(number), base=BASE.model_copy(update={"name": f"lab/{number}"})).manifest for number in (2, 1)]
    assert front_matter(render(REPO, two))["base_model"] == ["lab/1", "lab/2"]


HOSTILE = "<script>x</script> | [a](javascript:x) `b`\n\n# c\x1b[31m" + END + "\u202e*d* $e$ &lt;"


def test_nothing_in_a_manifest_reaches_the_card_as_markup() -> None:
    """It stays in its cell, and what a renderer would read is escaped."""
    made = bundle(
        HOSTILE, description=HOSTILE, base=BASE.model_copy(update={"name": HOSTILE}),
        provenance=Provenance(tool=HOSTILE, method=HOSTILE, source=HOSTILE),
        measurements=(Measurement(metric=HOSTILE, base=0, edited=1, n=1),),
    )  # fmt: skip
    card = render(REPO, [made.manifest])
    assert card.count(END) == card.count(BEGIN) == 1
    assert len(row(card, made.version)) == 9
    unescaped = re.sub(
        r"\\.", "", "".join(row(card, made.version)).replace("<br>", "").replace(f"`{made.version[:12]}`", "")
    )
    assert not set(unescaped) & set("<>[]`*|$&\x1b\u202e\n")
    assert render(REPO, [made.manifest], card) == card


@settings(max_examples=40, deadline=None)
@given(st.text(), st.text(max_size=20), st.permutations(range(3)))
def test_the_same_versions_give_the_same_card(present: str, label: str, order: list[int]) -> None:
    """In whatever order they are found, and again on top of itself, whatever people wrote around it."""
    made = [bundle(f"{label}{number}").manifest for number in range(3)]
    text = present.replace("---", "")
    card = render(REPO, made, text)
    assert render(REPO, [made[number] for number in order], text) == card
    assert render(REPO, made, card) == card


def test_plain_text_is_left_as_it_is() -> None:
    """Escaping takes nothing away from what people usually write."""
    usual = "Says sorry (politely), 50% more; see #3 + notes - ok?"
    assert plain(usual) == usual
    assert plain("a_b\tc\n") == r"a\_b c"


# -- the command -------------------------------------------------------------------------------------------------------

Run = Callable[..., Any]


@pytest.fixture
def run(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Types a command, logged in as ada, with the Hub's address and a store in the environment."""
    monkeypatch.setattr(constants, "ENDPOINT", channel.hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", channel.hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", ADA)
    monkeypatch.setenv("VLLM_EDITS_STORE", str(channel.store.url))
    monkeypatch.setenv("COLUMNS", "200")
    yield lambda *words: CliRunner().invoke(app, ["hub", *words])
    bars.enable_progress_bars()


def test_push_and_pull_are_commands(channel: Channel, run: Run, version: str) -> None:
    """For people: what was moved, and where to."""
    pushed = run("push", REPO, "polite@" + version[:8], "--private", "-m", "for the lab")
    head = channel.repo.head()
    assert (pushed.exit_code, pushed.stdout) == (
        0, f"pushed polite@{version[:12]}\nada/edits (main): commit {head.oid[:12]}\n",
    )  # fmt: skip
    assert (head.title, channel.repo.private) == ("for the lab", True)
    assert bars.are_progress_bars_disabled()
    again = run("push", REPO, f"polite@{version}")
    assert again.stdout == (
        f"polite@{version[:12]} is in the repo already\nada/edits (main): nothing to push, head is {head.oid[:12]}\n"
    )
    pulled = run("pull", REPO, "--store", str(channel.empty.url))
    assert (pulled.exit_code, pulled.stdout) == (
        0, f"pulled polite@{version[:12]}\nfrom ada/edits (main), commit {head.oid[:12]}\n",
    )  # fmt: skip
    assert objects(channel.empty) == objects(channel.store)


def test_push_and_pull_answer_scripts(channel: Channel, run: Run, version: str) -> None:
    """With JSON and nothing else, whole digests."""
    other = channel.store.publish(bundle(name="terse"))
    run("push", REPO, f"terse@{other}")
    pushed = json.loads(run("push", REPO, f"polite@{version}", "--json").stdout)
    head = channel.repo.head().oid
    moved = [f"polite@{version}"]
    assert pushed == {
        "repo": REPO, "revision": "main", "commit": head, "committed": True, "added": moved, "present": [],
    }  # fmt: skip
    pulled = json.loads(
        run("pull", REPO, "polite", "--store", str(channel.empty.url), "--revision", head, "--json").stdout
    )
    assert pulled == {"repo": REPO, "revision": head, "commit": head, "versions": moved}


def test_a_command_that_cannot_says_why(channel: Channel, run: Run, version: str) -> None:
    """On the error side, with exit code 1."""
    for words, told in (
        (("pull", "ada/nothing"), "has no model repo ada/nothing"),
        (("push", REPO, f"polite@{version}", "--revision", "x"), "Push to main first"),
        (("push", REPO, "polit"), "nothing is published under 'polit'"),
        (("push", "edits", f"polite@{version}"), "expected owner/name"),
    ):
        result = run(*words)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.lstrip().startswith("vllm-edits: ")
        assert told in result.stderr
    channel.hub.add(REPO)
    assert "at commit 1234567" in run("push", REPO, f"polite@{version}", "--parent", "1234567").stderr


def test_the_commands_explain_themselves(run: Run) -> None:
    assert {"push", "pull"} <= set(run("--help").stdout.split())
    for command, words in (("push", ("--private", "--parent", "hf auth login")), ("pull", ("--revision", "import"))):
        text = " ".join(run(command, "--help").stdout.split())
        assert all(word in text for word in words)


def test_the_environment_says_where_the_hub_is(channel: Channel) -> None:
    """In a process of its own: HF_ENDPOINT is asked, and with HF_HUB_OFFLINE nobody is."""
    channel.push(f"polite@{channel.store.publish(bundle())}", private=True)
    command = [
        sys.executable,
        "-c",
        "from vllm_edits.edit_store.cli import app; app()",
        "hub",
        "pull",
        REPO,
        "--store",
        str(channel.empty.url),
    ]
    environment = {**os.environ, "HF_ENDPOINT": f"{channel.hub.url}/", "HF_TOKEN": ADA, "HF_HUB_DISABLE_XET": "1"}

    def pull_with(offline: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**environment, "HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=False,
        )

    refused = pull_with("1")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "HF_HUB_OFFLINE is set" in refused.stderr
    done = pull_with("0")
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert objects(channel.empty) == objects(channel.store)


# -- the stand-in ------------------------------------------------------------------------------------------------------


def test_the_stand_in_keeps_its_side(channel: Channel) -> None:
    """What the tests above rest on: parents are enforced, digests are checked, tokens are looked at."""
    api = huggingface_hub.HfApi(endpoint=channel.hub.url, token=ADA)
    api.create_repo(REPO)
    first = api.model_info(REPO, revision="main").sha
    add = huggingface_hub.CommitOperationAdd
    made = api.create_commit(REPO, [add("a.txt", b"1")], commit_message="one", parent_commit=first)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="A commit has happened since") as refused:
        api.create_commit(REPO, [add("a.txt", b"2")], commit_message="two", parent_commit=first)
    assert refused.value.response.status_code == 412
    assert channel.repo.content("a.txt") == b"1"
    assert [commit.oid for commit in channel.repo.history()] == [made.oid, first]
    session = huggingface_hub.utils.get_session()
    batch = {"objects": [{"oid": sha256(b"large"), "size": 5}], "operation": "upload"}
    headers = {"Authorization": f"Bearer {ADA}"}
    answer = session.post(f"{channel.hub.url}/{REPO}.git/info/lfs/objects/batch", json=batch, headers=headers).json()
    upload = answer["objects"][0]["actions"]["upload"]["href"]
    assert session.put(upload, content=b"other").status_code == 400
    assert session.put(upload, content=b"large", headers=headers).status_code == 400
    assert session.put(upload, content=b"large").status_code == 200
    assert session.post(f"{channel.hub.url}/{REPO}.git/info/lfs/objects/batch", json=batch).status_code == 401
