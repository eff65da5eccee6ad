"""How a server follows a store: cheaply, tag by tag, and never backwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.experiments import document
from tests.support.fakes import FlakyBackend
from tests.support.store import promoted
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.backends import Item
from vllm_edits.edit_store.errors import EditsError, StoreUnavailable
from vllm_edits.edit_store.experiments.document import Experiment
from vllm_edits.edit_store.experiments.experiment_log import Experiments
from vllm_edits.edit_store.experiments.state import ExperimentChange
from vllm_edits.edit_store.reading.follow import Follower, Seen


class Counting(FlakyBackend):
    """Counts what a look costs."""

    reads = listings = 0

    def get(self, key: str) -> bytes:
        self.reads += 1
        return super().get(key)

    def list(self, prefix: str) -> Iterator[Item]:
        self.listings += 1
        return super().list(prefix)


@pytest.fixture
def store(tmp_path: Path) -> EditStore:
    return EditStore(str(tmp_path / "store"), create=True)


def counting(store: EditStore) -> Counting:
    store.backend = Counting(store.backend)
    return store.backend


def versions(follower: Follower) -> dict[tuple[str, str], str]:
    found = follower.look()
    assert not found.broken
    return {(name, tag): head.version for name, tags in found.heads.items() for tag, head in tags.items()}


def test_a_look_finds_what_moved_and_what_is_new(store: EditStore) -> None:
    follower = Follower(store)
    assert versions(follower) == {}
    first, second = promoted(store, "1", "2")
    assert versions(follower) == {("polite", "prod"): second}
    store.rollback("polite")
    store.promote(f"polite@{second}", tag="beta")
    assert versions(follower) == {("polite", "prod"): first, ("polite", "beta"): second}


def test_several_entries_at_once_end_at_the_last(store: EditStore) -> None:
    follower = Follower(store)
    promoted(store, "1")
    follower.look()
    *_, last = promoted(store, "2", "3", "4")
    assert versions(follower) == {("polite", "prod"): last}


@pytest.mark.parametrize("tags", [1, 5])
def test_a_look_at_an_unchanged_store_costs_one_read_per_tag_and_three(store: EditStore, tags: int) -> None:
    """The format, the index, the experiments, and the entry after the last of each tag; no listing, however long."""
    (version, *_) = promoted(store, "1", "2", "3")
    for number in range(tags - 1):
        store.promote(f"polite@{version}", tag=f"tag-{number}")
    follower, backend = Follower(store), counting(store)
    follower.look()
    backend.reads = backend.listings = 0
    follower.look()
    assert (backend.reads, backend.listings) == (tags + 3, 0)


def test_a_store_that_is_gone_is_not_empty(store: EditStore) -> None:
    follower = Follower(store)
    promoted(store, "1")
    follower.look()
    Path(store.url).rename(store.url + "-gone")
    with pytest.raises(StoreUnavailable):
        follower.look()
    Path(store.url + "-gone").rename(store.url)
    (second,) = promoted(store, "2")
    assert versions(follower) == {("polite", "prod"): second}


def test_a_broken_tag_keeps_its_head_and_the_others_go_on(store: EditStore) -> None:
    first, second = promoted(store, "1", "2")
    store.promote(f"polite@{first}", tag="beta")
    follower = Follower(store)
    follower.look()
    forged = store.head("polite").model_copy(update={"sequence": 3, "previous_sha256": "0" * 64})  # type: ignore[union-attr]
    store.backend.create("tags/polite/prod/00000000000000000003.json", forged.to_bytes())
    store.promote(f"polite@{second}", tag="beta")
    found = follower.look()
    assert found.heads["polite"]["prod"].version == second
    assert found.heads["polite"]["beta"].version == second
    assert "does not contain the digest of the entry before" in str(found.broken["polite", "prod"])


def test_an_entry_of_another_tag_at_the_end_of_a_chain_is_refused(store: EditStore) -> None:
    """It follows the one before, but was written for something else: nothing is served by it, here or there."""
    first, second = promoted(store, "1", "2")
    follower = Follower(store)
    follower.look()
    head = store.head("polite")
    assert head is not None
    alien = head.model_copy(update={"sequence": 3, "previous_sha256": head.digest, "name": "other", "version": first})
    store.backend.create("tags/polite/prod/00000000000000000003.json", alien.to_bytes())
    found = follower.look()
    assert found.heads["polite"]["prod"].version == second
    assert "was written for other@prod" in str(found.broken["polite", "prod"])


# -- what a node remembers ---------------------------------------------------------------------------------------------


def entry_path(store: EditStore, sequence: int) -> Path:
    return Path(store.url, f"tags/polite/prod/{sequence:020d}.json")


def seen(store: EditStore, tmp_path: Path) -> Seen:
    """As read by a process that has just started."""
    return Seen(tmp_path / "node", store.url)


def test_a_history_that_was_wound_back_is_refused_after_a_restart(store: EditStore, tmp_path: Path) -> None:
    """Somebody who may write to the bucket deletes the rollback of a bad version."""
    promoted(store, "1", "2")
    rolled_back = store.rollback("polite")
    Follower(store, seen(store, tmp_path)).look()
    entry_path(store, 3).unlink()
    assert "polite" in Follower(store).look().heads, "positive control: who remembers nothing believes it"
    found = Follower(store, seen(store, tmp_path)).look()
    assert "polite" not in found.heads
    assert "was cut: this node has seen entry 3, but the store ends at entry 2" in str(found.broken["polite", "prod"])
    entry_path(store, 3).write_bytes(rolled_back.to_bytes())
    assert Follower(store, seen(store, tmp_path)).look().heads["polite"]["prod"] == rolled_back


def test_a_history_that_was_rewritten_is_refused_after_a_restart(store: EditStore, tmp_path: Path) -> None:
    promoted(store, "1", "2")
    Follower(store, seen(store, tmp_path)).look()
    other = store.head("polite").model_copy(update={"actor": "mallory"})  # type: ignore[union-attr]
    entry_path(store, 2).write_bytes(other.to_bytes())
    found = Follower(store, seen(store, tmp_path)).look()
    assert "was rewritten: entry 2 differs from the one that this node has seen" in str(found.broken["polite", "prod"])


def test_what_is_remembered_is_per_store_and_grows_only(store: EditStore, tmp_path: Path) -> None:
    promoted(store, "1", "2")
    Follower(store, seen(store, tmp_path)).look()
    other = EditStore(str(tmp_path / "other"), create=True)
    (version,) = promoted(other, "1")
    assert Follower(other, seen(other, tmp_path)).look().heads["polite"]["prod"].version == version
    promoted(store, "3")
    assert Follower(store, seen(store, tmp_path)).look().heads["polite"]["prod"].sequence == 3


def test_a_memory_that_cannot_be_read_is_told(store: EditStore, tmp_path: Path) -> None:
    promoted(store, "1")
    Follower(store, seen(store, tmp_path)).look()
    (path,) = (tmp_path / "node" / "seen").glob("*.json")
    path.write_text("{")
    with pytest.raises(EditsError, match="If the store is right, delete the file"):
        seen(store, tmp_path)


def of_tone(operation: Any, **fields: Any) -> ExperimentChange:
    return ExperimentChange(experiment="tone", operation=operation, **fields)


def test_experiments_are_followed_entry_by_entry(store: EditStore) -> None:
    """Those that were there before the first look, and those that came later."""
    promoted(store, "1")
    experiments, follower = Experiments(store), Follower(store)
    assert follower.look().experiments == {}
    experiments.create(Experiment.parse(document()))
    assert follower.look().experiments["tone"].status == "draft"
    experiments.change(of_tone("start"))
    assert follower.look().experiments == Follower(store).look().experiments == experiments.standings()[0]


def test_an_entry_that_is_not_trusted_counts_when_it_is(store: EditStore) -> None:
    """A start that a second promoter has still to sign for changes nothing until then."""
    promoted(store, "1")
    experiments, signed = Experiments(store), {1}
    follower = Follower(store, trusted=lambda entry: entry.sequence in signed)
    experiments.create(Experiment.parse(document()))
    experiments.change(of_tone("start"))
    assert follower.look().experiments["tone"].status == "draft"
    signed.add(2)
    assert follower.look().experiments["tone"].status == "running"


def test_experiments_that_were_wound_back_are_refused_after_a_restart(store: EditStore, tmp_path: Path) -> None:
    """A stop that somebody took away: what this node has seen is remembered, the tags are followed all the same."""
    promoted(store, "1")
    experiments = Experiments(store)
    experiments.create(Experiment.parse(document()))
    experiments.change(of_tone("start"))
    experiments.change(of_tone("stop"))
    Follower(store, Seen(tmp_path, store.url)).look()
    store.backend.delete(f"experiments/{3:020d}.json")
    found = Follower(store, Seen(tmp_path, store.url)).look()
    assert "the experiments was cut" in str(found.broken["experiments", "*"])
    assert found.experiments == {}
    assert "polite" in found.heads
    never_saw = Follower(store, Seen(tmp_path / "other", store.url)).look()
    assert never_saw.experiments["tone"].status == "running"
