"""Directions that are erased, ablated or shifted: by properties that only the right formula has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from vllm_edits.edit_store import LowRank, SubspaceFilter
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.formula import own_layers, weight_of
from vllm_edits.edit_store.authoring.host import Host, edited
from vllm_edits.edit_store.authoring.linear_probe import accuracy
from vllm_edits.edit_store.authoring.methods import contrast_filter, leace, model_surgery, refusal_direction
from vllm_edits.edit_store.authoring.methods.model_surgery import PROBE_FILE
from vllm_edits.edit_store.authoring.methods.refusal_direction import log_odds
from vllm_edits.edit_store.errors import BundleRefused
from vllm_edits.edit_store.sites import Site

THINGS = ("trip", "meal", "film", "road", "song", "house", "week", "lesson", "garden", "ticket", "letter", "winter")
GOOD = [f"The {thing} was wonderful, and we were happy about it." for thing in THINGS]
BAD = [f"The {thing} was terrible, and we were unhappy with it." for thing in THINGS]


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


def file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestLeace:
    def rows(self, begin: int, end: int) -> list[dict[str, Any]]:
        return [{"text": text, "label": label} for label, texts in (("good", GOOD), ("bad", BAD))
                for text in texts[begin:end]]  # fmt: skip

    def test_nothing_linear_is_left_and_a_probe_is_at_chance(
        self, host: Host, tiny_model: Path, tmp_path: Path
    ) -> None:
        """Behind every edited layer the covariance with the labels is gone; before, it was there."""
        train, held = file(tmp_path / "a.jsonl", self.rows(0, 9)), file(tmp_path / "b.jsonl", self.rows(9, 12))
        built = leace.build(tiny_model, f"texts={train}", f"held_out={held}", layers=[1, 2])
        pairs = pairs_of(built.bundle)
        texts = [*GOOD[:9], *BAD[:9]]

        def covariance(site: str) -> float:
            rows = [states[1:] for states in host.activations(texts, [site])[site]]
            labels = torch.cat([torch.full((len(row),), float(number < 9)) for number, row in enumerate(rows)])
            x = torch.cat(rows)
            return float(((x - x.mean(0)).T @ (labels - labels.mean()) / len(x)).abs().max())

        for edit, _ in pairs:
            assert isinstance(edit, SubspaceFilter)
            assert (edit.oblique, edit.rank) == (True, 1)
            before = covariance(edit.site)
            with edited(host.model, pairs):
                assert covariance(edit.site) < 1e-3 * before
        (told,) = built.bundle.manifest.measurements
        assert told.base > 0.75
        assert told.edited < 0.6

    def test_three_labels_take_two_directions(self, tiny_model: Path, tmp_path: Path) -> None:
        rows = self.rows(0, 9) + [{"text": f"The {thing} is there.", "label": "plain"} for thing in THINGS]
        ((edit, _),) = pairs_of(leace.build(tiny_model, file(tmp_path / "a.jsonl", rows), layers=[2]).bundle)
        assert edit.capacity == 2

    def test_too_few_tokens_and_one_label_are_told(self, tiny_model: Path, tmp_path: Path) -> None:
        rows = [{"text": text, "label": "good"} for text in GOOD[:4]]
        with pytest.raises(BundleRefused) as caught:
            leace.build(tiny_model, file(tmp_path / "a.jsonl", rows), tokens="last")
        assert {reason.code for reason in caught.value.reasons} == {"labels", "too_few_samples"}


class TestContrastFilter:
    def test_it_keeps_the_wanted_mean_and_leaves_the_sink_alone(
        self, host: Host, tiny_model: Path, tmp_path: Path
    ) -> None:
        """Filtered twice is filtered once; the wanted mean stays; an unwanted text moves towards it."""
        rows = [{"text": text, "wanted": wanted} for wanted, texts in ((True, GOOD), (False, BAD)) for text in texts]
        built = contrast_filter.build(tiny_model, file(tmp_path / "a.jsonl", rows), layers=[2], rank=3)
        ((edit, numbers),) = pairs_of(built.bundle)
        assert edit == SubspaceFilter(site="layers.2.resid", rank=3)
        wanted, unwanted = (host.activations(texts, [edit.site])[edit.site] for texts in (GOOD, BAD))
        mean = torch.cat([states[1:] for states in wanted]).mean(0).numpy()
        np.testing.assert_allclose(numbers["mean"], mean, atol=1e-5)
        states = torch.cat([each[1:] for each in unwanted]).numpy()
        once = edit.apply(states, **numbers)
        np.testing.assert_allclose(edit.apply(once, **numbers), once, atol=1e-4)
        np.testing.assert_allclose(edit.apply(mean, **numbers), mean, atol=1e-4)
        before, after = (np.linalg.norm(each.mean(0) - mean) for each in (states, once))
        assert after < 0.7 * before
        sink = torch.stack([each[0] for each in wanted]).mean(0).numpy() - mean
        assert np.abs(numbers["basis"] @ sink).max() < 1e-4 * np.linalg.norm(sink)

    def test_one_kind_of_text_alone_is_told(self, tiny_model: Path, tmp_path: Path) -> None:
        rows = [{"text": text, "wanted": True} for text in GOOD]
        with pytest.raises(BundleRefused, match="expected wanted true and false"):
            contrast_filter.build(tiny_model, file(tmp_path / "a.jsonl", rows))


def test_a_probe_tells_what_is_there_and_nothing_else() -> None:
    random = torch.Generator().manual_seed(0)
    labels = (torch.rand(300, 1, generator=random) > 0.5).float()
    planted = torch.randn(300, 20, generator=random) + 4 * labels
    noise = torch.randn(300, 20, generator=random)

    def halves(x: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return (x[:200], labels[:200]), (x[200:], labels[200:])

    assert accuracy(*halves(planted)) > 0.95
    assert 0.3 < accuracy(*halves(noise)) < 0.7


class TestRefusalDirection:
    WIDE: ClassVar[dict[str, Any]] = {"induce": -100.0, "drift": 100.0, "refusals": "I, The", "privileged": True}

    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[str, str]:
        return tuple(f"{name}={file(tmp_path / f'{name}.jsonl', [{'prompt': each} for each in texts])}"
                     for name, texts in (("harmful", BAD), ("harmless", GOOD)))  # type: ignore[return-value]  # fmt: skip

    @pytest.mark.parametrize("at", ["writers", "stream"])
    def test_the_stream_has_nothing_in_the_direction(
        self, host: Host, tiny_model: Path, files: tuple[str, str], at: str
    ) -> None:
        built = refusal_direction.build(tiny_model, *files, at=at, **self.WIDE)
        pairs, layers = pairs_of(built.bundle), len(own_layers(host.model))
        assert len(pairs) == 1 + layers * (2 if at == "writers" else 1)
        direction = torch.tensor(pairs[0][1]["basis"][0])
        sites = [f"layers.{layer}.resid" for layer in range(layers)]

        def largest() -> float:
            found = host.activations(GOOD[:3], sites)
            return max(float((row @ direction).abs().max()) for site in sites for row in found[site])

        before = largest()
        with edited(host.model, pairs):
            assert largest() < 1e-4 * before
        assert built.bundle.manifest.privileged

    def test_the_best_candidate_within_the_bounds_is_taken(self, tiny_model: Path, files: tuple[str, str]) -> None:
        """Of each layer alone the same direction is found with the same score; the whole search takes the lowest."""
        both = refusal_direction.build(tiny_model, *files, **self.WIDE, layers=[0, 2], positions=1)
        each = [refusal_direction.build(tiny_model, *files, **self.WIDE, layers=[layer], positions=1)
                for layer in (0, 2)]  # fmt: skip
        best = min(each, key=lambda built: built.bundle.manifest.measurements[0].edited)
        assert both.bundle.manifest.measurements == best.bundle.manifest.measurements
        np.testing.assert_array_equal(pairs_of(both.bundle)[0][1]["basis"], pairs_of(best.bundle)[0][1]["basis"])
        scores = [built.bundle.manifest.measurements[0].edited for built in each]
        assert scores[0] != scores[1], "positive control"

    def test_without_a_sound_direction_nothing_is_built(self, tiny_model: Path, files: tuple[str, str]) -> None:
        with pytest.raises(BundleRefused, match=r"none of 2 candidates keeps the bounds.*Does the model refuse"):
            refusal_direction.build(tiny_model, *files, **{**self.WIDE, "drift": 1e-9}, layers=[0, 2], positions=1)

    def test_log_odds_are_of_all_words_together(self) -> None:
        likely = torch.tensor([[0.5, 0.25, 0.2, 0.05], [0.1, 0.1, 0.4, 0.4]]).log()
        expected = np.mean([np.log(0.75 / 0.25), np.log(0.2 / 0.8)])
        assert log_odds(likely, torch.tensor([0, 1])) == pytest.approx(expected, abs=1e-5)


class TestModelSurgery:
    def test_it_adds_the_probe_to_the_rows_that_oppose_it_most(
        self, host: Host, tiny_model: Path, tmp_path: Path
    ) -> None:
        """The same change of the weights, row by row; the opposite alpha is the opposite change."""
        rows = [{"text": text, "undesired": bad} for bad, texts in ((False, GOOD), (True, BAD)) for text in texts]
        train = file(tmp_path / "a.jsonl", [*rows[:9], *rows[12:21]])
        held = file(tmp_path / "b.jsonl", [*rows[9:12], *rows[21:]])
        built = model_surgery.build(
            tiny_model, f"texts={train}", f"held_out={held}", share=0.1, alpha=2.0, steps=300, rate=1e-2
        )
        facts = json.loads(built.notes[PROBE_FILE])
        assert facts["accuracy"] > 0.8
        weights = [weight_of(host.model, Site(layer, "gate.out")) for layer in range(len(own_layers(host.model)))]
        pairs = {Site.parse(edit.site).layer: (edit, numbers) for edit, numbers in pairs_of(built.bundle)}
        v = torch.tensor(next(iter(pairs.values()))[1]["read"][0]) / 2
        assert float(v.norm()) == pytest.approx(facts["length"], abs=1e-4)
        cosines = torch.stack([torch.cosine_similarity(weight, v, dim=1) for weight in weights])
        edge = cosines.flatten().sort().values[round(0.1 * cosines.numel()) - 1]
        for layer, (edit, numbers) in pairs.items():
            assert isinstance(edit, LowRank)
            assert layer is not None
            np.testing.assert_array_equal(numbers["write"][0], (cosines[layer] <= edge).float().numpy())
        assert sum(int(numbers["write"].sum()) for _, numbers in pairs.values()) == round(0.1 * cosines.numel())
        (told,) = built.bundle.manifest.measurements
        assert told.n == 6
        assert told.edited != told.base

    def test_a_model_without_gates_is_refused(self, tmp_path: Path) -> None:
        from tests.support.tiny_models import make_tiny

        folder = make_tiny("GPT2LMHeadModel", tmp_path / "gpt2")
        rows = [{"text": text, "undesired": bad} for bad, texts in ((False, GOOD), (True, BAD)) for text in texts]
        method = model_surgery.ModelSurgery()
        from vllm_edits.edit_store import identify
        from vllm_edits.edit_store.authoring.data import read
        from vllm_edits.edit_store.authoring.method import Inputs

        data = read(method.tables, [f"texts={file(tmp_path / 'a.jsonl', rows[2:])}",
                                    f"held_out={file(tmp_path / 'b.jsonl', [*rows[:2], *BAD_ROWS])}"])  # fmt: skip
        reasons = list(method.problems(Inputs(data, identify(folder), None)))
        assert [reason.code for reason in reasons] == ["site"]


BAD_ROWS = [{"text": "It was bad.", "undesired": True}, {"text": "It was worse.", "undesired": True}]
