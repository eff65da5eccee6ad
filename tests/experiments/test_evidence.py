"""What counts as evidence, what is left out, and that nothing is lost or counted twice on the way."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import cheaply
from vllm_edits.edit_store.errors import EditsError, NotFound
from vllm_edits.edit_store.experiments.document import BUILT_IN
from vllm_edits.plugin.experiments.analysis.evidence import Evidence, Logs, collect, gather
from vllm_edits.plugin.experiments.records import Exposure, FeedbackRecord, Record

START = datetime.fromisoformat("2026-11-22T10:00:00.123+00:00")
OLD, NEW = "a" * 64, "b" * 64


def at(minute: float) -> datetime:
    return START + timedelta(minutes=minute)


def exposure(request: str, arm: str = "treatment", minute: float = 0, **fields: Any) -> Exposure:
    known: dict[str, Any] = {
        "experiment": "polite", "phase": 1, "version": "base" if arm == "control" else NEW, "unit": f"of {request}",
        "source": "user", "chosen": "hash", "outcome": "ok", "prompt_tokens": 12, "output_tokens": 40, "seconds": 1.2,
        "first_token_seconds": 0.1, "seconds_per_token": 0.02, "empty": False, "looping": False, "corrupted": False,
    }  # fmt: skip
    return Exposure(at=at(minute), request=request, arm=arm, **{**known, **fields})


def feedback(request: str, value: float, minute: float = 1, arm: str = "treatment", **fields: Any) -> FeedbackRecord:
    known: dict[str, Any] = {"experiment": "polite", "phase": 1, "unit": f"of {request}", "metric": "thumbs"}
    return FeedbackRecord(at=at(minute), request=request, arm=arm, value=value, **{**known, **fields})


def line(record: Record) -> str:
    """As the format says, and not as our own encoder would have it."""
    kind = "exposure" if isinstance(record, Exposure) else "feedback"
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    return json.dumps({"kind": kind, **fields, "at": record.at.isoformat(timespec="milliseconds")}) + "\n"


def polite(records: Iterable[Record]) -> Evidence:
    return collect(records, "polite", 1)


def sums(evidence: Evidence, metric: str, arm: str = "treatment") -> tuple[list[float], list[int]]:
    found = evidence.metrics[metric][arm]
    return found.sums.tolist(), found.counts.tolist()


# -- lines -------------------------------------------------------------------------------------------------------------


def test_lines_of_files_and_folders_are_read_and_progress_is_told(tmp_path: Path) -> None:
    folder, file = tmp_path / "logs", tmp_path / "elsewhere.jsonl"
    folder.mkdir()
    records = [exposure("1"), feedback("1", 1.0), exposure("2", "control", first_token_seconds=None)]
    (folder / "exposures-1.jsonl").write_text(line(records[0]) + line(records[1]))
    (folder / "notes.txt").write_text("not a log")
    file.write_text(line(records[2]))
    told: list[tuple[int, int]] = []
    logs = Logs([folder, file], lambda done, total: told.append((done, total)))
    assert list(logs) == records
    size = sum(len(line(record)) for record in records)
    assert told[-1] == (size, size)
    assert logs.half_lines == 0


def test_a_half_written_last_line_is_counted_and_left_out(tmp_path: Path) -> None:
    whole, half = line(exposure("1")), line(exposure("2"))
    for cut in range(1, len(half) - 1):
        (tmp_path / "exposures-1.jsonl").write_text(whole + half[:cut])
        logs = Logs([tmp_path])
        assert [record.request for record in logs] == ["1"]
        assert logs.half_lines == 1
    (tmp_path / "exposures-1.jsonl").write_text(whole + half.rstrip())
    assert len(list(logs)) == 2, "a line that only lacks its end is whole"
    (tmp_path / "exposures-1.jsonl").write_text(whole + half[:100])
    evidence = gather([tmp_path], "polite", 1)
    assert (evidence.units, evidence.caveats.half_lines) == ({"treatment": 1}, 1)


@pytest.mark.parametrize(
    "rubbish",
    ["half a l\n", "\n", line(exposure("2"))[:90] + "\n", '{"kind": "exposure"}', '{"kind": "rumour"}\n', "[]\n",
     line(exposure("2")).replace("hash", "dice"), line(exposure("2")).replace("+00:00", ""), '{"kind": "\udcff"}\n'],
)  # fmt: skip
def test_any_other_line_is_refused_with_its_place(tmp_path: Path, rubbish: str) -> None:
    file = tmp_path / "exposures-1.jsonl"
    file.write_bytes((line(exposure("1")) + rubbish).encode(errors="surrogateescape"))
    with pytest.raises(EditsError, match=r"exposures-1\.jsonl, line 2: expected an exposure or feedback"):
        list(Logs([tmp_path]))


def test_where_no_log_is_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"found no exposures-\*\.jsonl"):
        Logs([tmp_path])
    with pytest.raises(NotFound, match="no exposure log at"):
        Logs([tmp_path / "nowhere.jsonl"])


# -- sums --------------------------------------------------------------------------------------------------------------


def test_metrics_are_added_up_by_unit() -> None:
    evidence = polite([
        exposure("1", unit="ann", output_tokens=10), exposure("2", unit="ann", output_tokens=20, looping=True),
        exposure("3", unit="bob", output_tokens=5, first_token_seconds=None), exposure("4", "control", unit="eve"),
    ])  # fmt: skip
    assert sums(evidence, "output_tokens") == ([30, 5], [2, 1])
    assert sums(evidence, "looping") == ([1, 0], [2, 1])
    assert sums(evidence, "first_token_seconds") == ([pytest.approx(0.2)], [2]), "what has no value does not count"
    assert sums(evidence, "output_tokens", "control") == ([40], [1])
    assert evidence.units == {"treatment": 2, "control": 1}
    assert evidence.versions == {"treatment": NEW, "control": "base"}
    assert set(evidence.metrics) == set(BUILT_IN)


def test_errors_are_among_served_requests_and_qualities_among_whole_answers() -> None:
    outcomes = ("ok", "ok", "error", "aborted", "rejected")
    evidence = polite([exposure(str(i), unit="ann", outcome=outcome) for i, outcome in enumerate(outcomes)])
    assert sums(evidence, "error") == ([1], [3])
    assert sums(evidence, "output_tokens") == ([80], [2])
    assert evidence.units == {"treatment": 1}, "whatever became of it, the unit came"


def test_only_arms_chosen_by_hash_are_evidence() -> None:
    """Nor is the feedback on the others."""
    evidence = polite([
        exposure("1"), exposure("2", chosen="forced"), exposure("3", chosen="fallback"), feedback("1", 1),
        feedback("2", 0),
    ])  # fmt: skip
    assert evidence.units == {"treatment": 1}
    assert sums(evidence, "error") == ([0], [1])
    assert sums(evidence, "thumbs") == ([1], [1])
    assert evidence.caveats.not_by_hash == 2


def test_other_experiments_and_phases_are_not_looked_at() -> None:
    evidence = polite(
        [exposure("1"), exposure("1", phase=2), exposure("1", experiment="rude"), feedback("1", 0, phase=2)]
    )
    assert sums(evidence, "error") == ([0], [1])
    assert evidence.caveats.repeated == 0
    assert "thumbs" not in evidence.metrics


def test_a_request_in_two_logs_counts_once_and_the_first_by_time() -> None:
    early, late = exposure("1", minute=1, output_tokens=1), exposure("1", minute=2, output_tokens=2)
    for records in ([early, late], [late, early]):
        evidence = polite(records)
        assert sums(evidence, "output_tokens") == ([1], [1])
        assert (evidence.caveats.repeated, evidence.caveats.contradicting) == (1, 1)
    caveats = polite([early, early]).caveats
    assert (caveats.repeated, caveats.contradicting) == (1, 0), "the same said twice is no contradiction"
    untimed = exposure("1", first_token_seconds=None)
    assert polite([untimed, untimed]).caveats.contradicting == 0


def test_contradictory_feedback_counts_as_first_said() -> None:
    records = [
        exposure("1"),
        feedback("1", 0, 3),
        feedback("1", 1, 2),
        feedback("1", 1, 4),
        feedback("1", 5, metric="stars"),
    ]
    evidence = polite(records)
    assert sums(evidence, "thumbs") == ([1], [1])
    assert sums(evidence, "stars") == ([5], [1])
    assert (evidence.caveats.repeated, evidence.caveats.contradicting) == (2, 1)


def test_feedback_belongs_to_its_request_and_stands_alone_without() -> None:
    """A request's own arm and unit count, whatever the feedback says; an aborted answer may be judged too."""
    evidence = polite([
        feedback("1", 1, arm="control", unit="eve"), feedback("2", 0, arm="control", unit="eve"),
        exposure("1", unit="ann", outcome="aborted"), exposure("3", "control"),
    ])  # fmt: skip
    assert sums(evidence, "thumbs") == ([1], [1])
    assert sums(evidence, "thumbs", "control") == ([0], [1])
    assert evidence.caveats.feedback_alone == 1


def test_feedback_named_as_a_built_in_metric_is_another() -> None:
    evidence = polite([exposure("1"), feedback("1", 1, metric="error")])
    assert sums(evidence, "error") == ([0], [1])
    assert sums(evidence, "feedback error") == ([1], [1])


def test_of_several_versions_the_last_is_compared_over_the_same_days() -> None:
    """What the control did before is left out as well; who came first where still counts all."""
    evidence = polite([
        exposure("5", minute=30, version=NEW, output_tokens=7), exposure("1", minute=0, version=OLD),
        exposure("2", "control", minute=5), exposure("3", minute=10, version=NEW, output_tokens=1),
        exposure("4", "control", minute=20, output_tokens=3), exposure("6", minute=15, version=OLD),
        feedback("1", 0, minute=40), feedback("3", 1, minute=40),
    ])  # fmt: skip
    assert sums(evidence, "output_tokens") == ([7, 1], [1, 1])
    assert sums(evidence, "output_tokens", "control") == ([3], [1])
    assert sums(evidence, "thumbs") == ([1], [1])
    assert evidence.versions == {"treatment": NEW, "control": "base"}
    assert evidence.caveats.other_versions == {"treatment": 2, "control": 1}
    assert evidence.units == {"treatment": 4, "control": 2}


def test_with_one_version_nothing_is_left_out_however_late_an_arm_begins() -> None:
    evidence = polite([exposure("1", "control"), exposure("2", minute=60)])
    assert evidence.caveats.other_versions == {"control": 0, "treatment": 0}
    assert sums(evidence, "error", "control") == ([0], [1])


def test_a_unit_in_two_arms_is_counted_where_it_came_first_and_noticed() -> None:
    evidence = polite([
        exposure("1", unit="ann", minute=2), exposure("2", "control", unit="ann", minute=1), exposure("3", unit="bob"),
    ])  # fmt: skip
    assert evidence.units == {"treatment": 1, "control": 1}
    assert evidence.caveats.units_in_two_arms == 1


def test_no_lines_are_no_evidence() -> None:
    evidence = polite([])
    assert (evidence.units, evidence.versions) == ({}, {})
    assert all(not arms for arms in evidence.metrics.values())
    only_feedback = polite([feedback("1", 1)])
    assert sums(only_feedback, "thumbs") == ([1], [1])
    assert only_feedback.units == {"treatment": 0}


@cheaply
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4), st.booleans(), st.integers(0, 50)), max_size=40),
    st.randoms(),
)
def test_the_order_of_lines_does_not_matter(drawn: list[tuple[int, int, bool, int]], order: Any) -> None:
    """Against adding up by hand; requests that repeat are the same lines."""
    records = [
        exposure(str(i), "control" if unit % 2 else "treatment", minute, unit=str(unit), empty=empty)
        for i, (minute, unit, empty, _) in enumerate(drawn)
    ] + [feedback(str(i), value, minute + 1) for i, (minute, _, _, value) in enumerate(drawn) if value % 3]  # fmt: skip
    shuffled = records + records[::2]
    order.shuffle(shuffled)
    evidence = polite(shuffled)
    for arm, rest in (("treatment", 0), ("control", 1)):
        mine = [(unit, empty, value) for _, unit, empty, value in drawn if unit % 2 == rest]
        by_hand = sorted(
            (sum(e for u, e, _ in mine if u == unit), sum(u == unit for u, _, _ in mine))
            for unit in {u for u, _, _ in mine}
        )
        assert evidence.units.get(arm, 0) == len(by_hand)
        if mine:
            assert sorted(zip(*sums(evidence, "empty", arm), strict=True)) == by_hand
            given_values = [value for _, _, value in mine if value % 3]
            assert not given_values or sum(sums(evidence, "thumbs", arm)[0]) == sum(given_values)
    assert evidence.caveats.contradicting == 0
    assert np.isclose(evidence.caveats.repeated, len(records[::2]))
