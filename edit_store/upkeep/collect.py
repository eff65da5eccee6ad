"""Delete what no history, no record young enough, and no writer refers to. Dry unless told otherwise.

Kept: every version that any tag's history names (not the heads alone) or an arm of an experiment, every version
published within the grace time, every object that a writer is about to refer to (`intents.py` says why no clock is
needed for that), and all entries of logs. Deleted in the order of a publication backwards, so an interrupted run leaves
garbage, never a dangling name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm_edits.edit_store.backends import PROBES, Item, LocalFolder
from vllm_edits.edit_store.experiments.experiment_log import log_of
from vllm_edits.edit_store.experiments.state import versions_named
from vllm_edits.edit_store.storage.intents import CONDEMNED, condemned_key, old_intents, relied_on
from vllm_edits.edit_store.storage.store import EditStore

DEFAULT_GRACE_HOURS = 24.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Garbage:
    """What a collection deletes, or would."""

    items: tuple[Item, ...]
    versions: tuple[str, ...]
    """versions among it, published but never promoted"""

    @property
    def bytes(self) -> int:
        return sum(item.size for item in self.items)


def plan(store: EditStore, grace_hours: float = DEFAULT_GRACE_HOURS) -> Garbage:
    """What may be deleted now. Everything younger than the grace time stays. Deletes nothing.

    StoreCorrupt when some history or manifest cannot be read: what it names cannot be known then.
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
    store: EditStore, grace_hours: float = DEFAULT_GRACE_HOURS, progress: Progress = lambda *_: None
) -> Garbage:
    """Delete what `plan` finds, unless a writer has come to rely on it meanwhile. Returns what was deleted."""
    backend = store.backend
    marks = [item.key.rpartition("/")[2] for item in backend.list(CONDEMNED + "/")]  # of a run that was interrupted
    first = plan(store, grace_hours)
    condemned = {_digest(item) for item in first.items if item.key.startswith(("manifests/", "blobs/"))}
    for digest in sorted(condemned):
        backend.put(condemned_key(digest), b"")
    # Who did not see the marks has noted an intent before. If it is gone by now, the reference it stood for is there:
    # so first the intents, then the references.
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
    """Tags of the index, and any that has entries without standing there."""
    listed = {tuple(item.key.split("/")[1:3]) for item in store.backend.list("tags/")}
    return {(name, tag) for name, tag in listed} | set(store.all_tags())


def _digest(item: Item) -> str:
    return item.key.rpartition("/")[2].removesuffix(".json")


def _digests(item: Item) -> tuple[str, ...]:
    """What an object's key names: its own digest, and of a signature also that of its subject."""
    return tuple(part.removesuffix(".json") for part in item.key.split("/"))


def _blobs_of(store: EditStore, digests: set[str]) -> set[str]:
    """Tensor files of those digests that are versions."""
    known = {_digest(item) for item in store.backend.list("manifests/")} & digests
    return {store.manifest(version).tensors.sha256 for version in known}
