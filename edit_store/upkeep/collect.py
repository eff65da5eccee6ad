"""Collects garbage: deletes versions that were never promoted, and objects without a reference.

Kept are: every version in the history of a tag or in an arm of an experiment, every version published within the grace
time, every object that a writer is about to refer to (see `intents.py`), and all entries of logs. Objects are deleted
in the reverse order of a publication. So an interrupted run leaves garbage, never a reference to a missing object.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from vllm_edits.edit_store.backends import PROBES, Item, LocalFolder
from vllm_edits.edit_store.experiments.experiment_log import log_of
from vllm_edits.edit_store.experiments.state import versions_named
from vllm_edits.edit_store.progress import CountDone
from vllm_edits.edit_store.storage.intents import CONDEMNED, condemned_key, old_intents, relied_on
from vllm_edits.edit_store.storage.store import EditStore

DEFAULT_GRACE_HOURS = 24.0


@dataclass(frozen=True)
class Garbage:
    """The objects that a collection deletes, or would delete."""

    items: tuple[Item, ...]
    versions: tuple[str, ...]
    """versions among them; each was published but never promoted"""

    @property
    def bytes(self) -> int:
        return sum(item.size for item in self.items)


def plan(store: EditStore, grace_hours: float = DEFAULT_GRACE_HOURS) -> Garbage:
    """List the objects that may be deleted now. Objects younger than the grace time are kept. Nothing is deleted.

    StoreCorrupt if a history or a manifest cannot be read, because its references are unknown then.
    """
    before = time.time() - grace_hours * 3600
    backend = store.backend
    histories = [store.history(name, tag) for name, tag in _every_tag(store)]
    experiments = log_of(store).history()
    promoted = {entry.version for history in histories for entry in history} | versions_named(experiments)
    entries = {entry.digest for history in histories for entry in history} | {entry.digest for entry in experiments}
    records = list(backend.list("versions/"))
    old_records = [item for item in records if item.modified < before and _digest(item) not in promoted]
    kept = promoted | ({_digest(item) for item in records} - {_digest(item) for item in old_records})
    manifests = {_digest(item): item for item in backend.list("manifests/")}
    dead = {version for version, item in manifests.items() if version not in kept and item.modified < before}
    needed = {store.manifest(version).tensors.sha256 for version in set(manifests) - dead}
    blobs = [item for item in backend.list("blobs/") if item.modified < before and _digest(item) not in needed]
    subjects = (set(manifests) - dead) | entries
    signatures = [
        item
        for item in backend.list("attestations/")
        if item.modified < before and item.key.split("/")[3] not in subjects
    ]
    leftovers = [item for item in backend.list(PROBES + "/") if item.modified < before] + old_intents(backend, before)
    items = [*old_records, *signatures, *(manifests[version] for version in sorted(dead)), *blobs, *leftovers]
    return Garbage(tuple(items), tuple(sorted(dead)))


def collect(
    store: EditStore, grace_hours: float = DEFAULT_GRACE_HOURS, progress: CountDone = lambda *_: None
) -> Garbage:
    """Delete the objects that `plan` lists, unless a writer is about to refer to them; returns the deleted objects."""
    backend = store.backend
    marks = [item.key.rpartition("/")[2] for item in backend.list(CONDEMNED + "/")]  # of a run that was interrupted
    first = plan(store, grace_hours)
    condemned = {_digest(item) for item in first.items if item.key.startswith(("manifests/", "blobs/"))}
    for digest in sorted(condemned):
        backend.put(condemned_key(digest), b"")
    # A writer that did not see the marks has written its intent before. If the intent is gone by now, its reference is
    # there. So read the intents first, then the references.
    spared = relied_on(backend)
    second = plan(store, grace_hours)
    sparing = spared | _blobs_of(store, spared)
    deleted = [item for item in second.items if item in first.items and not sparing & set(_digests(item))]
    for number, item in enumerate(deleted):
        progress(number, len(deleted))
        backend.delete(item.key)
    for digest in sorted(condemned | set(marks)):
        backend.delete(condemned_key(digest))
    if isinstance(backend, LocalFolder):
        backend.sweep(time.time() - grace_hours * 3600)
    gone = {_digest(item) for item in deleted if item.key.startswith("manifests/")}
    return Garbage(tuple(deleted), tuple(sorted(gone)))


def _every_tag(store: EditStore) -> set[tuple[str, str]]:
    """All tags of the index, and tags that have entries but are not in the index."""
    listed = {tuple(item.key.split("/")[1:3]) for item in store.backend.list("tags/")}
    return {(name, tag) for name, tag in listed} | set(store.all_tags())


def _digest(item: Item) -> str:
    return item.key.rpartition("/")[2].removesuffix(".json")


def _digests(item: Item) -> tuple[str, ...]:
    """The digests in an object's key: its own, and for a signature also the digest of its subject."""
    return tuple(part.removesuffix(".json") for part in item.key.split("/"))


def _blobs_of(store: EditStore, digests: set[str]) -> set[str]:
    """The tensor files of the digests that are versions."""
    known = {_digest(item) for item in store.backend.list("manifests/")} & digests
    return {store.manifest(version).tensors.sha256 for version in known}
