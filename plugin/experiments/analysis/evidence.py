"""What the exposure logs say of one phase of an experiment, added up by unit.

`Logs` reads; everything else is pure. Of each line some numbers are kept until all are read: they come in no order, and
which of two counts is known only then.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import numpy as np

from vllm_edits.edit_store.errors import EditsError, NotFound
from vllm_edits.edit_store.experiments.document import BUILT_IN
from vllm_edits.plugin.experiments.analysis.sequences import Booleans, Floats, Integers
from vllm_edits.plugin.experiments.records import Exposure, Record, ShadowRecord

PATTERN = "exposures-*.jsonl"
_REPORT_EVERY = 1 << 20  # bytes between two calls of `progress`
_COLUMNS = 5  # at, arm, unit, version and whether the arm is the unit's own come before an exposure's metrics

K = TypeVar("K")
Progress = Callable[[int, int], None]
"""Told the bytes done, and the bytes in all."""


class Logs:
    """The records in log files, and in the log files of folders, one after the other.

    half_lines: how many files end within a line, after a crash or while being written. It does not count; any other
    line that is no record is refused.
    """

    def __init__(self, paths: Iterable[Path], progress: Progress = lambda _done, _total: None) -> None:
        self.files = [file for path in paths for file in _files(path)]
        self.half_lines = 0
        self._progress = progress

    def __iter__(self) -> Iterator[Record]:
        decoder = msgspec.json.Decoder(Record)
        done = told = self.half_lines = 0
        total = sum(file.stat().st_size for file in self.files)
        for file in self.files:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        yield decoder.decode(line)
                    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                        # Half an object is never a whole one of the wrong fields.
                        if line.endswith(b"\n") or isinstance(error, msgspec.ValidationError):
                            what = f"{file}, line {number}: expected an exposure or feedback"
                            raise EditsError(f"{what}: {error}") from None
                        self.half_lines += 1
                    done += len(line)
                    if done - told >= _REPORT_EVERY:
                        self._progress(told := done, max(total, done))
        self._progress(done, done)


def _files(path: Path) -> Sequence[Path]:
    if not path.is_dir():
        if not path.exists():
            raise NotFound(f"there is no exposure log at {path}")
        return [path]
    if found := sorted(path.glob(PATTERN)):
        return found
    raise NotFound(f"expected exposure logs in {path}, found no {PATTERN}")


@dataclass(frozen=True)
class UnitSums:
    """A metric in one arm. sums, counts: [units], over a unit's requests."""

    sums: Floats
    counts: Integers


@dataclass(frozen=True)
class Caveats:
    """What was left out or is strange, in numbers."""

    not_by_hash: int
    """requests whose arm was asked for, or answered in place of another"""
    other_versions: Mapping[str, int]
    """requests by arm, from before every arm was at its last version, and those of another one since"""
    repeated: int
    """lines of a request, or of its feedback, that was there before"""
    contradicting: int
    """of these, how many said something else"""
    feedback_alone: int
    """feedback whose request is not in the logs: taken at its word"""
    units_in_two_arms: int
    """units that were sent to several arms, which no hash does"""
    half_lines: int = 0


@dataclass(frozen=True)
class Evidence:
    """One phase of an experiment. What units count for: only requests whose arm was chosen by the unit's hash."""

    experiment: str
    phase: int
    units: Mapping[str, int]
    """by arm, whose first request went there, whatever became of it and whichever version it met"""
    metrics: Mapping[str, Mapping[str, UnitSums]]
    """by metric, then arm: the built-in ones, then feedback's"""
    versions: Mapping[str, str]
    """by arm, the last one seen; the evidence is of it alone"""
    caveats: Caveats


def gather(
    paths: Iterable[Path], experiment: str, phase: int, progress: Progress = lambda _done, _total: None
) -> Evidence:
    """Read logs and add up what they say of one phase."""
    logs = Logs(paths, progress)
    evidence = collect(logs, experiment, phase)
    return replace(evidence, caveats=replace(evidence.caveats, half_lines=logs.half_lines))


def collect(records: Iterable[Record], experiment: str, phase: int) -> Evidence:
    """Add up what records, in any order, say of one phase.

    An arm that changed its version in the phase has evidence for the last one only, and the others have theirs from
    the same time on: what is compared must have met the same days.
    """
    arms, units, versions, told_metrics = _Codes(), _Codes(), _Codes(), _Codes()
    shown: _Table[str] = _Table(_COLUMNS + len(BUILT_IN))
    told: _Table[tuple[str, str]] = _Table(5)
    for record in records:
        if isinstance(record, ShadowRecord) or record.experiment != experiment or record.phase != phase:
            continue
        place = record.at.timestamp(), arms[record.arm], units[record.unit]
        if isinstance(record, Exposure):
            row = *place, versions[record.version], record.chosen == "hash", *record.metrics().values()
            shown.put(record.request, row)
        else:
            told.put((record.request, record.metric), (*place, told_metrics[record.metric], record.value))

    rows = shown.rows()
    at, (arm, unit, version), hashed = rows[:, 0], rows[:, 1:4].T.astype(int), rows[:, 4] == 1
    last, since = _last_versions(at[hashed], arm[hashed], version[hashed], len(arms))
    kept = hashed & (version == last[arm]) & (at >= since)
    lost = hashed & ~kept

    said = told.rows()
    said_arm, said_unit, said_metric = said[:, 1:4].T.astype(int)
    exposure = np.array([shown.places.get(request, -1) for request, _ in told.places], dtype=np.int64)
    known = exposure >= 0
    said_arm[known], said_unit[known] = arm[exposure[known]], unit[exposure[known]]
    said_kept = said[:, 0] >= since
    said_kept[known] = kept[exposure[known]]

    def by_arm(values: Floats, arm: Integers, unit: Integers, kept: Booleans) -> dict[str, UnitSums]:
        which = {name: kept & (arm == code) & ~np.isnan(values) for name, code in arms.items()}
        return {name: _unit_sums(unit[here], values[here]) for name, here in which.items()}

    metrics = {name: by_arm(rows[:, _COLUMNS + i], arm, unit, kept) for i, name in enumerate(BUILT_IN)}
    for name, code in told_metrics.items():  # one named as a built-in metric is still another
        label = f"feedback {name}" if name in BUILT_IN else name
        metrics[label] = by_arm(said[:, 4], said_arm, said_unit, said_kept & (said_metric == code))

    order = np.flatnonzero(hashed)[np.argsort(at[hashed], kind="stable")]
    first = arm[order][np.unique(unit[order], return_index=True)[1]]
    visits = np.unique(unit[hashed] * len(arms) + arm[hashed])
    names = list(versions)
    return Evidence(
        experiment,
        phase,
        units={name: int((first == code).sum()) for name, code in arms.items()},
        metrics=metrics,
        versions={name: names[last[code]] for name, code in arms.items() if last[code] >= 0},
        caveats=Caveats(
            not_by_hash=int((~hashed).sum()),
            other_versions={name: int((lost & (arm == code)).sum()) for name, code in arms.items()},
            repeated=shown.repeated + told.repeated,
            contradicting=shown.contradicting + told.contradicting,
            feedback_alone=int((~known).sum()),
            units_in_two_arms=int((np.unique(visits // max(len(arms), 1), return_counts=True)[1] > 1).sum()),
        ),
    )


class _Codes(dict[str, int]):
    """Small numbers for names, in the order they are first asked for."""

    def __missing__(self, name: str) -> int:
        self[name] = code = len(self)
        return code


class _Table(Generic[K]):
    """Rows of numbers that begin with a time, each under a key: of several under one key the first by time stands."""

    def __init__(self, width: int) -> None:
        self.places: dict[K, int] = {}
        self.repeated = self.contradicting = 0
        self._width = width
        self._numbers = array("d")

    def put(self, key: K, row: Iterable[float]) -> None:
        new = array("d", row)
        start = self.places.setdefault(key, len(self.places)) * self._width
        if start == len(self._numbers):
            self._numbers.extend(new)
            return
        old = self._numbers[start : start + self._width]
        self.repeated += 1
        self.contradicting += old[1:].tobytes() != new[1:].tobytes()  # as bytes NaN is NaN
        if new[0] < old[0]:
            self._numbers[start : start + self._width] = new

    def rows(self) -> Floats:
        """[keys, width]"""
        return np.frombuffer(self._numbers, dtype=np.float64).reshape(-1, self._width)


def _last_versions(at: Floats, arm: Integers, version: Integers, arms: int) -> tuple[Integers, float]:
    """Every arm's last version (-1 without any), and since when every arm that changed its version was at the last."""
    last = np.full(arms, -1)
    order = np.argsort(at, kind="stable")
    last[arm[order]] = version[order]  # of several numbers for one place the last stays
    changed = np.unique(arm[version != last[arm]])
    return last, max((float(at[(arm == code) & (version == last[code])].min()) for code in changed), default=-np.inf)


def _unit_sums(unit: Integers, values: Floats) -> UnitSums:
    _, place, counts = np.unique(unit, return_inverse=True, return_counts=True)
    return UnitSums(np.bincount(place, weights=values, minlength=len(counts)).astype(np.float64), counts)
