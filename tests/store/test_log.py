"""The append-only log: who is late is told, a lost answer is looked up, and whatever breaks the chain is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import FlakyBackend, cheaply
from vllm_edits.edit_store.backends import AlreadyExists, Memory
from vllm_edits.edit_store.canonical import canonical_json
from vllm_edits.edit_store.errors import Conflict, StoreCorrupt, StoreUnavailable
from vllm_edits.edit_store.storage.log import MAX_ENTRY_BYTES, Entry, Log


class Note(Entry):
    text: str


def log_in(backend: Memory | FlakyBackend) -> Log[Note]:
    return Log(backend, "notes", Note, "the notes", "show notes")


def write(log: Log[Note], *texts: str) -> list[Note]:
    return [log.append(log.head(), actor="me", reason="", text=text) for text in texts]


@pytest.fixture
def backend() -> Memory:
    return Memory()


@pytest.fixture
def log(backend: Memory) -> Log[Note]:
    return log_in(backend)


def test_entries_are_numbered_and_chained(log: Log[Note]) -> None:
    first, second, third = write(log, "a", "b", "c")
    assert [entry.sequence for entry in (first, second, third)] == [1, 2, 3]
    assert (first.previous_sha256, second.previous_sha256, third.previous_sha256) == (None, first.digest, second.digest)
    assert log.history() == [first, second, third]
    assert log.head() == third
    assert log.get(2) == second
    assert log.get(4) is None


def test_an_empty_log_has_no_head_and_no_history(log: Log[Note]) -> None:
    assert log.head() is None
    assert log.history() == log.after(None) == []


@given(known=st.integers(0, 6), length=st.integers(0, 6))
@cheaply
def test_who_knows_an_entry_reads_those_after_it(known: int, length: int) -> None:
    log = log_in(Memory())
    entries = write(log, *map(str, range(length)))
    known = min(known, length)
    assert log.after(entries[known - 1] if known else None) == entries[known:]


def test_who_decided_on_an_older_head_is_refused(log: Log[Note]) -> None:
    (first,) = write(log, "a")
    (second,) = write(log, "b")
    with pytest.raises(Conflict, match="Look at `show notes`"):
        log.append(first, actor="late", reason="", text="c")
    assert log.history() == [first, second]


# -- answers that are lost ---------------------------------------------------------------------------------------------


class Unreliable(FlakyBackend):
    """A network between: it loses answers after the write (`lose`), requests before it (`drop`), or answers a racing
    write with 'exists' although there is nothing (`deny`), each so many times."""

    lose = drop = deny = 0

    def create(self, key: str, data: bytes) -> None:
        if self.drop:
            self.drop -= 1
            raise StoreUnavailable("timeout before the write")
        if self.deny:
            self.deny -= 1
            raise AlreadyExists(key)
        super().create(key, data)
        if self.lose:
            self.lose -= 1
            raise StoreUnavailable("timeout after the write")


@pytest.fixture
def unreliable(backend: Memory, monkeypatch: pytest.MonkeyPatch) -> Unreliable:
    monkeypatch.setattr("vllm_edits.edit_store.storage.log._FIRST_PAUSE_SECONDS", 0.0)
    return Unreliable(backend)


@pytest.mark.parametrize("fault", ["lose", "drop", "deny"])
@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_lost_answer_is_looked_up_and_written_once(unreliable: Unreliable, fault: str, times: int) -> None:
    log = log_in(unreliable)
    setattr(unreliable, fault, times)
    entry = log.append(None, actor="me", reason="", text="a")
    assert log.history() == [entry]


def test_a_lost_answer_to_a_lost_race_is_a_conflict(unreliable: Unreliable) -> None:
    """Somebody else's entry is at that number: the write that got no answer did not win."""
    log = log_in(unreliable)
    (first,) = write(log, "a")
    (second,) = write(log, "theirs")
    unreliable.drop = 1
    with pytest.raises(Conflict):
        log.append(first, actor="me", reason="", text="mine")
    assert log.history() == [first, second]


def test_what_stays_unknown_is_said_to_be_unknown(unreliable: Unreliable) -> None:
    unreliable.drop = 99
    with pytest.raises(StoreUnavailable, match=r"it is unknown whether it was written. Look at `show notes`.*timeout"):
        log_in(unreliable).append(None, actor="me", reason="", text="a")


def test_what_is_stored_before_an_entry_is_there_when_the_entry_is(log: Log[Note]) -> None:
    seen: list[Note] = []

    def before(entry: Note) -> None:
        assert log.get(entry.sequence) is None
        seen.append(entry)

    assert log.append(None, before=before, actor="me", reason="", text="a") == seen[0] == log.head()


# -- chains that are broken --------------------------------------------------------------------------------------------

Break = Callable[[Memory, Log[Note]], None]


def key(sequence: int) -> str:
    return f"notes/{sequence:020d}.json"


def rewrite(backend: Memory, _: Log[Note]) -> None:
    entry = Note.model_validate_json(backend.get(key(2)))
    backend.put(key(2), entry.model_copy(update={"text": "other"}).to_bytes())


def remove_in_the_middle(backend: Memory, _: Log[Note]) -> None:
    backend.delete(key(2))


def remove_the_first(backend: Memory, _: Log[Note]) -> None:
    backend.delete(key(1))


def exchange(backend: Memory, _: Log[Note]) -> None:
    second, third = backend.get(key(2)), backend.get(key(3))
    backend.put(key(2), third)
    backend.put(key(3), second)


def garble(backend: Memory, _: Log[Note]) -> None:
    backend.put(key(2), b"\x00 no JSON")


def add_a_field(backend: Memory, _: Log[Note]) -> None:
    entry = Note.model_validate_json(backend.get(key(2)))
    backend.put(key(2), canonical_json({**entry.model_dump(mode="json"), "extra": 1}))


def respell(backend: Memory, _: Log[Note]) -> None:
    backend.put(key(2), backend.get(key(2)) + b"\n")


def blow_up(backend: Memory, _: Log[Note]) -> None:
    backend.put(key(2), b" " * (MAX_ENTRY_BYTES + 1))


@pytest.mark.parametrize(
    "damage",
    [rewrite, remove_in_the_middle, remove_the_first, exchange, garble, add_a_field, respell, blow_up],
)
def test_a_broken_chain_is_found(backend: Memory, log: Log[Note], damage: Break) -> None:
    written = write(log, "a", "b", "c")
    assert log.history() == written
    damage(backend, log)
    with pytest.raises(StoreCorrupt, match="the notes"):
        log.history()


def test_files_that_are_no_entries_are_not_looked_at(backend: Memory, log: Log[Note]) -> None:
    written = write(log, "a")
    for name in ("notes/README", "notes/2.json", "notes/00000000000000000002.json.tmp"):
        backend.put(name, b"?")
    assert log.history() == written
    assert log.head() == written[0]
