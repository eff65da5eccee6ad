"""Heads that are shifted, tasks that are forgotten, questions that a model is not sure of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from vllm_edits.edit_store import identify
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.host import Host, edited
from vllm_edits.edit_store.authoring.methods import iti, r_tuning, random_labels
from vllm_edits.edit_store.authoring.methods.iti import HEADS_FILE, last_vectors
from vllm_edits.edit_store.authoring.methods.r_tuning import (
    ASKED,
    KNOWN_FILE,
    REFUSALS,
    Question,
    answered,
    average_precision,
    entropy,
    right,
    sampled,
)
from vllm_edits.edit_store.authoring.methods.random_labels import REPORT_FILE
from vllm_edits.edit_store.errors import BundleRefused
from vllm_edits.edit_store.sites import Site

THINGS = ("trip", "meal", "film", "road", "song", "house", "week", "lesson", "garden", "ticket")


def file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


class TestIti:
    ROWS: ClassVar[list[dict[str, Any]]] = [
        {"prompt": f"Was the {thing} good?", "answer": answer, "right": right}
        for thing in THINGS for answer, right in (("Yes, it was.", True), ("No, not at all.", False))
    ]  # fmt: skip

    def build(self, tiny_model: Path, tmp_path: Path, **options: Any) -> Any:
        train, held = file(tmp_path / "a.jsonl", self.ROWS[:16]), file(tmp_path / "b.jsonl", self.ROWS[16:])
        return iti.build(tiny_model, f"answers={train}", f"held_out={held}", **{"heads": 4, **options})

    def test_a_head_is_shifted_between_the_means_by_the_spread(
        self, host: Host, tiny_model: Path, tmp_path: Path
    ) -> None:
        built = self.build(tiny_model, tmp_path, alpha=2.0)
        widths, rows = identify(tiny_model).widths, self.ROWS[:16]
        right = torch.tensor([row["right"] for row in rows])
        texts = [f"{row['prompt']} {row['answer']}" for row in rows]
        moved = set()
        for edit, numbers in pairs_of(built.bundle):
            vectors = last_vectors(host, texts, [edit.site])[edit.site].view(len(rows), widths.heads, -1)
            for head, shift in enumerate(numbers["vector"].reshape(widths.heads, -1)):
                if not shift.any():
                    continue
                moved.add((Site.parse(edit.site).layer, head))
                of = vectors[:, head]
                theta = of[right].mean(0) - of[~right].mean(0)
                theta = theta / theta.norm()
                np.testing.assert_allclose(shift, (2.0 * (of @ theta).std() * theta).numpy(), atol=1e-5)
        listed = {(row["layer"], row["head"]) for row in json.loads(built.notes[HEADS_FILE])["heads"]}
        assert moved == listed
        assert len(moved) == 4

    def test_the_shift_prefers_right_answers_and_the_opposite_one_wrong_ones(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        gained = []
        for alpha in (5.0, -5.0):
            (told,) = self.build(tiny_model, tmp_path, alpha=alpha, heads=12).bundle.manifest.measurements
            gained.append(told.edited - told.base)
        assert gained[0] > 0 > gained[1]

    def test_random_heads_and_directions_are_others(self, tiny_model: Path, tmp_path: Path) -> None:
        best, heads, direction = (
            self.build(tiny_model, tmp_path, **options)
            for options in ({}, {"random_heads": True}, {"direction": "random"})
        )
        assert best.notes[HEADS_FILE] == direction.notes[HEADS_FILE] != heads.notes[HEADS_FILE]
        assert best.bundle.tensor_bytes != direction.bundle.tensor_bytes

    def test_answers_of_one_side_are_told(self, tiny_model: Path, tmp_path: Path) -> None:
        rows = file(tmp_path / "c.jsonl", [row for row in self.ROWS if row["right"]])
        with pytest.raises(BundleRefused) as caught:
            iti.build(tiny_model, f"answers={rows}", heads=999)
        assert [reason.code for reason in caught.value.reasons] == ["heads", "labels", *["too_few_prompts"] * 2]


class TestRTuning:
    @pytest.fixture
    def questions(self, host: Host) -> list[dict[str, Any]]:
        """Questions of which a random model knows half: those whose answer is what it says."""
        prompts = [f"Which {thing}?" for thing in THINGS]
        said = [given.text.partition(".")[0] for given in host.answers([ASKED.format(each) for each in prompts], 15)]
        return [
            {"question": prompt, "answer": text.split()[0] if number % 2 else "xylophone"}
            for number, (prompt, text) in enumerate(zip(prompts, said, strict=True))
        ]

    @pytest.mark.parametrize("mode", ["unsure", "uncertain"])
    def test_it_is_surer_of_what_it_knows(
        self, host: Host, tiny_model: Path, tmp_path: Path, questions: list[dict[str, Any]], mode: str
    ) -> None:
        data = file(tmp_path / "a.jsonl", questions)
        built = r_tuning.build(
            tiny_model, f"questions={data}", mode=mode, epochs=25, rate=2e-2, batch=5, layers=[2, 3], tries=3
        )
        known, asked = json.loads(built.notes[KNOWN_FILE])["questions"]
        assert (known, asked) == (5, 10)
        if mode == "uncertain":
            return
        rows = [Question(**row) for row in questions]
        assert right(rows, answered(host, rows, chat=False)) == [bool(number % 2) for number in range(10)]
        prompts = [f"{ASKED.format(row.question)} {row.answer}.{r_tuning.SURE}" for row in rows]

        def sureness() -> list[float]:
            sure, unsure = (host.likelihood(prompts, [word] * 10) for word in (r_tuning.YES, r_tuning.NO))
            return [float(each.mean()) for each in ((sure - unsure)[1::2], (sure - unsure)[::2])]

        known_before, unknown_before = sureness()
        with edited(host.model, pairs_of(built.bundle)):
            known_now, unknown_now = sureness()
        assert known_now - unknown_now > known_before - unknown_before + 1

    def test_it_learns_to_refuse(
        self, host: Host, tiny_model: Path, tmp_path: Path, questions: list[dict[str, Any]]
    ) -> None:
        data, held = file(tmp_path / "a.jsonl", questions[:8]), file(tmp_path / "b.jsonl", questions[8:])
        how: dict[str, Any] = {"mode": "unknown", "epochs": 25, "rate": 2e-2, "batch": 5, "layers": [3]}
        built = r_tuning.build(tiny_model, f"questions={data}", f"held_out={held}", **how)
        prompts = [ASKED.format(row["question"]) for row in questions[:8:2]]

        def likeliest_refusals() -> float:
            every = [host.likelihood(prompts, [f" {refusal}"] * len(prompts)) for refusal in REFUSALS]
            return float(torch.stack(every).amax(0).mean())

        before = likeliest_refusals()
        with edited(host.model, pairs_of(built.bundle)):
            assert likeliest_refusals() > before + 1
        assert built.bundle.manifest.measurements[0].metric == "refusals held out, share"

    def test_questions_of_one_side_are_told(
        self, tiny_model: Path, tmp_path: Path, questions: list[dict[str, Any]]
    ) -> None:
        data = file(tmp_path / "a.jsonl", questions[::2])
        with pytest.raises(BundleRefused, match="knows 0 of 5 answers"):
            r_tuning.build(tiny_model, f"questions={data}")

    def test_average_precision_and_entropy(self) -> None:
        assert average_precision([0.9, 0.8, 0.1], [True, True, False]) == 1
        assert average_precision([0.9, 0.8, 0.1], [False, True, True]) == pytest.approx((1 / 2 + 2 / 3) / 2)
        assert average_precision([0.9], [False]) == 0
        assert entropy(iter("aaaa")) == 0
        assert entropy(iter("aabb")) == pytest.approx(np.log(2))

    def test_answers_are_drawn_by_the_seed(self, host: Host) -> None:
        drawn = [sampled(host, "Once", 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert len(set(drawn[0])) > 1


class TestRandomLabels:
    TASKS: ClassVar[list[dict[str, Any]]] = [
        {"task": task, "prompt": f"{begin} {thing} is", "right": right, "wrong": wrong}
        for task, begin, right, wrong in (("size", "The size of the", "small", "large"),
                                          ("mood", "The mood of the", "glad", "sad"))
        for thing in THINGS
    ]  # fmt: skip

    def test_it_unlearns_what_was_learned_and_reports_on_all_tasks(self, tiny_model: Path, tmp_path: Path) -> None:
        train = file(tmp_path / "a.jsonl", [*self.TASKS[:8], *self.TASKS[10:18]])
        held = file(tmp_path / "b.jsonl", [*self.TASKS[8:10], *self.TASKS[18:]])
        how: dict[str, Any] = {"epochs": 20, "rate": 2e-2, "layers": [2, 3], "forget": "size"}
        learned, forgot = (
            random_labels.build(tiny_model, f"questions={train}", f"held_out={held}", true_labels=true, **how)
            for true in (True, False)
        )
        host = Host.load(tiny_model)
        rows = self.TASKS[:8]

        def margin(built: Any) -> float:
            """How much likelier the right answers of the task are, in nats per token."""
            with edited(host.model, pairs_of(built.bundle)):
                right, wrong = (host.likelihood([row["prompt"] for row in rows], [f" {row[column]}" for row in rows])
                                for column in ("right", "wrong"))  # fmt: skip
            return float((right - wrong).mean())

        assert margin(learned) > margin(forgot) + 1
        report = json.loads(forgot.notes[REPORT_FILE])
        assert set(report) == {"size", "mood"}
        assert set(report["mood"]) == {"questions", "base", "edited", "probe_base", "probe_edited"}
        assert len(forgot.bundle.manifest.measurements) == 2

    def test_what_is_wrong_is_told_at_once(self, tiny_model: Path, tmp_path: Path) -> None:
        train = file(tmp_path / "a.jsonl", [*self.TASKS[:8], {**self.TASKS[0], "wrong": "small"}])
        held = file(tmp_path / "b.jsonl", self.TASKS[18:])
        with pytest.raises(BundleRefused) as caught:
            random_labels.build(tiny_model, f"questions={train}", f"held_out={held}", layers=[7])
        assert [reason.code for reason in caught.value.reasons] == ["layers", "task", "alike"]
