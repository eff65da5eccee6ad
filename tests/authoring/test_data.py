"""Data for authoring methods: read whole, or refused with every problem and before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_edits.edit_store.authoring.data import MOST_TOLD, Row, Table, Text, TextRow, read
from vllm_edits.edit_store.errors import BundleRefused


class Pair(Row):
    """Two texts."""

    wanted: Text
    unwanted: Text
    weight: float = 1.0


class Note(Row):
    """A note."""

    note: Text


TABLES = {
    "pairs": Table(Pair, "pairs", least=2),
    "held_out": Table(Pair, "pairs to judge by", least=0, apart_from="pairs"),
    "notes": Table(Note, "notes", least=0),
    "remarks": Table(Note, "remarks", least=0),
    "text": Table(TextRow, "ordinary text", usual=(TextRow(text="It rains."),)),
}
GOOD = [{"wanted": "yes", "unwanted": "no"}, {"wanted": "up", "unwanted": "down", "weight": 2}]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return to


def refused(*files: str | Path) -> dict[str, str]:
    """The reasons of a refusal, by code."""
    with pytest.raises(BundleRefused) as caught:
        read(TABLES, files)
    return {reason.code: reason.message for reason in caught.value.reasons}


def test_a_file_belongs_to_the_table_with_its_columns_or_its_name(write: Write) -> None:
    text = write("a.jsonl", {"text": "One."}, "", {"text": "Two."})
    data = read(TABLES, [write("b.jsonl", *GOOD), text])
    assert data["pairs"] == (Pair(wanted="yes", unwanted="no"), Pair(wanted="up", unwanted="down", weight=2))
    assert data.texts("text") == ["One.", "Two."]
    assert data["held_out"] == ()
    assert set(data.files) == {"pairs", "text"}
    usual = read(TABLES, [f"pairs={write('b.jsonl', *GOOD)}"])
    assert usual.texts("text") == ["It rains."]
    assert usual.digests()["pairs"] == data.digests()["pairs"]
    assert usual.digests()["text"] != data.digests()["text"]


def test_columns_that_fit_two_tables_or_none_are_told(write: Write) -> None:
    assert "fit notes and remarks" in refused(write("a.jsonl", {"note": "One."}))["which_table"]
    wrong = refused(write("b.jsonl", {"wnated": "yes", "unwanted": "no"}))
    assert "found the columns unwanted, wnated" in wrong["columns"]
    assert "Did you mean 'wanted'" in wrong["columns"]
    assert wrong["too_few_rows"].startswith("pairs: expected 2 rows or more")


def test_every_problem_is_told_at_once(write: Write, tmp_path: Path) -> None:
    pairs = write("pairs.jsonl", *GOOD, {"wanted": " ", "unwanted": "no"}, {"wanted": "yes", "unwanted": "no"})
    held = write("held.jsonl", GOOD[0])
    not_json = write("text.jsonl", {"text": "One."}, "{broken")
    found = refused(f"pairs={pairs}", f"held_out={held}", not_json, tmp_path / "none.jsonl")
    assert "line 3: wanted" in found["row"]
    assert "more than once" in found["twice"]
    assert "1 rows are in held_out and in pairs" in found["leak"]
    assert "line 2" in found["not_json"]
    assert "none.jsonl" in found["no_file"]
    assert set(found) == {"row", "twice", "leak", "not_json", "no_file"}


def test_what_is_no_table_of_rows_is_told(write: Write, tmp_path: Path) -> None:
    assert "has no rows" in refused(write("a.jsonl", ""))["empty"]
    assert "found list" in refused(write("b.jsonl", [1]))["not_json"]
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xff"}')
    assert "0xff" in refused(tmp_path / "c.jsonl")["not_text"]
    assert (
        "Join the files, or say TABLE=FILE"
        in refused(*(f"pairs={write(f'{name}.jsonl', *GOOD)}" for name in "de"))["twice"]
    )


def test_many_wrong_rows_are_told_briefly(write: Write) -> None:
    path = write("a.jsonl", *GOOD, *({"wanted": "", "unwanted": str(each)} for each in range(50)))
    with pytest.raises(BundleRefused) as caught:
        read(TABLES, [f"pairs={path}"])
    assert len(caught.value.reasons) == MOST_TOLD + 1
    assert "45 more rows are wrong" in str(caught.value)
