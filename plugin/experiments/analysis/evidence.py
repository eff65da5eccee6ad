"""Reads exposure logs and adds up the evidence of one phase of an experiment by unit.

`Logs` reads; everything else is pure. Some numbers of each line are kept until all lines are read, because the lines
have no order, and duplicates can be resolved only at the end.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import numpy as np

from vllm_edits.edit_store.errors import EditsError, NotFound
from vllm_edits.edit_store.experiments.document import BUILT_IN
from vllm_edits.edit_store.progress import CountDone
from vllm_edits.plugin.experiments.analysis.sequences import Booleans, Floats, Integers
from vllm_edits.plugin.experiments.records import Exposure, Record, ShadowRecord

PATTERN = "exposures-*.jsonl"
_REPORT_EVERY = 1 << 20  # bytes between two calls of `progress`
_COLUMNS = 5  # at, arm, unit, version and whether the arm is the unit's own come before an exposure's metrics

K = TypeVar("K")


class Logs:
    """The records in log files, and in the log files of folders.

    half_lines: number of files that end with an incomplete line, after a crash or while they are written. Such a line
    is ignored. Any other invalid line is an error.
    """

    def __init__(self, paths: Iterable[Path], progress: CountDone = lambda _done, _total: None) -> None:
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
                        # An incomplete line is never a complete object with wrong fields.
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
    """Counts of excluded or unusual records."""

    not_by_hash: int
    """requests whose arm was forced, or that got the fallback"""
    other_versions: Mapping[str, int]
    """requests by arm with another version, or from before all arms had their last version"""
    repeated: int
    """repeated lines of a request or its feedback"""
    contradicting: int
    """repeated lines with other content"""
    feedback_alone: int
    """feedback without a request in the logs; it is included"""
    units_in_two_arms: int
    """units in several arms, which a hash never causes"""
    half_lines: int = 0


@dataclass(frozen=True)
class Evidence:
    """The evidence of one phase of an experiment. Only requests whose arm was chosen by hash count."""

    experiment: str
    phase: int
    units: Mapping[str, int]
    """by arm: units whose first request went to the arm, with any outcome and any version"""
    metrics: Mapping[str, Mapping[str, UnitSums]]
    """by metric, then arm: the built-in ones, then feedback's"""
    versions: Mapping[str, str]
    """by arm: its last version; only requests of this version are evidence"""
    caveats: Caveats


def gather(
    paths: Iterable[Path], experiment: str, phase: int, progress: CountDone = lambda _done, _total: None
) -> Evidence:
    """Read logs and add up the evidence of one phase."""
    logs = Logs(paths, progress)
    evidence = collect(logs, experiment, phase)
    return replace(evidence, caveats=replace(evidence.caveats, half_lines=logs.half_lines))


def collect(records: Iterable[Record], experiment: str, phase: int) -> Evidence:
    """Add up the evidence of one phase from records in any order.

    If an arm changed its version in the phase, only its last version counts, and other arms count from the same time
    on: compared requests must come from the same days.
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
    for name, code in told_metrics.items():  # a feedback metric may have the name of a built-in metric
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
    """Numbers for names, in the order of first use."""

    def __missing__(self, name: str) -> int:
        self[name] = code = len(self)
        return code


class _Table(Generic[K]):
    """Rows of numbers by key. Each row begins with a time; for equal keys, the earliest row is kept."""

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
    """The last version of every arm (-1 for none), and the time since which all arms have their last version."""
    last = np.full(arms, -1)
    order = np.argsort(at, kind="stable")
    last[arm[order]] = version[order]  # for equal indices the last value is kept
    changed = np.unique(arm[version != last[arm]])
    return last, max((float(at[(arm == code) & (version == last[code])].min()) for code in changed), default=-np.inf)


def _unit_sums(unit: Integers, values: Floats) -> UnitSums:
    _, place, counts = np.unique(unit, return_inverse=True, return_counts=True)
    return UnitSums(np.bincount(place, weights=values, minlength=len(counts)).astype(np.float64), counts)
