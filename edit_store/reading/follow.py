"""Follows the tags and experiments of a store, with one small read for each log at every look.

It runs in the API process, every `poll_seconds`. The first look reads the head of every tag. Later looks ask only for
the entry after the last known one, which mostly does not exist. The node remembers the highest entries that it has
seen. So a log that was cut is refused after a restart, too.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vllm_edits.edit_store.canonical import sha256
from vllm_edits.edit_store.errors import EditsError, StoreCorrupt
from vllm_edits.edit_store.experiments.experiment_log import log_of
from vllm_edits.edit_store.experiments.state import ExperimentEntry, Standings, fold
from vllm_edits.edit_store.storage.log import E, Entry
from vllm_edits.edit_store.storage.store import EditStore, Heads, IndexEntry, TagEntry, TagKey

EXPERIMENTS: TagKey = ("experiments", "*")
"""The key of the log of experiments, beside the keys of tags. No tag has this name."""


@dataclass(frozen=True)
class StoreState:
    """The last entry of every tag, withdrawals included, and the state of every experiment.

    A broken log keeps its last good entry, and other logs are followed. `passed_over` describes entries of experiments
    that have no effect.
    """

    heads: Heads
    broken: Mapping[TagKey, EditsError]
    experiments: Standings = field(default_factory=dict)
    passed_over: Sequence[str] = ()


class Follower:
    """The logs of one store, kept up to date. Not safe to use from two threads at once.

    `trusted` is True for an entry of the experiments that counts. It is asked again about the others at every look.
    """

    def __init__(
        self, store: EditStore, seen: Seen | None = None,
        trusted: Callable[[ExperimentEntry], bool] = lambda _: True,
    ) -> None:  # fmt: skip
        self._store = store
        self._seen = seen
        self._trusted = trusted
        self._index: IndexEntry | None = None
        self._heads: dict[TagKey, TagEntry | None] = {}
        self._experiments: list[ExperimentEntry] = []
        self._read_experiments = False
        self._untrusted: list[ExperimentEntry] = []
        self._folded: tuple[Standings, list[str]] = {}, []

    def look(self) -> StoreState:
        """Read the new entries. StoreUnavailable if the store is missing or does not answer."""
        self._store.check_format()
        for entry in self._store.index().after(self._index):
            self._heads.setdefault((entry.name, entry.tag), None)
            self._index = entry
        broken: dict[TagKey, EditsError] = {}
        with ThreadPoolExecutor(self._store.backend.parallel) as pool:
            for key, found in zip(self._heads, pool.map(self._newest, list(self._heads)), strict=True):
                if isinstance(found, StoreCorrupt):
                    broken[key] = found
                else:
                    self._heads[key] = found
        heads: dict[str, dict[str, TagEntry]] = {}
        for (name, tag), head in self._heads.items():
            if head is not None:
                heads.setdefault(name, {})[tag] = head
        try:
            self._follow_experiments()
        except StoreCorrupt as error:
            broken[EXPERIMENTS] = error
        if self._seen is not None:
            self._seen.remember(self._last_entries())
        return StoreState(heads, broken, *self._folded)

    def _last_entries(self) -> dict[TagKey, Entry]:
        last: dict[TagKey, Entry] = {key: head for key, head in self._heads.items() if head is not None}
        if self._experiments:
            last[EXPERIMENTS] = self._experiments[-1]
        return last

    def _follow_experiments(self) -> None:
        log = log_of(self._store)
        if self._read_experiments:
            new = log.after(self._experiments[-1] if self._experiments else None)
        else:
            new = log.history()
            if self._seen is not None:
                self._seen.require(EXPERIMENTS, new[-1] if new else None, log.get)
            self._read_experiments = True
        self._experiments += new
        waiting = [*self._untrusted, *new]
        self._untrusted = [entry for entry in waiting if not self._trusted(entry)]
        if len(self._untrusted) < len(waiting):
            untrusted = {entry.sequence for entry in self._untrusted}
            self._folded = fold(entry for entry in self._experiments if entry.sequence not in untrusted)

    def _newest(self, key: TagKey) -> TagEntry | StoreCorrupt | None:
        known, log = self._heads[key], self._store.tag_log(*key)
        try:
            if known is not None:
                return [known, *log.after(known)][-1]
            head = self._store.head(*key)
            if self._seen is not None:
                self._seen.require(key, head, log.get)
        except StoreCorrupt as error:
            return error
        return head


class Seen:
    """The highest entry of each log of one store that this node has seen, kept in a file."""

    def __init__(self, folder: Path, url: str) -> None:
        self._path = folder / "seen" / f"{sha256(url.encode())[:16]}.json"
        self._known = self._read()

    def _read(self) -> dict[str, tuple[int, str]]:
        if not self._path.is_file():
            return {}
        try:
            tags = json.loads(self._path.read_bytes())["tags"]
            return {key: (int(number), str(digest)) for key, (number, digest) in tags.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise EditsError(
                f"{self._path} cannot be read: {error}. It records the promotions that this node has seen. "
                "If the store is right, delete the file"
            ) from None

    def require(self, key: TagKey, head: E | None, get: Callable[[int], E | None]) -> None:
        """StoreCorrupt if a log is shorter than this node has seen, or has another entry at that number."""
        number, digest = self._known.get("/".join(key), (0, ""))
        if number == 0:
            return
        name = "the experiments" if key == EXPERIMENTS else "@".join(key)
        fix = f"Restore the store. If the store is right, delete {self._path}"
        end = head.sequence if head else 0
        entry = head if end == number else get(number)
        if end < number or entry is None:
            raise StoreCorrupt(
                f"history of {name} was cut: this node has seen entry {number}, but the store ends at entry {end}. "
                f"{fix}"
            )
        if entry.digest != digest:
            raise StoreCorrupt(
                f"history of {name} was rewritten: entry {number} differs from the one that this node has seen. {fix}"
            )

    def remember(self, heads: Mapping[TagKey, Entry]) -> None:
        """Record these heads. A head is never replaced by a lower one, whichever process of the node recorded it."""
        found = {"/".join(key): (head.sequence, head.digest) for key, head in heads.items()}
        higher = {key: value for key, value in found.items() if value[0] > self._known.get(key, (0, ""))[0]}
        if not higher:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            noted = self._read()
            self._known = {key: max(noted.get(key, (0, "")), higher.get(key, (0, ""))) for key in noted | higher}
            staged = self._path.with_suffix(".new")
            staged.write_text(json.dumps({"tags": self._known}))
            staged.replace(self._path)
