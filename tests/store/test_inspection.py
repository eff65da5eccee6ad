"""What is said of bundles and models: sites, summaries, differences, and what a checkpoint's names tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.proofs.parity import every_edit, random_numbers
from tests.support.bundles import bundle_of
from tests.support.every_form import for_every_form
from tests.support.fakes import BASE
from tests.support.tiny_models import make_tiny
from vllm_edits.edit_store import Gate, LowRank, Offset, Scale, SubspaceFilter, WeightDelta, identify
from vllm_edits.edit_store.architectures import ARCHITECTURES
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.compare import compare
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.edit_store.inspection import sites_of, summarise

RESID = "layers.1.resid"


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_sites_of_a_model_are_those_of_its_architecture(name: str, tmp_path: Path) -> None:
    """With widths that are those of the weights, and the reason for every point that is not there."""
    folder = make_tiny(name, tmp_path / "model")
    base = identify(folder)
    found = json.loads(said("sites", str(folder), "--json"))
    architecture = ARCHITECTURES[name]
    assert [row["site"] for row in found["sites"]] == [str(site) for site in architecture.sites(2)]
    first = [row for row in found["sites"] if row["layer"] == 0]
    assert all(row["width"] == base.widths.of(row["site"].removeprefix("layers.0.")) for row in first)
    assert all(why == architecture.hidden(point) for point, why in found["hidden"].items())
    shown = said("sites", str(folder))
    assert "layers.<n>.attn.z" in shown
    assert "layers.1." not in shown


def test_biases_are_read_off_the_checkpoint(tmp_path: Path) -> None:
    biased = {
        "LlamaForCausalLM": (),
        "Qwen2ForCausalLM": ("k.out", "q.out", "v.out"),
        "GPT2LMHeadModel": ("attn.out", "k.out", "mlp.out", "q.out", "up.out", "v.out"),
    }
    assert {name: identify(make_tiny(name, tmp_path / name)).biased for name in biased} == biased


def test_a_folder_without_a_models_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedHost, match="no config of a language model"):
        sites_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalML"], "hidden_size": 8,
        "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}))  # fmt: skip
    with pytest.raises(UnsupportedHost, match="Did you mean 'LlamaForCausalLM'"):
        sites_of(tmp_path)


def test_every_form_of_edit_has_a_summary() -> None:
    for _, pair in every_edit(BASE):
        (summary,) = summarise(bundle_of("polite", BASE, [pair]))
        assert (summary.site, summary.kind) == (pair[0].site, pair[0].kind)
        assert summary.norm > 0
        assert summary.of
    delta = WeightDelta(site="layers.0.mlp.out", reads="layers.0.mlp.h")
    (summary,) = summarise(bundle_of("polite", BASE, [(delta, {"delta": np.ones((8, 16))})]))
    assert summary.norm == pytest.approx(np.sqrt(128))


@for_every_form()
def test_an_edit_is_the_same_as_itself_and_moved_by_what_changed(pair: Any) -> None:
    edit, numbers = pair
    first = bundle_of("polite", BASE, [pair])
    assert [change.change for change in compare(first, bundle_of("other", BASE, [pair])).edits] == ["same"]
    field = {"scale": "factor", "offset": "vector", "subspace_filter": "mean"}.get(edit.kind, "write")
    other = bundle_of("polite", BASE, [(edit, {**numbers, field: numbers[field] * 1.5 + 0.1})])
    (change,) = compare(first, other).edits
    assert (change.change, change.moved is not None and change.moved > 0.01) == ("changed", True)


def test_what_has_no_measure_is_changed_all_the_same() -> None:
    """Another rank of a gate, onto in place of off, another activation with the same numbers."""
    gate = {rank: Gate(site=RESID, reads=RESID, rank=rank) for rank in (1, 2)}
    onto = {flag: SubspaceFilter(site=RESID, rank=2, onto=flag) for flag in (False, True)}
    for one, two in ((gate[1], gate[2]), (onto[False], onto[True])):
        bundles = [bundle_of("a", BASE, [(edit, random_numbers(edit, BASE, 1))]) for edit in (one, two)]
        (change,) = compare(*bundles).edits
        assert (change.change, change.moved) == ("changed", None)
    step = gate[1].model_copy(update={"activation": "step"})
    numbers = random_numbers(gate[1], BASE, 1)
    (change,) = compare(bundle_of("a", BASE, [(gate[1], numbers)]), bundle_of("a", BASE, [(step, numbers)])).edits
    assert change.change == "changed"


def test_a_rotated_basis_is_no_change() -> None:
    edit = SubspaceFilter(site=RESID, rank=2)
    numbers = random_numbers(edit, BASE, 1)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))[0]
    turned = {**numbers, "basis": turn @ numbers["basis"]}
    (change,) = compare(bundle_of("a", BASE, [(edit, numbers)]), bundle_of("a", BASE, [(edit, turned)])).edits
    assert change.change == "same"


def test_parts_are_compared_one_by_one() -> None:
    edits = [Offset(site=RESID), Offset(site=RESID, part=2), Scale(site="layers.0.attn.z"),
             LowRank(site=RESID, reads=RESID, rank=1)]  # fmt: skip
    pairs = [(edit, random_numbers(edit, BASE, seed)) for seed, edit in enumerate(edits)]
    changes = compare(bundle_of("a", BASE, pairs), bundle_of("a", BASE, pairs[1:])).edits
    assert sorted(change.change for change in changes) == ["removed", "same", "same", "same"]
