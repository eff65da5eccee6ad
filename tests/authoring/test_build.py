"""From a command, or a call, to a bundle: checked before the model is loaded, the same bytes again from its recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.support.fakes import version_of
from vllm_edits.edit_store import Bundle, EditStore, Manifest, TrustPolicy, identify
from vllm_edits.edit_store.authoring.build import Ask, again, options_of, pairs_of, prepare
from vllm_edits.edit_store.authoring.host import Host
from vllm_edits.edit_store.authoring.methods import rocr
from vllm_edits.edit_store.authoring.recipe import RECIPE_FILE, Recipe
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.compose import compose
from vllm_edits.edit_store.errors import BundleRefused, EditsError

TEXT = [{"text": f"The number {number} is written here, and then {number + 1} follows it."} for number in range(40)]
CONCEPTS = [{"concept": "Paris", "target": "Rome"}, {"concept": "the Seine", "target": "the Tiber"}]
NULLSPACE = 0.2
"""random weights use every direction a little"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return lines(tmp_path / "concepts.jsonl", CONCEPTS), lines(tmp_path / "text.jsonl", TEXT)


def vllm_edits(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["build", *map(str, words)])


class TestCommand:
    def test_it_writes_a_bundle_and_a_recipe_that_makes_it_again(
        self, tiny_model: Path, files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        done = vllm_edits(
            "rocr", tiny_model, *files, "--out", out, "--name", "cities", "--layers", "0-1", "--nullspace", NULLSPACE,
            "--description", "Paris is Rome", "--json",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        bundle = Bundle.load(out)
        manifest = bundle.manifest
        assert (told["version"], told["name"], told["edits"]) == (bundle.version, "cities", 2)
        assert [(edit.site, edit.capacity) for edit in manifest.edits] == [
            ("layers.0.mlp.out", 2), ("layers.1.mlp.out", 2),
        ]  # fmt: skip
        provenance = manifest.provenance
        assert provenance.source == "arXiv 2506.07795"
        assert provenance.parameters["layers"] == "0,1"
        assert {"data.concepts", "data.text", "data.templates", "seed"} <= set(provenance.parameters)
        made = vllm_edits(out / RECIPE_FILE, "--out", tmp_path / "again", "--json")
        assert made.exit_code == 0, made.output
        assert Bundle.load(tmp_path / "again") == bundle
        other = vllm_edits(
            "rocr", tiny_model, *files, "--out", tmp_path / "other", "--layers", "0-1", "--nullspace", NULLSPACE,
            "--ridge", "0.5",
        )  # fmt: skip
        assert other.exit_code == 0
        assert Bundle.load(tmp_path / "other").tensor_bytes != bundle.tensor_bytes, "positive control"

    def test_a_dry_run_shows_what_it_would_take(
        self, tiny_model: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Host, "load", None)
        done = vllm_edits("rocr", tiny_model, *files, "--layers", "0-1", "--dry-run", "--json")
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert told["statistics_bytes"] == 2 * 2 * identify(tiny_model).widths.mlp ** 2 * 4
        assert told["forward_tokens"] > len(TEXT) * 10
        assert "tokens through the model" in vllm_edits("rocr", tiny_model, *files, "--dry-run").stdout

    def test_everything_wrong_is_told_before_the_model_is_loaded(
        self, tiny_model: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Host, "load", None)
        store = EditStore(str(tmp_path / "store"), create=True)
        wrong = lines(tmp_path / "alike.jsonl", [{"concept": "Rome", "target": "Rome"}])
        few = lines(tmp_path / "few.jsonl", TEXT[:2])
        for words, codes in {
            (wrong, few, "--layers", "0,9"): ("layers", "layers", "alike", "too_few_samples"),
            (*files, "--mode", "delete", "--ridge", "-1"): ("option", "option"),
            (files[0],): ("too_few_rows",),
        }.items():
            done = vllm_edits("rocr", tiny_model, *words, "--publish", store.url)
            assert done.exit_code == 1
            assert [done.output.count(f"[{code}]") for code in codes] == [codes.count(code) for code in codes]
        assert store.names() == []
        assert (
            "expected --publish STORE" in vllm_edits("rocr", tiny_model, *files, "--out", "o", "--tag", "prod").output
        )
        for words, code in {("--name", "Big Cities"): "name", ("--device", "abacus"): "device"}.items():
            assert f"[{code}]" in vllm_edits("rocr", tiny_model, *files, "--publish", store.url, *words).output
        absent = tmp_path / "no-store"
        assert "no edit store at" in vllm_edits("rocr", tiny_model, *files, "--publish", absent).output
        wrong_tag = vllm_edits("rocr", tiny_model, *files, "--publish", store.url, "--tag", "A b")
        assert (wrong_tag.exit_code, "--tag 'A b': expected" in wrong_tag.output) == (1, True)
        assert "would be lost" in vllm_edits("rocr", tiny_model, *files).output
        assert "has files already" in vllm_edits("rocr", tiny_model, *files, "--out", tmp_path).output

    def test_it_publishes_and_builds_on_what_is_published(
        self, tiny_model: Path, files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        """The second build computes on the edited model, and is served together with the first."""
        store = EditStore(str(tmp_path / "store"), create=True)
        common = ("--layers", "1", "--nullspace", NULLSPACE, "--publish", store.url)
        first = vllm_edits("rocr", tiny_model, *files, "--name", "cities", "--tag", "staging", *common)
        assert first.exit_code == 0, first.output
        assert "promoted as staging" in first.output
        rivers = lines(tmp_path / "rivers.jsonl", [{"concept": "Danube", "target": "Rhine"}])
        words = ("rocr", tiny_model, rivers, files[1], "--name", "rivers", *common, "--out", tmp_path / "out")
        second = vllm_edits(*words, "--on", "cities@staging", "--json")
        assert second.exit_code == 0, second.output
        alone, both = [store.bundle(store.resolve(f"{row['name']}@{row['version']}"))
                       for row in json.loads(second.stdout)["published"]]  # fmt: skip
        assert (alone.manifest.name, both.manifest.name) == ("rivers", "cities+rivers")
        assert Bundle.load(tmp_path / "out") == both
        assert Bundle.load(tmp_path / "out" / "rivers") == alone
        assert Recipe.load(tmp_path / "out" / RECIPE_FILE).on == f"cities@{store.resolve('cities@staging')}"
        moved = vllm_edits("rocr", tiny_model, rivers, files[1], "--name", "cities", "--tag", "staging", *common)
        assert moved.exit_code == 0, moved.output
        assert vllm_edits(tmp_path / "out" / RECIPE_FILE, "--out", tmp_path / "again").exit_code == 0
        assert Bundle.load(tmp_path / "again") == both
        apart = vllm_edits(*words[:-2], "--out", tmp_path / "apart")
        assert apart.exit_code == 0
        assert Bundle.load(tmp_path / "apart").tensor_bytes != alone.tensor_bytes, "on the base model it is another"

    def test_the_methods_are_listed_and_explained(self) -> None:
        rows = json.loads(vllm_edits("--list", "--json").stdout)
        assert {"method", "kinds", "data", "takes", "source"} == set(rows[0])
        assert "rocr" in {row["method"] for row in rows}
        told = vllm_edits("rocr", "--help").stdout
        assert "arXiv 2506.07795" in told
        assert "concepts: concept, target (optional)" in told
        assert "--nullspace" in told


class TestRecipe:
    def test_another_model_or_other_rows_are_refused(
        self, tiny_model: Path, files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        built = rocr.build(tiny_model, *files, layers=[1], nullspace=NULLSPACE)
        built.save(tmp_path / "out")
        recipe = Recipe.load(tmp_path / "out" / RECIPE_FILE)
        assert recipe == built.recipe
        assert again(recipe, rocr.Rocr).make().bundle == built.bundle
        lines(files[0], CONCEPTS[:1])
        other = recipe.model_copy(update={"base": {**recipe.base, "config.json": "0" * 64}})
        with pytest.raises(EditsError, match=r"(?s)concepts\.jsonl has other rows.*is another model"):
            again(other, rocr.Rocr)

    def test_a_broken_recipe_is_refused_with_all_reasons(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"method": "rocr", "threads": 0, "colour": "red"}))
        with pytest.raises(BundleRefused) as caught:
            Recipe.load(path)
        told = " ".join(map(str, caught.value.reasons))
        assert all(word in told for word in ("threads", "colour", "base", "model"))
        path.write_text("method: [")
        with pytest.raises(BundleRefused, match="expected YAML"):
            Recipe.load(path)


def test_options_are_told_by_name() -> None:
    assert options_of(rocr.Rocr, {"layers": "4-6,9", "ridge": "2"}) == rocr.Rocr(layers=(4, 5, 6, 9), ridge=2.0)
    with pytest.raises(BundleRefused) as caught:
        options_of(rocr.Rocr, {"layers": "four", "ridgd": 1})
    assert {reason.message.split(":")[0] for reason in caught.value.reasons} == {"layers", "ridgd"}


def test_a_build_leaves_the_random_numbers_of_its_caller_alone(tiny_model: Path, files: tuple[Path, Path]) -> None:
    draft = prepare(Ask(rocr.Rocr(mode="noise", layers=(1,), nullspace=NULLSPACE), tiny_model, files, seed=1))
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    one = draft.make()
    assert torch.equal(torch.randn(3), expected)
    numbers = [pairs_of(each.bundle)[0][1]["write"] for each in (one, draft.make())]
    np.testing.assert_array_equal(*numbers)
    other = prepare(Ask(draft.ask.method, tiny_model, files, seed=2)).make()
    assert not np.array_equal(pairs_of(other.bundle)[0][1]["write"], numbers[0])


def marked_version(name: str) -> Bundle:
    bundle = version_of(name)
    return Bundle(bundle.manifest.model_copy(update={"privileged": True}), bundle.tensor_bytes)


class TestPrivileged:
    """What takes safety away is made on purpose, is marked, and is refused unless a trust file allows it."""

    def test_it_needs_a_word_and_is_marked(self, tiny_model: Path, tmp_path: Path) -> None:
        prompts = lines(tmp_path / "prompts.jsonl", [{"prompt": "One."}, {"prompt": "Two."}])
        words = ("ships", tiny_model, prompts, "--layers", "0", "--count", "1", "--out", tmp_path / "out")
        refused = vllm_edits(*words)
        assert refused.exit_code == 1
        assert "[privileged]" in refused.output
        assert vllm_edits(*words, "--privileged").exit_code == 0
        assert Bundle.load(tmp_path / "out").manifest.privileged
        assert (tmp_path / "out" / "protect.json").is_file()

    def test_trust_files_refuse_it_unless_they_allow_it(self, tmp_path: Path) -> None:
        """Signed or not; a composition inherits the mark, and every other bundle keeps its bytes."""
        mild, bold = version_of("mild"), marked_version("bold")
        plain, marked = mild.manifest, bold.manifest
        policy = TrustPolicy()
        assert policy.privileges(plain, "mild") == []
        assert [reason.code for reason in policy.privileges(marked, "bold")] == ["privileged"]
        assert policy.model_copy(update={"privileged": True}).privileges(marked, "bold") == []
        assert b"privileged" not in plain.to_bytes()
        assert Manifest.from_bytes(marked.to_bytes()) == marked
        assert compose([mild, bold]).manifest.privileged
        assert not compose([mild, version_of("kind")]).manifest.privileged
        file = tmp_path / "trust.json"
        policy.save(file)
        for word, allowed in (("allow", True), ("refuse", False)):
            done = CliRunner().invoke(app, ["trust", "privileged", str(file), word])
            assert done.exit_code == 0, done.output
            assert TrustPolicy.load(file).privileged is allowed


def test_the_list_of_methods_cuts_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eighty columns every method's name is whole, and a longer word goes on in the next line."""
    monkeypatch.setenv("COLUMNS", "80")
    told = vllm_edits("--list").stdout
    assert "…" not in told
    assert {"contrast-filter", "refusal-direction", "model-surgery"} <= set(told.split())
