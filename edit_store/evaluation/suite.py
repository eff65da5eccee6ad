"""A suite: a YAML file that names measures, their options, and the files with their data beside it.

name: capital
description: France has another capital, and nothing else changes
measures:
  - measure: forms
    data: {forms: capital_forms.jsonl}
  - measure: collapse
    data: {corpus: corpus.jsonl}
    options: {tokens: 32}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from vllm_edits.edit_store.authoring import data as tables
from vllm_edits.edit_store.authoring.data import Data
from vllm_edits.edit_store.canonical import canonical_json, sha256
from vllm_edits.edit_store.errors import BundleRefused, Reason, nearest
from vllm_edits.edit_store.evaluation import measures
from vllm_edits.edit_store.evaluation.figure import Figure
from vllm_edits.edit_store.evaluation.measure import MEASURES, Measure
from vllm_edits.edit_store.evaluation.speaker import Speaker
from vllm_edits.edit_store.progress import StepDone
from vllm_edits.edit_store.record import FrozenRecord, field_reasons

SHIPPED = Path(__file__).parent / "suites"


class Entry(FrozenRecord):
    """One measure of a suite, as the file has it."""

    measure: str
    data: dict[str, str] = Field(default_factory=dict)
    """file by table, relative to the suite"""
    options: dict[str, Any] = Field(default_factory=dict)


class SuiteFile(FrozenRecord):
    """A suite, as the file has it."""

    schema_version: Literal[1] = 1
    name: str = Field(min_length=1)
    description: str = ""
    measures: tuple[Entry, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Suite:
    """A suite with its data."""

    name: str
    description: str
    measures: tuple[tuple[Measure, Data], ...]

    @property
    def sha256(self) -> str:
        """Digest of measures, options and rows; where the files are does not matter."""
        return sha256(canonical_json([
            {"measure": measure.called(), "options": measure.model_dump(mode="json"), "rows": data.digests()}
            for measure, data in self.measures
        ]))  # fmt: skip

    def figures(self, base: Speaker, edited: Speaker, step: StepDone) -> Iterator[Figure]:
        """The figures of every measure, by `measure: figure`."""
        for number, (measure, data) in enumerate(self.measures):
            step(measure.called(), number, len(self.measures))
            for figure in measure.figures(base, edited, data):
                yield figure.model_copy(update={"name": f"{measure.called()}: {figure.name}"})
        step("evaluated", len(self.measures), len(self.measures))


def shipped() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load(given: str | Path) -> Suite:
    """Read a suite by its path, or one that comes with the package by its name. BundleRefused lists every problem."""
    path = Path(given)
    if not path.suffix and not path.exists():
        path = SHIPPED / f"{given}.yaml"
    what = f"suite {given}"
    try:
        found = SuiteFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        known = f"Known by name: {', '.join(shipped())}"
        raise BundleRefused(what, [Reason("no_file", f"{path}: {error.strerror}. {known}")]) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BundleRefused(what, [Reason("not_yaml", f"expected YAML, found: {error}")]) from None
    except ValidationError as error:
        raise BundleRefused(what, list(field_reasons(error))) from None
    measures.find()
    reasons: list[Reason] = []
    made = [_measure(entry, path.parent, reasons) for entry in found.measures]
    if reasons:
        raise BundleRefused(what, reasons)
    return Suite(found.name, found.description, tuple(each for each in made if each is not None))


def _measure(entry: Entry, folder: Path, reasons: list[Reason]) -> tuple[Measure, Data] | None:
    """A measure with its data; None, and more reasons, if something is wrong with it."""
    if entry.measure not in MEASURES:
        close = nearest(entry.measure, MEASURES)
        reasons.append(Reason("measure", f"unknown measure {entry.measure!r}.{close} Known: {', '.join(MEASURES)}"))
        return None
    kind, wrong = MEASURES[entry.measure], len(reasons)
    data = Data({})
    try:
        data = tables.read(kind.tables, [f"{table}={folder / file}" for table, file in entry.data.items()])
    except BundleRefused as refused:
        reasons += [Reason(each.code, f"{entry.measure}: {each.message}") for each in refused.reasons]
    if not any(data.rows.values()) and len(reasons) == wrong:
        reasons.append(Reason("no_data", f"{entry.measure}: expected data for {' or '.join(kind.tables)}, found none"))
    try:
        measure = kind.model_validate(entry.options)
    except ValidationError as error:
        reasons += [Reason("option", f"{entry.measure}: {each.message}") for each in field_reasons(error)]
        return None
    return (measure, data) if len(reasons) == wrong else None
