"""An interrupted build goes on where it was, and makes the same bytes as one that was not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_edits.edit_store.authoring import kept
from vllm_edits.edit_store.authoring.build import Ask, Built, options_of, prepare
from vllm_edits.edit_store.authoring.host import Host
from vllm_edits.edit_store.authoring.kept import OLD_SECONDS, Kept
from vllm_edits.edit_store.authoring.method import METHODS
from vllm_edits.edit_store.authoring.methods import find

find()
TEXT = [{"text": f"The number {number} is written here, then {number * 7 % 90} follows {word}, and is it."}
        for number in range(100) for word in ("it", "that", "dogs", "all")]  # fmt: skip
FACTS = [{"prompt": f"{{}} lives in the city number {number} of", "subject": f"Thing {number}", "answer": "Rome"}
         for number in range(6)]  # fmt: skip
EXAMPLES = [{"prompt": f"The colour of thing {number} is", "answer": colour}
            for number, colour in enumerate(("red", "green", "blue", "black", "white", "grey"))]  # fmt: skip
PROMPTS = [{"prompt": each} for each in ("How is bread made?", "Who wrote the letter?", "Say where the river ends.")]
PAIRS = [{"positive": f"It is a good day {number}", "negative": f"It is a bad night {number}"} for number in range(6)]
CASES: dict[str, tuple[str, dict[str, list[dict[str, Any]]], dict[str, Any]]] = {
    "two trainings": ("lofit", {"examples": EXAMPLES}, {"epochs": 4, "batch": 2, "heads": 3}),
    "a training whose mask is drawn again": (
        "sara", {"examples": EXAMPLES},
        {"epochs": 4, "batch": 2, "layers": "2", "threshold": 0.002, "rate": 5e-3},
    ),
    "facts one by one": (
        "rome", {"facts": FACTS, "text": TEXT}, {"layer": 1, "steps": 3, "contexts": 2, "length": 3},
    ),
    "facts in batches": (
        "alphaedit", {"facts": FACTS, "text": TEXT},
        {"layers": "1,2", "steps": 3, "batch": 2, "contexts": 2, "length": 3, "nullspace": 10.0},
    ),
    "heads": ("ships", {"prompts": PROMPTS}, {}),
    "heads one after the other": ("sahara", {"prompts": PROMPTS}, {"steps": 2}),
    "a sweep": ("steer", {"pairs": PAIRS}, {"layers": "0,1,2,3", "sweep": True}),
}  # fmt: skip


class Interrupted(BaseException):
    """What ends a build."""


class Steps:
    """Steps of a build, which may end one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.count = 0
        self.last = last

    def __call__(self, _what: str, _done: int, _total: int) -> None:
        self.count += 1
        if self.count == self.last:
            raise Interrupted


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of calls of decoder layers of each model that was loaded."""
    counts: list[int] = []
    load = Host.load

    def counted(*args: Any, **kwargs: Any) -> Host:
        host, number = load(*args, **kwargs), len(counts)
        counts.append(0)

        def one_more(*_: object) -> None:
            counts[number] += 1

        host.model.model.layers[-1].register_forward_hook(one_more)
        return host

    monkeypatch.setattr(Host, "load", counted)
    return counts


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_build_makes_the_same_bytes(
    tiny_model: Path, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(kept, "SAVE_SECONDS", 0.0)
    name, data, options = CASES[case]
    method = options_of(METHODS[name], options)
    files = []
    for table, rows in data.items():
        path = tmp_path / f"{table}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(f"{table}={path}")

    def built(cache: str, steps: Steps, seed: int = 0) -> Built:
        return prepare(Ask(
            method, tiny_model, tuple(files), privileged=True, cache=tmp_path / cache, seed=seed, probes=0,
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        )).make(steps)  # fmt: skip

    steps = Steps()
    whole = built("whole", steps)
    assert not [*(tmp_path / "whole" / "builds").glob("*")], "nothing is left of a build that has ended"
    with pytest.raises(Interrupted):
        built("parts", Steps(last=steps.count * 4 // 5))
    (folder,) = (tmp_path / "parts" / "builds").iterdir()
    assert [*folder.iterdir()]
    with pytest.raises(Interrupted):
        built("parts", Steps(last=4), seed=1)
    resumed = built("parts", Steps())
    assert (resumed.bundle.version, resumed.notes) == (whole.bundle.version, whole.notes)
    assert passes[3] < 0.75 * passes[0], "it went on"
    assert not folder.exists()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(kept, "SAVE_SECONDS", 0.0)
    return tmp_path


def saved(decided_by: dict[str, Any], folder: Path) -> Path:
    """The folder with a result of a step of this build."""
    before = {*folder.glob("builds/*")}
    Kept.of(decided_by, folder).save("a step", lambda: {"0": torch.ones(3)})
    (path,) = {*folder.glob("builds/*")} - before
    return path


def test_a_step_of_another_build_or_a_damaged_file_counts_for_nothing(folder: Path) -> None:
    path = saved({"seed": 0}, folder)

    def found(**decided_by: Any) -> dict[str, Tensor]:
        return Kept.of(decided_by, folder).begin("a step")

    assert torch.equal(found(seed=0)["0"], torch.ones(3))
    assert not found(seed=1)
    (file,) = path.iterdir()
    file.write_bytes(file.read_bytes()[:-2])
    assert not found(seed=0)


def test_what_was_given_up_long_ago_is_removed(folder: Path) -> None:
    old, young = saved({"seed": 0}, folder), saved({"seed": 1}, folder)
    long_ago = time.time() - OLD_SECONDS - 1
    os.utime(old, (long_ago, long_ago))
    Kept.of({"seed": 2}, folder)
    assert not old.exists()
    assert young.exists()


def test_two_steps_of_one_name_would_take_each_others_results(folder: Path) -> None:
    steps = Kept.of({}, folder)
    steps.begin("a step")
    with pytest.raises(ValueError, match="two steps"):
        steps.begin("a step")
