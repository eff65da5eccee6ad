"""The Hugging Face Hub as a channel: push versions into a model repo, pull them into another store.

    README.md                                  the model card, see `model_card`
    <name>/<version>/published.json            the members of an export, see `transfer`
    <name>/<version>/manifest.json
    <name>/<version>/edits.safetensors
    <name>/<version>/attestations/<n>.json

A push is one commit on the head that it has read. If another commit is made meanwhile, the whole push is refused. A
push adds missing files and replaces only the card. Pulled files are not trusted: sizes are checked before a file is
fetched, and all versions are checked before the first one is stored. Other files in the top folder of a repo are never
read.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_edits.edit_store.backends import get_or_none
from vllm_edits.edit_store.bundle import MANIFEST_FILE, TENSORS_FILE, Manifest
from vllm_edits.edit_store.canonical import sha256
from vllm_edits.edit_store.errors import (
    AmbiguousVersion,
    BundleRefused,
    Conflict,
    EditsError,
    NotFound,
    Reason,
    StoreCorrupt,
    nearest,
)
from vllm_edits.edit_store.hub import model_card
from vllm_edits.edit_store.hub.hub_repo import DEFAULT_REVISION, Content, File, HubRepo
from vllm_edits.edit_store.hub.model_card import CARD_FILE, MAX_CARD_BYTES
from vllm_edits.edit_store.progress import StepDone
from vllm_edits.edit_store.refs import Ref, is_bundle_name
from vllm_edits.edit_store.storage.store import EditStore, blob_key
from vllm_edits.edit_store.upkeep.transfer import (
    ATTESTATIONS,
    MAX_ATTESTATIONS,
    RECORD_FILE,
    Package,
    attestation_name,
    member_limit,
)

_SHOWN_REASONS = 20
_MEMBER = re.compile(r"(?P<name>[^/]+)/(?P<version>[0-9a-f]{64})/(?P<member>.+)", re.DOTALL)
_SHA256 = re.compile(r"[0-9a-f]{64}")


VersionKey = tuple[str, str]
"""A name and a version."""

Members = dict[str, File]
"""The files of one version, by their names in its folder."""


@dataclass(frozen=True)
class Pushed:
    """The result of a push. `added` and `present` are `name@version`; `commit` is the head afterwards."""

    repo: str
    revision: str
    commit: str
    committed: bool
    added: tuple[str, ...]
    present: tuple[str, ...]


@dataclass(frozen=True)
class Pulled:
    """The result of a pull: the stored versions as `name@version`, and the commit from which they were read."""

    repo: str
    revision: str
    commit: str
    versions: tuple[str, ...]


def push(
    store: EditStore,
    references: Iterable[str],
    repo: str,
    *,
    revision: str = DEFAULT_REVISION,
    private: bool = False,
    message: str = "",
    parent: str | None = None,
    progress: StepDone = lambda *_: None,
    endpoint: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Push versions with their records and signatures in one commit. The repo is created if it does not exist.

    private: create a private repo, and refuse a public one. parent: a commit that was seen before; with it, every
    commit made since then is a Conflict, not only a commit made while this runs.
    """
    wanted = list(dict.fromkeys((Ref.parse(reference).name, store.resolve(reference)) for reference in references))
    if not wanted:
        raise EditsError("nothing to push: name at least one version")
    total = sum(store.manifest(version).tensors.size for _, version in wanted)
    hub_repo = HubRepo(repo, revision, endpoint=endpoint, token=token)
    seen = _Snapshot.of(hub_repo, hub_repo.head_to_push_on(private=private))
    if parent is not None and not (parent and seen.commit.startswith(parent)):
        raise Conflict(
            f"expected {hub_repo} at commit {parent[:12]}, found {seen.commit[:12]}. Look at the new commits, then "
            "push again"
        )

    operations: list[Any] = []
    expected: dict[str, Content] = {}
    added: list[str] = []
    done = 0
    for key in wanted:
        progress(_called(key), done, total)
        package = Package.of(store, _called(key))
        lacking = _lacking(package, seen.versions.get(key, {}), f"{_called(key)} in {hub_repo}")
        files = {_path(key, member): data for member, data in lacking.items()}
        if files:
            operations += hub_repo.upload(files)
            expected |= {path: Content.of(data) for path, data in files.items()}
            added.append(_called(key))
        done += len(package.bundle.tensor_bytes)
    progress("committing", done, total)

    card = _card(store, seen, wanted).encode()
    if CARD_FILE not in seen.files or not seen.files[CARD_FILE].holds(Content.of(card)):
        operations += hub_repo.upload({CARD_FILE: card})
        expected[CARD_FILE] = Content.of(card)
    head = seen.commit
    if operations:
        head = hub_repo.commit(operations, *_message(message, added), parent=seen.commit)
        _require_all(expected, hub_repo.files(head), f"commit {head[:12]} of {hub_repo}")
    present = tuple(called for called in map(_called, wanted) if called not in added)
    return Pushed(repo, revision, head, bool(operations), tuple(added), present)


def pull(
    repo: str,
    store: EditStore,
    *,
    references: Sequence[str] = (),
    revision: str = DEFAULT_REVISION,
    progress: StepDone = lambda *_: None,
    endpoint: str | None = None,
    token: str | None = None,
) -> Pulled:
    """Check versions of a repo and store them: all, or every version of `name`, or `name@version`.

    Either all of them pass every check and are stored, or none is stored. Tags are not pulled.
    """
    hub_repo = HubRepo(repo, revision, endpoint=endpoint, token=token)
    seen = _Snapshot.of(hub_repo, hub_repo.head())
    chosen = _choose(list(seen.versions), references, str(hub_repo))
    with tempfile.TemporaryDirectory(prefix="vllm-edits-") as folder:
        fetched = _fetch(seen, chosen, store, Path(folder), progress)
        reasons = []
        for key in chosen:  # checked again below, so that memory holds only one version at a time
            try:
                _package(key, fetched[key])
            except BundleRefused as refused:
                reasons += [Reason(reason.code, f"{_called(key)}: {reason.message}") for reason in refused.reasons]
        _refuse(str(hub_repo), reasons)
        for key in chosen:
            _package(key, fetched[key]).put(store)
    return Pulled(repo, revision, seen.commit, tuple(map(_called, chosen)))


# -- the files of a repo -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Snapshot:
    """The files and versions of a repo at one commit."""

    repo: HubRepo
    commit: str
    files: dict[str, File]
    versions: dict[VersionKey, Members]

    @classmethod
    def of(cls, repo: HubRepo, commit: str) -> _Snapshot:
        files = repo.files(commit)
        return cls(repo, commit, files, _arrange(files, str(repo)))

    def download(self, path: str, folder: Path) -> Path:
        return self.repo.download(path, self.commit, folder)


def _arrange(files: Mapping[str, File], what: str) -> dict[VersionKey, Members]:
    """The files of each version. BundleRefused lists every file that belongs to no version or is too large."""
    versions: dict[VersionKey, Members] = {}
    reasons = []
    for path, file in sorted(files.items()):
        if "/" not in path:
            continue
        found = _MEMBER.fullmatch(path)
        limit = member_limit(found["member"]) if found is not None and is_bundle_name(found["name"]) else None
        if found is None or limit is None:
            expected = f"<name>/<version>/ with {RECORD_FILE}, {MANIFEST_FILE}, {TENSORS_FILE} and {ATTESTATIONS}"
            told = f"{path!r} is not part of a version: expected {expected}. Move other files to the top folder"
            reasons.append(Reason("unexpected_file", told))
            continue
        if file.size > limit:
            reasons.append(Reason("too_large", f"{path}: expected at most {limit} bytes, found {file.size}"))
        versions.setdefault((found["name"], found["version"]), {})[found["member"]] = file
    for key, members in versions.items():
        if len(_signatures(members)) > MAX_ATTESTATIONS:
            reasons.append(
                Reason("too_large", f"{_called(key)}: expected at most {MAX_ATTESTATIONS} signatures, found more")
            )
    _refuse(what, reasons)
    return versions


def _refuse(what: str, reasons: list[Reason]) -> None:
    """BundleRefused if there are reasons. Only the first ones are listed."""
    if len(reasons) > _SHOWN_REASONS:
        more = Reason(reasons[_SHOWN_REASONS].code, f"and {len(reasons) - _SHOWN_REASONS} more")
        reasons = [*reasons[:_SHOWN_REASONS], more]
    if reasons:
        raise BundleRefused(what, reasons)


def _signatures(members: Iterable[str]) -> list[str]:
    return [member for member in members if member.startswith(ATTESTATIONS)]


def _called(key: VersionKey) -> str:
    return f"{key[0]}@{key[1]}"


def _path(key: VersionKey, member: str) -> str:
    return f"{key[0]}/{key[1]}/{member}"


# -- push --------------------------------------------------------------------------------------------------------------


def _lacking(package: Package, present: Members, what: str) -> dict[str, bytes]:
    """The files to add. The first record of a publication stays. Signatures are added to the existing ones."""
    own = package.members()
    contents = {member: Content.of(data) for member, data in own.items()}
    changed = [
        name for name in (MANIFEST_FILE, TENSORS_FILE) if name in present and not present[name].holds(contents[name])
    ]
    if changed:
        raise StoreCorrupt(
            f"{what}: {', '.join(changed)} does not have the digest of this version. Nothing was pushed. Find out why "
            "the file was changed, delete the version's folder from the repo, then push again"
        )
    taken = _signatures(present)
    free = (attestation_name(number) for number in range(1000) if attestation_name(number) not in present)
    lacking = {member: own[member] for member in (RECORD_FILE, MANIFEST_FILE, TENSORS_FILE) if member not in present}
    lacking |= {
        next(free): own[member]
        for member in _signatures(own)
        if not any(present[each].holds(contents[member]) for each in taken)
    }
    if len(taken) + len(_signatures(lacking)) > MAX_ATTESTATIONS:
        raise EditsError(f"{what} would have more than {MAX_ATTESTATIONS} signatures. Delete some from the repo first")
    return lacking


def _card(store: EditStore, seen: _Snapshot, pushed: Iterable[VersionKey]) -> str:
    """The card for all versions in the repo and all versions that are pushed now."""
    with tempfile.TemporaryDirectory(prefix="vllm-edits-") as folder:
        manifests = [_manifest(store, seen, key, Path(folder)) for key in sorted({*seen.versions, *pushed})]
        present = ""
        if CARD_FILE in seen.files:
            if seen.files[CARD_FILE].size > MAX_CARD_BYTES:
                raise EditsError(
                    f"expected at most {MAX_CARD_BYTES} bytes in {CARD_FILE} of {seen.repo}, found more. Shorten it "
                    "first"
                )
            present = seen.download(CARD_FILE, Path(folder)).read_text("utf-8", errors="replace")
    return model_card.render(seen.repo.name, manifests, present)


def _manifest(store: EditStore, seen: _Snapshot, key: VersionKey, folder: Path) -> Manifest:
    """A version's manifest from the store, else from the repo. Its digest is checked."""
    name, version = key
    what = f"{_called(key)} in {seen.repo}"
    try:
        manifest = store.manifest(version)
    except (NotFound, StoreCorrupt):
        if MANIFEST_FILE not in seen.versions.get(key, {}):
            raise BundleRefused(what, [Reason("archive", f"expected {MANIFEST_FILE}, found none")]) from None
        data = seen.download(_path(key, MANIFEST_FILE), folder).read_bytes()
        if sha256(data) != version:
            raise BundleRefused(
                what,
                [Reason("digest", f"expected the digest {version[:12]} of {MANIFEST_FILE}, found {sha256(data)[:12]}")],
            ) from None
        manifest = Manifest.from_bytes(data, what)
    if manifest.name != name:
        raise BundleRefused(
            what, [Reason("archive", f"expected the name {name!r} in the manifest, found {manifest.name!r}")]
        )
    return manifest


def _message(message: str, added: list[str]) -> tuple[str, str]:
    """Summary and description of the commit."""
    short = [f"{name}@{version[:12]}" for name, _, version in (each.partition("@") for each in added)]
    shown = ", ".join(short[:3]) + (f" and {len(short) - 3} more" if len(short) > 3 else "")
    return message or (f"Add {shown}" if added else "Update the model card"), "\n".join(added)


def _require_all(expected: Mapping[str, Content], found: Mapping[str, File], what: str) -> None:
    """StoreCorrupt if a pushed file is missing. huggingface_hub silently leaves out files that a .gitignore names."""
    absent = [path for path, content in expected.items() if path not in found or not found[path].holds(content)]
    if absent:
        raise StoreCorrupt(
            f"{what} does not contain {', '.join(absent[:3])}{' and more' if len(absent) > 3 else ''}, although it was "
            "pushed. Probably a .gitignore in the repo excludes it: remove that rule and push again"
        )


# -- pull --------------------------------------------------------------------------------------------------------------


def _choose(present: list[VersionKey], references: Sequence[str], what: str) -> list[VersionKey]:
    """The requested versions, or all versions if none was requested."""
    if not present:
        raise NotFound(f"{what} contains no versions. Push a version with: vllm-edits hub push")
    if not references:
        return present
    return list(dict.fromkeys(key for reference in references for key in _matching(present, reference, what)))


def _matching(present: list[VersionKey], reference: str, what: str) -> list[VersionKey]:
    ref, names = Ref.parse(reference), sorted({name for name, _ in present})
    named = [key for key in present if key[0] == ref.name]
    if not named:
        raise NotFound(f"{what} contains no {ref.name!r}, only {', '.join(names)}.{nearest(ref.name, names)}")
    if "@" not in reference:
        return named
    if not ref.is_version:
        raise NotFound(f"{reference}: expected a name or name@version, found a tag. {what} contains no tags")
    matches = [key for key in named if key[1].startswith(ref.selector)]
    if not matches:
        raise NotFound(f"{what} contains no version {ref.selector} of {ref.name!r}")
    if len(matches) > 1:
        raise AmbiguousVersion(
            f"{ref} matches {len(matches)} versions: {', '.join(key[1][:16] for key in matches)}. Give more digits"
        )
    return matches


def _fetch(
    seen: _Snapshot, chosen: list[VersionKey], store: EditStore, folder: Path, progress: StepDone
) -> dict[VersionKey, dict[str, Path]]:
    """Fetch every file into `folder`. Equal files are fetched once; tensors that the store has are copied from it."""
    total = sum(file.size for key in chosen for file in seen.versions[key].values())
    done = 0
    known: dict[str, Path] = {}
    fetched: dict[VersionKey, dict[str, Path]] = {key: {} for key in chosen}
    for key in chosen:
        for member, file in seen.versions[key].items():
            progress(_called(key), done, total)
            if file.git not in known:
                stored = _from_store(store, file, folder) if member == TENSORS_FILE else None
                known[file.git] = stored or seen.download(_path(key, member), folder)
            fetched[key][member] = known[file.git]
            done += file.size
    progress("checking", done, total)
    return fetched


def _from_store(store: EditStore, file: File, folder: Path) -> Path | None:
    """A copy of the store's blob, or None if the store does not have it undamaged."""
    if file.sha256 is None or not _SHA256.fullmatch(file.sha256):
        return None
    data = get_or_none(store.backend, blob_key(file.sha256))
    if data is None or sha256(data) != file.sha256:
        return None
    path = folder / ".stored" / file.sha256  # no bundle is named so
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def _package(key: VersionKey, members: Mapping[str, Path]) -> Package:
    """A fetched version. It is checked, and must be the version that its folder names."""
    package = Package.of_members({member: path.read_bytes() for member, path in members.items()}, _called(key))
    found = (package.record.name, package.record.version)
    if found != key:
        raise BundleRefused(_called(key), [Reason("archive", f"its folder contains {_called(found)}")])
    return package
