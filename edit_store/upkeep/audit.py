"""Checks a whole store: all digests, records, chains and references. It reads everything and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_edits.edit_store import verify
from vllm_edits.edit_store.backends import get_or_none
from vllm_edits.edit_store.canonical import sha256
from vllm_edits.edit_store.errors import EditsError
from vllm_edits.edit_store.experiments.experiment_log import log_of
from vllm_edits.edit_store.experiments.state import FOLDER, ExperimentEntry, fold, versions_named
from vllm_edits.edit_store.progress import StepDone
from vllm_edits.edit_store.signing import read_envelopes
from vllm_edits.edit_store.storage.store import EditStore, TagEntry


@dataclass(frozen=True)
class Finding:
    """One problem: the object, the problem, and what to do about it."""

    object: str
    problem: str
    fix: str


@dataclass
class Audit:
    """The result of a check: counts and findings."""

    versions: int = 0
    bytes: int = 0
    tags: int = 0
    entries: int = 0
    signatures: int = 0
    findings: list[Finding] = field(default_factory=list)
    garbage: list[str] = field(default_factory=list)
    """objects without a reference: harmless; `gc` removes them"""

    @property
    def clean(self) -> bool:
        return not self.findings


def audit(store: EditStore, progress: StepDone = lambda *_: None) -> Audit:
    """Check all objects of a store."""
    found = Audit()
    store.check_format()
    entries = _check_tags(store, found, progress)
    recorded = _check_records(store, found)
    manifests = {
        item.key.rpartition("/")[2].removesuffix(".json"): item.key for item in store.backend.list("manifests/")
    }
    blobs = {item.key.rpartition("/")[2]: item.key for item in store.backend.list("blobs/")}
    used = _check_versions(store, found, sorted(manifests), progress)
    experiments = _check_experiments(store, found)
    promoted = {entry.version for entry in entries} | versions_named(experiments)
    for version in sorted((recorded | promoted) - set(manifests)):
        where = "promoted" if version in promoted else "published"
        fix = "publish the same bundle again, or copy the version from another store"
        found.findings.append(Finding(f"version {version[:12]}", f"it is {where}, but its manifest is missing", fix))
    for version in sorted(promoted & set(manifests) - recorded):
        fix = "publish the same bundle again"
        found.findings.append(
            Finding(f"version {version[:12]}", "it is promoted, but has no record of a publication", fix)
        )
    found.garbage += [manifests[version] for version in sorted(set(manifests) - recorded - promoted)]
    found.garbage += [blobs[digest] for digest in sorted(set(blobs) - used)]
    _check_signatures(store, found, set(manifests) | {entry.digest for entry in [*entries, *experiments]})
    return found


def _check_tags(store: EditStore, found: Audit, progress: StepDone) -> list[TagEntry]:
    entries: list[TagEntry] = []
    fix = "restore the folder `{}` from a copy of the store; its entries never change"
    try:
        tags = store.all_tags()
    except EditsError as error:
        found.findings.append(Finding("index", str(error), fix.format("index")))
        tags = []
    listed = {(parts[1], parts[2]) for item in store.backend.list("tags/") if len(parts := item.key.split("/")) == 4}
    for name, tag in sorted(listed - set(tags)):
        found.findings.append(
            Finding(f"{name}@{tag}", "it has entries, but the index does not contain it, so servers do not see it",
                    fix.format("index"))
        )  # fmt: skip
    everything = sorted(listed | set(tags))
    for number, (name, tag) in enumerate(everything):
        progress("histories", number, len(everything))
        try:
            history = store.history(name, tag)
        except EditsError as error:
            found.findings.append(Finding(f"{name}@{tag}", str(error), fix.format(f"tags/{name}/{tag}")))
            continue
        found.tags += bool(history)
        found.entries += len(history)
        entries += history
    return entries


def _check_experiments(store: EditStore, found: Audit) -> list[ExperimentEntry]:
    try:
        entries = log_of(store).history()
    except EditsError as error:
        fix = f"restore the folder `{FOLDER}` from a copy of the store; its entries never change"
        found.findings.append(Finding("experiments", str(error), fix))
        return []
    found.entries += len(entries)
    _, without_effect = fold(entries)
    fix = "nothing to do: the entry has no effect; another program wrote it"
    found.findings += [Finding("experiments", note, fix) for note in without_effect]
    return entries


def _check_records(store: EditStore, found: Audit) -> set[str]:
    recorded: set[str] = set()
    for name in store.names():
        try:
            recorded |= {record.version for record in store.versions(name)}
        except EditsError as error:
            recorded |= set(store.version_digests(name))
            fix = "delete this object and publish the bundle again"
            found.findings.append(Finding(f"versions of {name}", str(error), fix))
    return recorded


def _check_versions(store: EditStore, found: Audit, versions: list[str], progress: StepDone) -> set[str]:
    """Check every manifest with its tensors; returns the digests of the tensor files in use."""
    used: set[str] = set()
    fix = "publish the same bundle again, or copy the version from another store"
    for number, version in enumerate(versions):
        progress("versions", number, len(versions))
        try:
            manifest = store.manifest(version)
            used.add(manifest.tensors.sha256)
            bundle = store.with_tensors(version, manifest)
            found.bytes += len(bundle.tensor_bytes)
            verify.check(bundle)
        except EditsError as error:
            found.findings.append(Finding(f"version {version[:12]}", str(error), fix))
        found.versions += 1
    return used


def _check_signatures(store: EditStore, found: Audit, subjects: set[str]) -> None:
    for item in list(store.backend.list("attestations/")):
        *_, subject, file = item.key.split("/")
        data = get_or_none(store.backend, item.key)
        if data is None:
            continue
        if sha256(data) != file.removesuffix(".json") or not read_envelopes([data]):
            fix = "delete this object and sign again with: vllm-edits sign"
            found.findings.append(
                Finding(item.key, "expected a signature with the digest in its name, found other bytes", fix)
            )
        elif subject not in subjects:
            found.garbage.append(item.key)
        else:
            found.signatures += 1
