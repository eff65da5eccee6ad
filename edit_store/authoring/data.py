"""The data of an authoring method: JSON lines with the columns that the method names, checked before a model is loaded.

A method declares tables. A file belongs to the table that it is named for (`held_out=people.jsonl`), or else to the one
table with its columns that must have rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints, ValidationError

from vllm_edits.edit_store.canonical import canonical_json, sha256
from vllm_edits.edit_store.errors import BundleRefused, Reason, nearest
from vllm_edits.edit_store.record import FrozenRecord

MAX_FILE_BYTES = 1 << 30
MOST_TOLD = 5
"""rows of one file whose problem is told; the others are counted"""

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
"""A column with text in it: not empty, not only spaces."""


Word = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
"""A column with a word, as texts say it: spaces around it are left out."""


class Row(FrozenRecord):
    """A row of a table. Its fields are the columns."""

    @classmethod
    def columns(cls) -> tuple[set[str], set[str]]:
        """The columns that every row must have, and all that it may have."""
        return {name for name, of in cls.model_fields.items() if of.is_required()}, set(cls.model_fields)


class TextRow(Row):
    """A row with a text."""

    text: Text


class PromptRow(Row):
    """A row with a prompt, or a question."""

    prompt: Text


@dataclass(frozen=True)
class Table:
    """A table that a method wants. With `least` = 0 it may be left out."""

    row: type[Row]
    what: str
    least: int = 1
    """the fewest rows"""
    usual: tuple[Row, ...] = ()
    """rows that are taken where no file has any"""
    apart_from: str = ""
    """another table with which it must not share a row, as held-out data must not"""

    def __str__(self) -> str:
        required, known = self.row.columns()
        return ", ".join([*sorted(required), *(f"{name} (optional)" for name in sorted(known - required))])


@dataclass(frozen=True)
class Data:
    """Rows by table."""

    rows: Mapping[str, tuple[Any, ...]]
    files: Mapping[str, Path] = field(default_factory=dict)
    """by table; a table that is not here has its usual rows"""

    def __getitem__(self, table: str) -> tuple[Any, ...]:
        return self.rows[table]

    def texts(self, table: str) -> list[str]:
        """The column `text` of a table."""
        return [row.text for row in self.rows[table]]

    def digests(self) -> dict[str, str]:
        """The SHA-256 of every table's rows, in their order."""
        return {
            name: sha256(canonical_json([row.model_dump(mode="json") for row in rows]))
            for name, rows in sorted(self.rows.items())
        }


def read(tables: Mapping[str, Table], files: Sequence[str | Path]) -> Data:
    """Read files into tables. BundleRefused lists every problem of every file."""
    problems: list[Reason] = []
    named: dict[str, Path] = {}
    rows: dict[str, tuple[Any, ...]] = {}
    for given in files:
        try:
            name, path, found = _opened(str(given), tables)
        except _Wrong as wrong:
            problems.append(wrong.reason)
            continue
        if name in named:
            problems.append(
                Reason("twice", f"{path}: table {name!r} is {named[name]} already. Join the files, or say TABLE=FILE")
            )
            continue
        named[name] = path
        rows[name] = tuple(_rows(path, found, tables[name].row, problems))
    for name, table in tables.items():
        if name not in named:
            rows[name] = table.usual
    problems += _problems(tables, rows, named)
    if problems:
        raise BundleRefused("the data", problems)
    return Data(rows, named)


class _Wrong(Exception):
    def __init__(self, code: str, message: str) -> None:
        self.reason = Reason(code, message)


Lines = list[tuple[int, dict[str, Any]]]
"""Objects of a file, each with the number of its line."""


def _opened(given: str, tables: Mapping[str, Table]) -> tuple[str, Path, Lines]:
    """The table, the path and the lines of `table=file` or of a file."""
    name, equals, path = given.partition("=")
    if equals and name in tables:
        return name, Path(path), _lines(Path(path))
    found = _lines(Path(given))
    return _table_of(Path(given), found, tables), Path(given), found


def _lines(path: Path) -> Lines:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise _Wrong("too_large", f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {size}")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise _Wrong("no_file", f"{path}: {error.strerror}. Name a file of JSON lines") from None
    except UnicodeDecodeError as error:
        raise _Wrong("not_text", f"{path}: expected UTF-8, found byte {error.object[error.start]:#04x}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _Wrong("not_json", f"{path}, line {number}: expected a JSON object, found: {error}") from None
        if not isinstance(row, dict):
            raise _Wrong("not_json", f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        found.append((number, row))
    if not found:
        raise _Wrong("empty", f"{path} has no rows. Give one JSON object a line")
    return found


def _table_of(path: Path, rows: Lines, tables: Mapping[str, Table]) -> str:
    """The table with the columns of the first row. Of several, the one that must have rows."""
    columns = set(rows[0][1])
    fits = [name for name, table in tables.items() if _fits(columns, table)]
    fits = [name for name in fits if tables[name].least and not tables[name].usual] or fits
    if len(fits) == 1:
        return fits[0]
    wanted = "; ".join(f"{name}: {table}" for name, table in tables.items())
    if fits:
        raise _Wrong(
            "which_table", f"{path}: its columns fit {' and '.join(fits)}. Say which, for example {fits[0]}={path}"
        )
    known = {each for table in tables.values() for each in table.row.columns()[1]}
    hints = "".join(nearest(each, known) for each in sorted(columns - known))
    raise _Wrong("columns", f"{path}: found the columns {', '.join(sorted(columns))}; expected {wanted}.{hints}")


def _fits(columns: set[str], table: Table) -> bool:
    required, known = table.row.columns()
    return required <= columns <= known


def _rows(path: Path, found: Lines, kind: type[Row], problems: list[Reason]) -> Iterator[Row]:
    wrong = 0
    for number, row in found:
        try:
            yield kind.model_validate(row)
        except ValidationError as error:
            wrong += 1
            if wrong <= MOST_TOLD:
                told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
                problems.append(Reason("row", f"{path}, line {number}: {told}"))
    if wrong > MOST_TOLD:
        problems.append(Reason("row", f"{path}: {wrong - MOST_TOLD} more rows are wrong"))


def _problems(
    tables: Mapping[str, Table], rows: Mapping[str, tuple[Row, ...]], named: Mapping[str, Path]
) -> Iterator[Reason]:
    """Too few rows, rows that are there twice, rows that are in two tables which must not share any."""
    for name, table in tables.items():
        of = rows.get(name, ())
        if len(of) < table.least:
            where = f"{named[name]} has {len(of)}" if name in named else "no file has them"
            yield Reason(
                "too_few_rows", f"{name}: expected {table.least} rows or more with the columns {table}, {where}"
            )
        twice = [row for row, count in Counter(of).items() if count > 1]
        if twice:
            more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
            yield Reason("twice", f"{name}: a row is there more than once: {_short(twice[0])}{more}. Remove it")
        shared = set(of) & set(rows.get(table.apart_from, ()))
        if shared:
            first = next(row for row in of if row in shared)
            yield Reason(
                "leak", f"{len(shared)} rows are in {name} and in {table.apart_from}, for example {_short(first)}. "
                "What is held out must not be learned from",
            )  # fmt: skip


def _short(row: Row) -> str:
    text = json.dumps(row.model_dump(), ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
