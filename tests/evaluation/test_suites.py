"""Suites are read with all their problems at once; what ships is whole; a bundle is evaluated in transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.support.bundles import bundle_of, random_pairs
from vllm_edits.edit_store import EditStore, Scope, Strength, identify
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.host import Host, edited
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.errors import BundleRefused, EditsError
from vllm_edits.edit_store.evaluation import suite
from vllm_edits.edit_store.evaluation.evaluate import in_process
from vllm_edits.edit_store.evaluation.figure import Report
from vllm_edits.edit_store.evaluation.in_transformers import HostSpeaker
from vllm_edits.edit_store.probes import LISTED

TEXTS = ["The bird sings in the tree and flies.", "Good morning, said the man to his dog."]


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


def silent(_what: str, _done: int, _total: int) -> None: ...


def written(folder: Path, *measures: dict[str, Any], **files: list[dict[str, Any]]) -> Path:
    """A suite with its files."""
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "own", "measures": list(measures)}))
    return path


COLLAPSE = {"measure": "collapse", "data": {"corpus": "corpus.jsonl"}}


class TestSpeaker:
    """In transformers: every figure is that of the library, edited by the formulas."""

    @pytest.mark.parametrize("changed", ["", "everywhere", "where a scope is"])
    def test_it_says_what_transformers_says(self, host: Host, tiny_model: Path, changed: str) -> None:
        """A scope of all tokens that the texts have is no scope, but goes the way of one."""
        ((edit, numbers),) = random_pairs("offset", 1, host.widths, seed=1)
        edits = pairs_of(bundle_of("loud", identify(tiny_model), [(edit, numbers)])) if changed else []
        prompts, answers = ["The bird sings in the", "Good morning, said the"], [" tree", " old man"]
        texts = [*TEXTS, *map(str.__add__, prompts, answers)]
        tokens = sorted({token for text in texts for token in host.tokenizer(text)["input_ids"]})
        scoped = edit.model_copy(update={"scope": Scope(tokens=tuple(tokens))})
        speaker = HostSpeaker(host, [(scoped, numbers)] if changed == "where a scope is" else edits)
        told = speaker.losses(TEXTS)
        with edited(host.model, edits), torch.inference_mode():
            for text, losses in zip(TEXTS, told, strict=True):
                ids = torch.tensor([host.tokenizer(text)["input_ids"]])
                expected = float(host.model(ids, labels=ids).loss)
                assert sum(losses) / len(losses) == pytest.approx(expected, rel=1e-4)
            mean, total = host.likelihood(prompts, answers), host.likelihood(prompts, answers, mean=False)
            row = host.next_token(prompts)
            said = [each.text for each in host.answers(prompts, 1)]
        assert speaker.likelihoods(prompts, answers) == pytest.approx(mean.tolist(), rel=1e-4)
        assert speaker.totals(prompts, answers) == pytest.approx(total.tolist(), rel=1e-4)
        assert speaker.continuations(prompts, 1) == said
        for likeliest, each in zip(speaker.likeliest(prompts), row, strict=True):
            assert max(likeliest.values()) == pytest.approx(float(each.max()), rel=1e-4)
            assert len(likeliest) <= LISTED
        with pytest.raises(EditsError, match="cannot be told from those of its prompt"):
            speaker.likelihoods(["The bird"], [""])


class TestReading:
    @pytest.mark.parametrize("name", suite.shipped())
    def test_what_ships_is_whole(self, name: str) -> None:
        found = suite.load(name)
        assert found.name == name
        assert found.measures

    def test_everything_that_is_wrong_is_told_at_once(self, tmp_path: Path) -> None:
        path = written(
            tmp_path,
            {"measure": "colapse", "data": {"corpus": "corpus.jsonl"}},
            {"measure": "forms", "data": {"forms": "absent.jsonl"}},
            {**COLLAPSE, "options": {"tokens": 0, "colour": "red"}},
            {"measure": "locality"},
            corpus=[{"text": text} for text in TEXTS],
        )
        with pytest.raises(BundleRefused) as caught:
            suite.load(path)
        told = [str(reason) for reason in caught.value.reasons]
        for part in ("Did you mean 'collapse'?", "absent.jsonl", "collapse: tokens", "collapse: colour",
                     "locality: expected data for neighbours or harmless"):  # fmt: skip
            assert any(part in each for each in told), (part, told)

    @pytest.mark.parametrize(
        ("text", "told"), [("name: [", "expected YAML"), ("name: own\n", "measures"), ("colour: red\n", "colour")]
    )
    def test_a_file_that_is_no_suite_is_refused(self, tmp_path: Path, text: str, told: str) -> None:
        path = tmp_path / "suite.yaml"
        path.write_text(text)
        with pytest.raises(BundleRefused, match=told):
            suite.load(path)
        with pytest.raises(BundleRefused, match=r"Known by name: capital, standard"):
            suite.load("standart")

    def test_its_digest_is_that_of_options_and_rows(self, tmp_path: Path) -> None:
        rows = [{"text": text} for text in TEXTS]
        first = suite.load(written(tmp_path, COLLAPSE, corpus=rows)).sha256
        moved = tmp_path / "moved"
        moved.mkdir()
        assert suite.load(written(moved, COLLAPSE, corpus=rows)).sha256 == first
        assert suite.load(written(moved, COLLAPSE, corpus=[*rows, {"text": "More."}])).sha256 != first
        assert suite.load(written(moved, {**COLLAPSE, "options": {"tokens": 9}}, corpus=rows)).sha256 != first


class TestEvaluate:
    def test_a_broken_version_shows_beside_a_sound_one(self, tiny_model: Path, tmp_path: Path) -> None:
        """In a report that can be read again; a strength of nothing is the base model."""
        base = identify(tiny_model)
        own = suite.load(written(tmp_path, COLLAPSE, corpus=[{"text": text} for text in TEXTS]))
        pairs = random_pairs("offset", 1, base.widths, seed=1, strength=20.0)
        bundle = bundle_of("loud", base, pairs)
        report = in_process(bundle, tiny_model, own, silent)
        assert Report.model_validate_json(report.model_dump_json()) == report
        assert (report.version, report.base, report.suite_sha256) == (bundle.version, base.files, own.sha256)
        broken = report.figure("collapse: perplexity: ratio")
        assert broken is not None
        assert abs(math.log(broken.edited)) > 0.05
        none = in_process(bundle, tiny_model, own, silent, strength=0.0).figure("collapse: perplexity: ratio")
        assert none is not None
        assert none.edited == pytest.approx(1, abs=1e-5)
        assert report.figure("collapse: absent") is None

    def test_the_command_writes_and_prints(self, tiny_model: Path, tmp_path: Path) -> None:
        base, store = identify(tiny_model), EditStore(str(tmp_path / "store"), create=True)
        pairs = random_pairs("offset", 1, base.widths, seed=1)
        store.promote(f"loud@{store.publish(bundle_of('loud', base, pairs))}", tag="prod")
        path = written(tmp_path, COLLAPSE, corpus=[{"text": text} for text in TEXTS])
        words = ["evaluate", "loud@prod", "--suite", str(path), "--store", store.url]
        done = CliRunner().invoke(app, [*words, "--model", str(tiny_model), "--out", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
        assert "collapse: perplexity: ratio (less is better)" in " ".join(done.output.split())
        assert Report.model_validate_json((tmp_path / "out" / "own.json").read_text()).variant == "loud"
        for wrong in ([], ["--model", str(tiny_model), "--url", "http://127.0.0.1:1"]):
            refused = CliRunner().invoke(app, [*words, *wrong])
            assert (refused.exit_code, "expected --model FOLDER" in refused.output) == (1, True)
        away = CliRunner().invoke(app, [*words, "--url", "http://127.0.0.1:1"])
        assert (away.exit_code, "does not answer as a server of edits" in away.output) == (1, True)

    def test_another_model_is_refused(self, tiny_model: Path, tmp_path: Path) -> None:
        base = identify(tiny_model)
        other = base.model_copy(update={"files": {"model.safetensors": "0" * 64}})
        own = suite.load(written(tmp_path, COLLAPSE, corpus=[{"text": text} for text in TEXTS]))
        bundle = bundle_of("loud", other, random_pairs("offset", 1, base.widths, seed=1))
        with pytest.raises(BundleRefused, match="base_model"):
            in_process(bundle, tiny_model, own, silent)

    def test_a_bounded_strength_has_its_default(self, tiny_model: Path, tmp_path: Path) -> None:
        base = identify(tiny_model)
        own = suite.load(written(tmp_path, COLLAPSE, corpus=[{"text": text} for text in TEXTS]))
        bundle = bundle_of("loud", base, random_pairs("offset", 1, base.widths, seed=1, strength=20.0))
        manifest = bundle.manifest.model_copy(update={"strength": Strength(minimum=0, maximum=1, default=0)})
        report = in_process(type(bundle)(manifest, bundle.tensor_bytes), tiny_model, own, silent)
        assert report.figures[1].edited == pytest.approx(1, abs=1e-5)
