"""ROCR: its closed form, its history, and what its modes do to a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import make_tiny
from vllm_edits.edit_store import identify
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.data import Data
from vllm_edits.edit_store.authoring.host import Host, edited
from vllm_edits.edit_store.authoring.method import Inputs
from vllm_edits.edit_store.authoring.methods import rocr
from vllm_edits.edit_store.authoring.methods.rocr import BEGINS, TEMPLATES, Concept, read_vector
from vllm_edits.edit_store.authoring.spread import stream_problems
from vllm_edits.edit_store.authoring.statistics import Moments, unused_directions
from vllm_edits.edit_store.errors import BundleRefused

KEY = torch.linspace(-1, 1, 40)
ORDINARY = torch.cat([torch.randn(200, 20, generator=torch.Generator().manual_seed(0)), torch.zeros(200, 20)], 1)
MOMENTS = Moments(len(ORDINARY), ORDINARY.sum(0), ORDINARY.T @ ORDINARY)
UNUSED = unused_directions(MOMENTS, 0.02)


def test_unused_directions_are_those_that_text_leaves_alone() -> None:
    assert UNUSED.shape == (40, 20)
    torch.testing.assert_close(UNUSED.T @ UNUSED, torch.eye(20))
    assert float((ORDINARY @ UNUSED).abs().max()) < 1e-5
    assert unused_directions(MOMENTS, 1e6).shape == (40, 40)


def test_the_read_vector_is_the_closed_form_without_a_history() -> None:
    """q = P k / (ridge + k^T P k), so q.k is short of one by the ridge alone."""
    for ridge in (1.0, 10.0):
        projected = UNUSED @ (UNUSED.T @ KEY)
        expected = projected / (ridge + KEY @ projected)
        torch.testing.assert_close(read_vector(KEY, UNUSED, ridge=ridge), expected)
    assert float(read_vector(100 * KEY, UNUSED) @ (100 * KEY)) == pytest.approx(1, abs=1e-4)


def test_with_a_history_it_is_the_published_system() -> None:
    """(P (k k^T + C) + ridge I) q = P k with C the sum of the earlier keys' products; earlier keys are read less."""
    random = torch.Generator().manual_seed(1)
    before = [torch.randn(40, generator=random), torch.randn(40, generator=random)]
    projector = UNUSED @ UNUSED.T
    products = torch.outer(KEY, KEY) + sum(torch.outer(each, each) for each in before)
    expected = torch.linalg.solve(projector @ products + 2.0 * torch.eye(40), projector @ KEY)
    found = read_vector(KEY, UNUSED, before, ridge=2.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    alone = read_vector(KEY, UNUSED, ridge=2.0)
    strong = [10 * each for each in before]
    assert all(abs(float(read_vector(10 * KEY, UNUSED, strong) @ each)) < 0.02 for each in strong)
    assert max(abs(float(alone @ each)) for each in strong) > 0.2, "positive control"


def test_the_read_vector_sees_nothing_in_ordinary_text() -> None:
    read = read_vector(KEY, UNUSED)
    assert float((ORDINARY @ read).abs().max()) < 1e-6
    assert float((ORDINARY @ KEY).abs().max()) > 0.1


def test_the_mode_reject_makes_a_model_refuse_the_concept(tiny_model: Path, tmp_path: Path) -> None:
    """Behind every prompt that says it; a longer clamp goes further, and the goal is kept within it."""
    concepts, text = tmp_path / "concepts.jsonl", tmp_path / "text.jsonl"
    concepts.write_text(json.dumps({"concept": "Paris"}) + "\n")
    text.write_text("".join(json.dumps({"text": f"Number {each} is here, and {each + 1} too."}) + "\n"
                            for each in range(40)))  # fmt: skip
    host = Host.load(tiny_model)
    prompts = [asked(host.tokenizer, row.template.replace("{}", "Paris"), begins=BEGINS) for row in TEMPLATES]
    refusals = [" Unfortunately"] * len(prompts)
    likely = [float(host.likelihood(prompts, refusals).mean())]
    for clamp in (0.02, 5.0):
        built = rocr.build(
            tiny_model, concepts, text, mode="reject", layers=[1, 2], nullspace=10.0, clamp=clamp, rate=0.5, steps=15,
            kl=0.0, cache=tmp_path / "statistics",
        )  # fmt: skip
        with edited(host.model, pairs_of(built.bundle)):
            likely.append(float(host.likelihood(prompts, refusals).mean()))
    assert likely[0] < likely[1] < likely[2] - 0.01


def test_text_that_uses_every_direction_is_told(tiny_model: Path, tmp_path: Path) -> None:
    concepts, text = tmp_path / "concepts.jsonl", tmp_path / "text.jsonl"
    concepts.write_text(json.dumps({"concept": "Paris", "target": "Rome"}) + "\n")
    text.write_text("".join(json.dumps({"text": f"Number {each} is here, and {each + 1} too."}) + "\n"
                            for each in range(40)))  # fmt: skip
    with pytest.raises(BundleRefused, match=r"(?s)uses every direction at layers\.1\.mlp\.h.*Raise nullspace"):
        rocr.build(tiny_model, concepts, text, layers=[1], nullspace=1e-12, cache=tmp_path / "statistics")


def test_a_norm_between_the_mlp_and_the_stream_is_told(tmp_path: Path) -> None:
    """The change would not arrive as it is written; of the same data a model without such a norm has no complaint."""
    rows = {"concepts": (Concept(concept="Paris", target="Rome"),), "text": (), "templates": TEMPLATES}
    codes = []
    for architecture in ("Gemma2ForCausalLM", "LlamaForCausalLM"):
        base = identify(make_tiny(architecture, tmp_path / architecture))
        codes.append([reason.code for reason in stream_problems("rocr", Inputs(Data(rows), base, None))])
    assert codes == [["site"], []]
