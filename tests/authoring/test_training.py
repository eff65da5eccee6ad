"""Training: the loss and its gradients are those of transformers, the base stays, a seed decides everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_edits.edit_store import WeightDelta, identify
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.data import Data
from vllm_edits.edit_store.authoring.formula import weight_of
from vllm_edits.edit_store.authoring.host import Host, edited
from vllm_edits.edit_store.authoring.lessons import Lessons, lesson
from vllm_edits.edit_store.authoring.method import Inputs, Work
from vllm_edits.edit_store.authoring.methods import apet, hut, locft_bf, lofit, sara
from vllm_edits.edit_store.authoring.methods.lofit import HEADS_FILE
from vllm_edits.edit_store.authoring.statistics import Statistics
from vllm_edits.edit_store.authoring.training import Course, Preferences
from vllm_edits.edit_store.errors import BundleRefused
from vllm_edits.edit_store.sites import Site

COLOURS = ("red", "green", "blue", "black", "white", "grey")
ROWS = [{"prompt": f"The colour of thing {number} is", "answer": colour} for number, colour in enumerate(COLOURS)]
SITE = Site(2, "mlp.out")


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


@pytest.fixture
def work(host: Host, tiny_model: Path, tmp_path: Path) -> Work:
    base = identify(tiny_model)

    def silent(_what: str, _done: int, _total: int) -> None: ...

    statistics = Statistics(host, base, silent, folder=tmp_path)
    return Work(Inputs(Data({}), base, host.tokenizer), host, statistics, 0, silent)


def file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lessons_of(host: Host, below: int = 0) -> Lessons:
    return Lessons(host, [lesson(host.tokenizer, row["prompt"], f" {row['answer']}") for row in ROWS], below=below)


def delta_of(host: Host) -> tuple[WeightDelta, Tensor]:
    delta = torch.zeros_like(weight_of(host.model, SITE)).requires_grad_()
    return WeightDelta(site=str(SITE), reads=str(SITE.beside("mlp.h"))), delta


class TestLoss:
    def test_it_is_that_of_transformers(self, host: Host) -> None:
        """transformers averages over all answer tokens of a batch, so each lesson by itself is compared."""
        lessons = lessons_of(host)
        for number, row in enumerate(ROWS):
            ids = torch.tensor([host.tokenizer(f"{row['prompt']} {row['answer']}")["input_ids"]])
            labels = ids.clone()
            labels[:, : len(host.tokenizer(row["prompt"])["input_ids"])] = -100
            expected = host.model(ids, labels=labels).loss
            torch.testing.assert_close(lessons.loss([number]), expected, atol=1e-5, rtol=1e-5)
        mean = float((lessons.loss([0]) + lessons.loss([1])) / 2)
        assert float(lessons.loss([0, 1])) == pytest.approx(mean, abs=1e-5)

    def test_gradients_of_an_edit_are_those_of_the_weight(self, host: Host) -> None:
        edit, delta = delta_of(host)
        with edited(host.model, [(edit, {"delta": delta})]):
            lessons_of(host).loss([0, 1, 2]).backward()
        weight = weight_of(host.model, SITE)
        weight.requires_grad_()
        try:
            lessons_of(host).loss([0, 1, 2]).backward()
            assert weight.grad is not None
            assert delta.grad is not None
            assert float(weight.grad.abs().max()) > 1e-4, "positive control"
            torch.testing.assert_close(delta.grad, weight.grad, atol=1e-6, rtol=1e-4)
        finally:
            weight.requires_grad_(False)
            weight.grad = None

    def test_kept_states_change_nothing(self, host: Host) -> None:
        for chosen in ([0, 3], [3, 1, 5], [0]):
            torch.testing.assert_close(
                lessons_of(host, below=2).loss(chosen), lessons_of(host).loss(chosen), atol=1e-5, rtol=1e-5
            )

    def test_a_preference_begins_at_log_two_and_follows_what_the_edit_prefers(self, host: Host) -> None:
        others = Lessons(host, [lesson(host.tokenizer, row["prompt"], " nothing") for row in ROWS])
        pairs = Preferences.of(lessons_of(host), others, beta=0.5, batch=4)
        assert float(pairs.loss([0, 1, 2])) == pytest.approx(np.log(2), abs=1e-5)
        edit, delta = delta_of(host)
        with edited(host.model, [(edit, {"delta": delta})]):
            pairs.loss([0, 1, 2]).backward()
        assert delta.grad is not None
        for sign, less in ((-1, True), (1, False)):
            step = sign * 0.3 * delta.grad / delta.grad.norm()
            with edited(host.model, [(edit, {"delta": step})]):
                assert (float(pairs.loss([0, 1, 2])) < np.log(2)) == less


class TestCourse:
    def trained(self, work: Work, course: Course) -> tuple[Tensor, list[float]]:
        edit, delta = delta_of(work.host)
        losses = course.train(work, lessons_of(work.host, below=2), [delta], lambda: [(edit, {"delta": delta})])
        return delta.detach(), losses

    def test_it_learns_and_leaves_the_model_alone(self, work: Work, host: Host) -> None:
        before = [parameter.clone() for parameter in host.model.parameters()]
        delta, losses = self.trained(work, Course(30, 4, 3e-3))
        assert losses[-1] < 0.5 * losses[0]
        assert all(map(torch.equal, host.model.parameters(), before))
        edit, _ = delta_of(host)
        with edited(host.model, [(edit, {"delta": delta})]):
            learned = float(lessons_of(host).loss(range(len(ROWS))))
        assert learned < float(lessons_of(host).loss(range(len(ROWS)))) - 1

    def test_the_same_seed_gives_the_same_bytes(self, work: Work) -> None:
        first, _ = self.trained(work, Course(2, 4, 1e-3))
        again, _ = self.trained(work, Course(2, 4, 1e-3))
        work.seed = 1
        other, _ = self.trained(work, Course(2, 4, 1e-3))
        assert torch.equal(first, again)
        assert not torch.equal(first, other), "positive control"

    def test_it_ends_when_the_loss_is_small_enough(self, work: Work) -> None:
        delta, losses = self.trained(work, Course(30, 4, 3e-3, enough=100.0))
        assert len(losses) == 1
        assert not delta.any(), "a batch below it takes no step"


class TestMethods:
    """Each learns what it is shown, in the places that it may change."""

    @pytest.fixture
    def examples(self, tmp_path: Path) -> str:
        return f"examples={file(tmp_path / 'examples.jsonl', ROWS)}"

    def gained(self, built: Any) -> float:
        (told,) = built.bundle.manifest.measurements
        return float(told.edited - told.base)

    def test_lofit_offsets_the_heads_that_it_selects(self, tiny_model: Path, examples: str) -> None:
        built = lofit.build(tiny_model, examples, heads=3, epochs=8, batch=3, rate=0.1)
        listed = {(row["layer"], row["head"]) for row in json.loads(built.notes[HEADS_FILE])["heads"]}
        widths = identify(tiny_model).widths
        moved = {
            (Site.parse(edit.site).layer, head)
            for edit, numbers in pairs_of(built.bundle)
            for head, part in enumerate(numbers["vector"].reshape(widths.heads, -1)) if part.any()
        }  # fmt: skip
        assert moved == listed
        assert len(listed) == 3
        assert self.gained(built) > 0.5
        other = lofit.build(tiny_model, examples, heads=3, epochs=1, batch=3, random_heads=True)
        drawn = {(row["layer"], row["head"]) for row in json.loads(other.notes[HEADS_FILE])["heads"]}
        assert drawn != listed, "positive control"

    def test_lofit_learns_a_preference(self, tiny_model: Path, tmp_path: Path) -> None:
        rows = [{**row, "rejected": "nothing"} for row in ROWS]
        data = file(tmp_path / "pairs.jsonl", rows)
        built = lofit.build(tiny_model, f"examples={data}", heads=4, epochs=6, batch=3, rate=0.1)
        host = Host.load(tiny_model)
        prompts = [row["prompt"] for row in rows]

        def preferred() -> float:
            answer, rejected = ([f" {row[column]}" for row in rows] for column in ("answer", "rejected"))
            return float((host.likelihood(prompts, answer) - host.likelihood(prompts, rejected)).mean())

        before = preferred()
        with edited(host.model, pairs_of(built.bundle)):
            assert preferred() > before + 0.5
        with pytest.raises(BundleRefused, match="1 of 6 examples have no rejected answer"):
            lofit.build(tiny_model, f"examples={file(tmp_path / 'some.jsonl', [*rows[1:], ROWS[0]])}")

    @pytest.mark.parametrize("rank", [1, 2])
    def test_hut_multiplies_the_weight(self, tiny_model: Path, examples: str, rank: int) -> None:
        """W' = W * (A B^T): of rank one two scales, which are that product; of rank two a delta of the same form."""
        built = hut.build(tiny_model, examples, rank=rank, layers=[2], points="mlp", epochs=20, batch=3, rate=0.05)
        assert self.gained(built) > 0.3
        host, pairs = Host.load(tiny_model), pairs_of(built.bundle)
        weight = weight_of(host.model, SITE)
        if rank == 1:
            factors = {Site.parse(edit.site).point: torch.tensor(numbers["factor"]) for edit, numbers in pairs}
            change = weight * (torch.outer(factors["mlp.out"], factors["mlp.h"]) - 1)
            edit, _ = delta_of(host)
            text = [ROWS[0]["prompt"]]
            with edited(host.model, pairs):
                scaled = host.next_token(text)
            with edited(host.model, [(edit, {"delta": change})]):
                torch.testing.assert_close(host.next_token(text), scaled, atol=1e-4, rtol=1e-4)
        else:
            ((_, numbers),) = pairs
            hadamard = torch.tensor(numbers["delta"]) / weight + 1
            values = torch.linalg.svdvals(hadamard.double())
            assert float(values[2]) < 1e-3 * float(values[1]), "of rank two"
            assert float(values[1]) > 1e-3, "and not of rank one"

    def test_sara_changes_small_weights_alone(self, tiny_model: Path, examples: str) -> None:
        built = sara.build(tiny_model, examples, layers=[2, 3], threshold=0.01, rate=3e-3, epochs=20, batch=3)
        assert self.gained(built) > 0.1
        host = Host.load(tiny_model)
        counts = []
        for edit, numbers in pairs_of(built.bundle):
            weight = weight_of(host.model, Site.parse(edit.site))
            assert float(weight[numbers["rows"], numbers["columns"]].abs().max()) < 0.01
            counts.append(len(numbers["rows"]) / float((weight.abs() < 0.01).sum()))
        assert min(counts) > 0.99
        other = sara.build(
            tiny_model, examples, layers=[2], threshold=0.01, rate=3e-3, epochs=1, batch=3, random_entries=True
        )
        ((edit, numbers),) = pairs_of(other.bundle)
        weight = weight_of(host.model, Site.parse(edit.site))
        assert float(weight[numbers["rows"], numbers["columns"]].abs().max()) > 0.01, "positive control"
        with pytest.raises(BundleRefused, match=r"no weight .* is below 1e-12"):
            sara.build(tiny_model, examples, layers=[2], threshold=1e-12)

    def test_saras_mask_is_drawn_again_half_way(self, tiny_model: Path, examples: str) -> None:
        """Entries that grew over the threshold stop, so the second half changes fewer than the whole mask."""
        how: dict[str, Any] = {"layers": [2], "threshold": 0.002, "rate": 5e-3, "epochs": 6, "batch": 3, "nuclear": 0.0}
        once, twice = (sara.build(tiny_model, examples, progressive=flag, **how) for flag in (False, True))
        largest = [float(np.abs(pairs_of(built.bundle)[0][1]["values"]).max()) for built in (once, twice)]
        assert largest[1] < largest[0]

    def test_locft_changes_one_matrix_and_tells_what_a_low_rank_loses(self, tiny_model: Path, examples: str) -> None:
        how: dict[str, Any] = {"layer": 2, "epochs": 30, "batch": 3, "rate": 3e-3}
        whole = locft_bf.build(tiny_model, examples, **how)
        ((edit, numbers),) = pairs_of(whole.bundle)
        assert (edit.kind, edit.site, numbers["delta"].shape[0]) == ("weight_delta", str(SITE), 128)
        assert self.gained(whole) > 1
        short = locft_bf.build(tiny_model, examples, error=0.2, **how)
        ((edit, factors),) = pairs_of(short.bundle)
        lost = np.linalg.norm(numbers["delta"] - factors["write"].T @ factors["read"]) / np.linalg.norm(
            numbers["delta"]
        )
        told = {each.metric: each.edited for each in short.bundle.manifest.measurements}
        assert told["largest part of a weight's change that its low rank loses"] == pytest.approx(lost, abs=1e-4)
        assert lost <= 0.2
        assert edit.capacity < 128
        with pytest.raises(BundleRefused, match=r"expected to lose at most 0\.1%"):
            locft_bf.build(tiny_model, examples, rank=1, error=0.001, **how)

    @pytest.mark.parametrize("positions", ["vectors", "entries"])
    def test_apet_keeps_its_budget_and_the_seed_chooses(self, tiny_model: Path, examples: str, positions: str) -> None:
        how: dict[str, Any] = {"positions": positions, "budget": 600, "epochs": 20, "batch": 3, "rate": 0.05}
        built = apet.build(tiny_model, examples, **how)
        assert self.gained(built) > 0.05
        name = "values" if positions == "entries" else None
        sizes = [len(numbers[name or next(iter(numbers))]) for _, numbers in pairs_of(built.bundle)]
        assert 500 < sum(sizes) <= 600
        other = apet.build(tiny_model, examples, seed=1, **how)
        places = [{(edit.site, tuple(numbers.get("columns", ()))) for edit, numbers in pairs_of(each.bundle)}
                  for each in (built, other)]  # fmt: skip
        assert places[0] != places[1]


def test_bad_examples_are_told_at_once(tiny_model: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": ROWS[0]["prompt"], "answer": "pink"}, {"prompt": "The colour is ", "answer": "red"}]
    with pytest.raises(BundleRefused) as caught:
        hut.build(tiny_model, f"examples={file(tmp_path / 'a.jsonl', rows)}", layers=[9], points="mlp")
    assert {reason.code for reason in caught.value.reasons} == {"several_answers", "merged", "layers"}
