"""EigenShield: its scores, and on a model the directions that it takes out or keeps, with what it tells of them."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_edits.edit_store import SubspaceFilter, identify
from vllm_edits.edit_store.authoring.build import Built, pairs_of
from vllm_edits.edit_store.authoring.chat import beginning
from vllm_edits.edit_store.authoring.data import read
from vllm_edits.edit_store.authoring.host import Host, divergence, edited
from vllm_edits.edit_store.authoring.method import Inputs
from vllm_edits.edit_store.authoring.methods import eigenshield
from vllm_edits.edit_store.authoring.methods.eigenshield import (
    SPECTRUM_FILE,
    Eigenshield,
    nonconformity,
    separate,
    spectrum_of,
)
from vllm_edits.edit_store.authoring.statistics import Moments
from vllm_edits.edit_store.errors import BundleRefused
from vllm_edits.edit_store.kinds.offset import Offset

WORDS = ["".join(letters) for letters in itertools.product("abcdefghijklmnop", repeat=2)]
RANDOM = random.Random(0)
TEXTS = [f"The {' '.join(RANDOM.choices(WORDS, k=16))} end" for _ in range(60)]
WORD = " banana"
"""the word that the perturbation puts between the others"""


def perturbed(text: str) -> str:
    return text.replace(" end", f"{WORD * 4} end")


PAIRS = [{"text": text, "perturbed": perturbed(text)} for text in TEXTS[:20]]
HELD = [{"text": text, "perturbed": perturbed(text)} for text in TEXTS[-4:]]


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


def file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [f"{name}={file(tmp_path / f'{name}.jsonl', rows)}" for name, rows in {
        "texts": [{"text": text} for text in TEXTS], "pairs": PAIRS,
    }.items()]  # fmt: skip


def filtered(built: Built) -> tuple[SubspaceFilter, Tensor, Tensor]:
    """The one edit, its basis, and its mean."""
    ((edit, numbers),) = pairs_of(built.bundle)
    assert isinstance(edit, SubspaceFilter)
    return edit, torch.tensor(numbers["basis"]), torch.tensor(numbers["mean"])


class TestScores:
    def test_it_is_the_mean_move_in_standard_deviations(self) -> None:
        """By hand: moves of 2 and -4 along the first axis, which has the deviation 3; none along the second."""
        clean = torch.zeros(2, 3).double()
        moved = torch.tensor([[2.0, 0, 9], [-4.0, 0, 9]]).double()
        covariance = torch.diag(torch.tensor([9.0, 4.0, 1.0])).double()
        directions = torch.eye(3)[:2].double()
        assert nonconformity(directions, clean, moved, covariance).tolist() == pytest.approx([1.0, 0.0])
        turned = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
        scores = nonconformity(directions @ turned.T, clean, moved @ turned.T, turned @ covariance @ turned.T)
        assert scores.tolist() == pytest.approx([1.0, 0.0])
        assert nonconformity(directions, clean, moved, 4 * covariance).tolist() == pytest.approx([0.5, 0.0])

    def test_the_moved_spike_of_many_is_the_correlational_one(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        directions = torch.linalg.qr(torch.randn(30, 30, generator=drawn).double()).Q[:10]
        clean = torch.randn(50, 30, generator=drawn).double()
        noise = 0.1 * torch.randn(50, 30, generator=drawn).double()
        covariance = torch.eye(30).double()
        moved = clean + noise + 2 * directions[7]
        split = separate(nonconformity(directions, clean, moved, covariance), 0.9)
        assert split.correlational.nonzero().flatten().tolist() == [7]
        ordinary = nonconformity(directions, clean, clean + noise, covariance)
        assert float(ordinary.max()) < 0.2, "positive control"

    def test_a_lower_quantile_takes_more(self) -> None:
        scores = torch.arange(10).double()
        taken = [int(separate(scores, quantile).correlational.sum()) for quantile in (0.95, 0.5, 0.0)]
        assert taken == [1, 5, 9]

    @pytest.mark.parametrize("scores", [[0.3], [0.2, 0.2, 0.2], [0.0, 0.0]])
    def test_spikes_that_are_moved_alike_are_not_separated(self, scores: list[float]) -> None:
        with pytest.raises(BundleRefused, match=r"nothing_removed"):
            separate(torch.tensor(scores), 0.5)


class TestFilter:
    @pytest.mark.parametrize("at", ["embeddings", "stream"])
    @pytest.mark.parametrize("form", ["off", "onto"])
    def test_the_site_has_what_the_form_says(
        self, host: Host, tiny_model: Path, files: list[str], at: str, form: str
    ) -> None:
        """About the mean, `off` leaves nothing in the basis, and `onto` nothing outside."""
        built = eigenshield.build(tiny_model, *files, at=at, form=form)
        edit, basis, mean = filtered(built)
        assert edit.site == ("embed.out" if at == "embeddings" else "layers.2.resid")
        assert edit.onto == (form == "onto")
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)

        def left() -> float:
            x = torch.cat(host.activations(TEXTS[:3], [edit.site])[edit.site]) - mean
            inside = x @ basis.T @ basis
            return float((inside if form == "off" else x - inside).norm() / x.norm())

        before = left()
        with edited(host.model, pairs_of(built.bundle)):
            assert left() < 1e-4
        assert before > 0.05, "positive control"

    def test_the_mean_is_that_of_ordinary_text_without_first_tokens(
        self, host: Host, tiny_model: Path, files: list[str]
    ) -> None:
        _, _, mean = filtered(eigenshield.build(tiny_model, *files, layer=1))
        rows = host.activations(TEXTS, ["layers.1.resid"])["layers.1.resid"]
        torch.testing.assert_close(mean, torch.cat([row[1:] for row in rows]).mean(0), atol=1e-4, rtol=1e-4)
        first = torch.stack([row[0] for row in rows]).mean(0)
        assert float((mean - first).norm()) > 0.1 * float(first.norm()), "positive control"

    def test_off_and_onto_share_the_spikes_between_them(self, tiny_model: Path, files: list[str]) -> None:
        off, onto = (eigenshield.build(tiny_model, *files, at="embeddings", form=form) for form in ("off", "onto"))
        (_, removed, _), (_, kept, _) = filtered(off), filtered(onto)
        told = json.loads(off.notes[SPECTRUM_FILE])
        assert len(removed) + len(kept) == told["spikes_found"] == len(told["spikes"])
        assert float((removed @ kept.T).abs().max()) < 1e-5

    def test_a_planted_word_is_found_among_perturbed_texts(
        self, host: Host, tiny_model: Path, files: list[str]
    ) -> None:
        """Its embedding is in the directions that are removed; that of a word of ordinary text is not."""
        _, basis, mean = filtered(
            eigenshield.build(tiny_model, *files, at="embeddings", analysed="both", quantile=0.95)
        )
        embeddings = host.model.get_input_embeddings().weight

        def inside(word: str) -> float:
            (token,) = host.tokenizer(word)["input_ids"]
            vector = embeddings[token] - mean
            return float((basis @ vector).norm() / vector.norm())

        assert inside(WORD) > 0.7
        assert inside(" ab") < 0.5
        _, clean, _ = filtered(eigenshield.build(tiny_model, *files, at="embeddings", analysed="texts", quantile=0.95))
        there = embeddings[host.tokenizer(WORD)["input_ids"][0]] - mean
        assert float((clean @ there).norm() / there.norm()) < 0.5, "ordinary text has no such direction"

    def test_only_the_largest_spikes_are_looked_at(self, tiny_model: Path, files: list[str]) -> None:
        built = eigenshield.build(tiny_model, *files, at="embeddings", spikes=4, quantile=0.5)
        told = json.loads(built.notes[SPECTRUM_FILE])
        assert len(told["spikes"]) == 4 < told["spikes_found"]
        assert len(filtered(built)[1]) == 2

    def test_the_same_build_makes_the_same_bytes(self, tiny_model: Path, files: list[str]) -> None:
        one, other = (eigenshield.build(tiny_model, *files, layer=1) for _ in range(2))
        assert one.bundle.tensor_bytes == other.bundle.tensor_bytes
        last = eigenshield.build(tiny_model, *files, layer=1, tokens="last")
        assert last.bundle.tensor_bytes != one.bundle.tensor_bytes, "positive control"


class TestTold:
    def test_the_spectrum_is_written_beside_the_bundle(self, tiny_model: Path, files: list[str]) -> None:
        told = json.loads(eigenshield.build(tiny_model, *files, layer=1).notes[SPECTRUM_FILE])
        assert told["site"] == "layers.1.resid"
        assert told["gamma"] == pytest.approx(told["width"] / told["samples"])
        assert told["noise"] < told["edge"] < told["cut"]
        values = [row["eigenvalue"] for row in told["spikes"]]
        assert values == sorted(values, reverse=True)
        assert min(values) > told["cut"]
        assert all(row["population"] < row["eigenvalue"] for row in told["spikes"])
        assert all(0 < row["squared_cosine"] < 1 for row in told["spikes"])
        assert [row["correlational"] for row in told["spikes"]] == [
            row["score"] > told["score_threshold"] for row in told["spikes"]
        ]
        assert told["bulk"]["eigenvalues"] == told["width"] - told["spikes_found"]
        assert not told["bulk"]["follows_law"]
        assert "does not follow" in told["note"]

    def test_reach_of_the_perturbation_and_cost_are_measured(
        self, host: Host, tiny_model: Path, files: list[str], tmp_path: Path
    ) -> None:
        """As computed here once more; without held-out pairs nothing is told."""
        held = file(tmp_path / "held.jsonl", HELD)
        built = eigenshield.build(tiny_model, *files, f"held_out={held}", layer=1)
        told = {each.metric: each for each in built.bundle.manifest.measurements}
        clean, moved = ([row[name] for row in HELD] for name in ("text", "perturbed"))
        begins = [beginning(host.tokenizer)] * len(clean)
        before = host.next_token(clean), host.next_token(moved)
        likely = [host.likelihood(begins, clean)]
        with edited(host.model, pairs_of(built.bundle)):
            after = host.next_token(clean), host.next_token(moved)
            likely.append(host.likelihood(begins, clean))
        expected = {
            "next token held out, perturbed from clean, nats": (divergence(*before), divergence(*after)),
            "next token held out, perturbed from the base's clean, nats": (
                divergence(*before), divergence(before[0], after[1]),
            ),
            "next token held out, clean from the base's clean, nats": (torch.zeros(1), divergence(before[0], after[0])),
            "clean text held out, log-likelihood per token in nats": (likely[0], likely[1]),
        }  # fmt: skip
        assert list(told) == list(expected)
        for name, (base, now) in expected.items():
            assert told[name].n == len(HELD)
            assert (told[name].base, told[name].edited) == pytest.approx(
                (float(base.mean()), float(now.mean())), rel=1e-3, abs=1e-6
            )
            assert abs(told[name].edited - told[name].base) > 1e-4, "positive control"
        assert not eigenshield.build(tiny_model, *files, layer=1).bundle.manifest.measurements


class TestRefused:
    def test_what_is_wrong_is_told_before_the_model_is_loaded(
        self, tiny_model: Path, tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Host, "load", None)
        texts = file(tmp_path / "few.jsonl", [{"text": text} for text in TEXTS[:3]])
        wrong = [*PAIRS[:8], {"text": "Yes it is.", "perturbed": "Yes it is."}, {"text": "Yes", "perturbed": "No"}]
        with pytest.raises(BundleRefused) as caught:
            eigenshield.build(tiny_model, texts, file(tmp_path / "wrong.jsonl", wrong), layer=9)
        assert [reason.code for reason in caught.value.reasons] == ["layers", "too_few_samples", "alike", "short"]
        assert "expected more than 128 tokens" in str(caught.value)
        with pytest.raises(BundleRefused, match=r"pairs: expected 8 rows or more .*no file has them"):
            eigenshield.build(tiny_model, texts)
        with pytest.raises(BundleRefused, match="quantile"):
            eigenshield.build(tiny_model, *files, quantile=1.0)

    @pytest.fixture
    def codes(self, tiny_model: Path, host: Host, tmp_path: Path) -> Any:
        base = identify(tiny_model)

        def found(texts: list[str], pairs: list[dict[str, str]] = PAIRS, **options: Any) -> list[str]:
            method = Eigenshield(**options)
            paths = [file(tmp_path / "t.jsonl", [{"text": text} for text in texts]), file(tmp_path / "p.jsonl", pairs)]
            inputs = Inputs(read(method.tables, paths), base, host.tokenizer)
            return [reason.code for reason in method.problems(inputs)]

        return found

    def test_embeddings_of_few_different_tokens_are_told(self, codes: Any) -> None:
        """However often they are repeated; behind a layer they differ."""
        few = ["one two three " * each for each in range(20, 40)]
        assert codes(few, at="embeddings") == ["too_few_samples"]
        assert codes(few) == codes(TEXTS, at="embeddings") == []

    def test_last_embeddings_that_are_alike_are_told(self, codes: Any) -> None:
        """All perturbations are before the last token, which its embedding does not see."""
        assert codes(TEXTS, at="embeddings", tokens="last") == ["last_alike"]
        other = [*PAIRS, {"text": "Said by me", "perturbed": "Said by them"}]
        assert codes(TEXTS, other, at="embeddings", tokens="last") == codes(TEXTS, tokens="last") == []

    def test_the_embeddings_have_no_layer(self, codes: Any) -> None:
        assert codes(TEXTS, at="embeddings", layer=1) == ["layer"]
        assert codes(TEXTS, layer=1) == []


def moments(x: Tensor) -> Moments:
    return Moments(len(x), x.sum(0), x.T @ x)


def test_noise_without_a_spike_is_told() -> None:
    x = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(BundleRefused, match=r"(?s)no direction at embed\.out stands out of noise.*\[no_spike\]"):
        spectrum_of(moments(x), "embed.out")
    x[:, 0] *= 5
    (spike,) = spectrum_of(moments(x), "embed.out").spikes
    assert abs(float(spike.direction[0])) == pytest.approx(1, abs=0.05)


def test_vectors_in_a_small_subspace_are_told() -> None:
    x = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)).double()
    x[:, 10:] = 0
    with pytest.raises(BundleRefused, match=r"(?s)texts are too much alike.*\[no_noise\]"):
        spectrum_of(moments(x), "embed.out")


def test_more_directions_than_a_filter_holds_are_told() -> None:
    split = separate(torch.arange(600).double(), 0.9)
    assert int(split.chosen("off").sum()) == 60
    with pytest.raises(BundleRefused, match=r"(?s)at most 512 directions in a filter, found 540 of 600.*\[rank\]"):
        split.chosen("onto")


def test_a_direction_that_is_planted_in_a_model_is_found(host: Host) -> None:
    """An offset at the site, as a perturbation: its direction is removed, and another one is not."""
    site = "layers.1.resid"
    drawn = torch.Generator().manual_seed(3)
    planted, other = torch.linalg.qr(torch.randn(128, 2, generator=drawn).double()).Q.T

    def vectors(texts: list[str]) -> list[Tensor]:
        return [row[1:].double() for row in host.activations(texts, [site])[site]]

    clean, pairs = torch.cat(vectors(TEXTS)), vectors(TEXTS[:20])
    size = 4 * float(clean.std(0).norm())
    with edited(host.model, [(Offset(site=site), {"vector": (size * planted).float().numpy()})]):
        moved = vectors(TEXTS[:20])
    ordinary = moments(clean)
    spectrum = spectrum_of(moments(torch.cat([clean, *moved])), site)
    directions = torch.stack([spike.direction for spike in spectrum.spikes])
    states = [torch.stack([row.mean(0) for row in rows]) for rows in (pairs, moved)]
    split = separate(nonconformity(directions, states[0], states[1], ordinary.covariance), 0.9)
    basis = directions[split.correlational]
    assert float((basis @ planted).norm()) > 0.9
    assert float((basis @ other).norm()) < 0.5, "positive control"
