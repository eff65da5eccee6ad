"""Probes are made where edits show, by transformers in float32; a build has them, and a command adds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.support.bundles import random_bundle
from vllm_edits.edit_store import BaseModelRef, Bundle, EditStore, LowRank, Offset, Scope, Strength, identify
from vllm_edits.edit_store.authoring import probing
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.host import Edits, Host, edited
from vllm_edits.edit_store.authoring.methods import steer
from vllm_edits.edit_store.authoring.probing import ORDINARY, probes_of
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.errors import BundleRefused
from vllm_edits.edit_store.probes import LISTED, Probe, effect_of

PROMPTS = ["The bird sings in the", "Good morning, said the", "Count to ten and then"]


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModelRef:
    return identify(tiny_model)


def offset(base: BaseModelRef, size: float = 3.0, **more: Any) -> Edits:
    vector = size * np.random.default_rng(0).normal(size=base.widths.hidden).astype(np.float32)
    return [(Offset(site="layers.1.resid", **more), {"vector": vector})]


def ids(host: Host, text: str) -> tuple[int, ...]:
    return tuple(host.tokenizer(text)["input_ids"])


def test_a_trace_is_what_transformers_says(host: Host, base: BaseModelRef) -> None:
    """Token by token; what is not among the likeliest counts as the least likely of these."""
    edits = offset(base)
    for probe in probes_of(host, edits, PROMPTS, count=3):
        for trace, some in ((probe.base, []), (probe.edited, edits)):
            sequence = list(probe.prompt)
            for place, token in enumerate(trace.tokens):
                with edited(host.model, some), torch.inference_mode():
                    row = host.model(torch.tensor([sequence])).logits[0, -1].double().log_softmax(-1)
                assert int(row.argmax()) == token
                least = float(row.topk(LISTED).values[-1])
                expected = [max(float(row[each]), least) for each in probe.watched]
                np.testing.assert_allclose(trace.logprobs[place], expected, atol=2e-4)
                assert trace.least[place] == pytest.approx(least, abs=2e-4)
                sequence.append(token)


def test_prompts_are_taken_where_the_edits_show_most_and_least(host: Host, base: BaseModelRef) -> None:
    """An edit of one token's vector shows behind texts that have it."""
    (token,) = set(ids(host, "x The bird")) - set(ids(host, "x The")) - {ids(host, "x")[0]} or {0}
    edits = offset(base, 8.0, scope=Scope(tokens=(token,)))
    found = probes_of(host, edits, [*PROMPTS, "A bird and a bird and a bird"], count=3)
    shown = [token in probe.prompt for probe in found]
    assert shown == [True, True, False]
    assert found[2].prompt in {ids(host, text) for text in ORDINARY}
    assert effect_of(found[2]) == 0
    assert min(map(effect_of, found[:2])) > 0.1


def test_edits_of_generated_tokens_show_behind_the_first(host: Host, base: BaseModelRef) -> None:
    (probe, *_) = probes_of(host, offset(base, 8.0, scope=Scope(segment="generated")), PROMPTS, count=2)
    assert probe.base.logprobs[0] == probe.edited.logprobs[0]
    assert probe.base.tokens[0] == probe.edited.tokens[0]
    assert effect_of(probe) > 0.05


def test_ends_of_strengths_are_probed(host: Host, base: BaseModelRef) -> None:
    found = probes_of(host, offset(base), PROMPTS, strength=Strength(minimum=-1, maximum=2, default=1))
    assert [probe.strength for probe in found] == [1, 1, 1, 1, -1, 2]
    assert len({probe.edited for probe in found if probe.prompt == found[0].prompt}) == 3


def test_edits_that_break_the_model_are_told(host: Host, base: BaseModelRef) -> None:
    numbers = {name: np.full((1, base.widths.of(point)), 1e30, dtype=np.float32)
               for name, point in (("read", "mlp.h"), ("write", "mlp.out"))}  # fmt: skip
    edits: Edits = [(LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=1), numbers)]
    with pytest.raises(BundleRefused, match="computes no numbers behind"):
        probes_of(host, edits, PROMPTS)


def test_a_build_has_probes_and_its_recipe_says_how_many(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"positive": f"It is a good day {number}", "negative": f"It is a bad night {number}"} for number in range(4)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = steer.build(tiny_model, file, probes=2, size=4.0)
    assert len(built.bundle.manifest.probes) == built.recipe.probes == 2
    host = Host.load(tiny_model)
    again = probes_of(host, pairs_of(built.bundle), [row["positive"] for row in rows], count=2)
    assert again == built.bundle.manifest.probes
    assert not steer.build(tiny_model, file, probes=0).bundle.manifest.probes


class TestCommand:
    @pytest.fixture
    def store(self, tmp_path: Path) -> EditStore:
        return EditStore(str(tmp_path / "store"), create=True)

    def run(self, *words: object) -> Any:
        return CliRunner().invoke(app, ["probes", *map(str, words)])

    def test_it_adds_probes_to_a_published_version(
        self, store: EditStore, base: BaseModelRef, tiny_model: Path, tmp_path: Path
    ) -> None:
        plain = random_bundle("loud", base, seed=1)
        store.promote(f"loud@{store.publish(plain)}", tag="prod")
        texts = tmp_path / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
        where = ("--store", store.url)
        assert "no probes" in self.run("show", "loud@prod", *where).stdout
        done = self.run("add", "loud@prod", tiny_model, texts, *where, "--tag", "staging", "--json")
        assert done.exit_code == 0, done.output
        (row,) = json.loads(done.stdout)
        made = store.bundle(store.resolve("loud@staging"))
        assert row["version"] == made.version != plain.version
        assert made.tensor_bytes == plain.tensor_bytes
        assert made.manifest.edits == plain.manifest.edits
        assert len(made.manifest.probes) >= 4
        shown = json.loads(self.run("show", "loud@staging", *where, "--json").stdout)
        assert [Probe.model_validate(each) for each in shown] == list(made.manifest.probes)
        assert "nats" in self.run("show", "loud@staging", *where).stdout
        again = self.run("add", "loud@staging", tiny_model, texts, *where)
        assert (again.exit_code, "has these probes already" in again.output) == (1, True)

    def test_a_composition_has_probes_of_its_own(
        self, store: EditStore, base: BaseModelRef, tiny_model: Path, host: Host
    ) -> None:
        """Behind the prompts of its parts' probes; both parts' edits are in them."""
        for name, seed in (("loud", 1), ("rude", 2)):
            bundle = random_bundle(name, base, seed=seed)
            proven = bundle.with_probes(probes_of(host, pairs_of(bundle), PROMPTS, count=3))
            store.promote(f"{name}@{store.publish(proven)}", tag="prod")
        where = ("--store", store.url, "--allow-conflicts")
        plain = CliRunner().invoke(app, ["compose", "loud", "rude", *where, "--json"])
        assert plain.exit_code == 0, plain.output
        assert not store.manifest(json.loads(plain.stdout)[0]["version"]).probes
        done = CliRunner().invoke(app, ["compose", "loud", "rude", *where, "--probes", str(tiny_model), "--json"])
        assert done.exit_code == 0, done.output
        both = store.bundle(json.loads(done.stdout)[0]["version"])
        assert {probe.prompt for probe in both.manifest.probes} & {ids(host, text) for text in PROMPTS}
        parts = [store.bundle(part.version) for part in both.manifest.parts]
        again = probes_of(host, [pair for part in parts for pair in pairs_of(part)], PROMPTS)
        assert {probe.prompt: probe.edited for probe in both.manifest.probes}.items() & {
            probe.prompt: probe.edited for probe in again
        }.items()

    def test_it_adds_probes_to_a_folder(self, base: BaseModelRef, tiny_model: Path, tmp_path: Path) -> None:
        random_bundle("loud", base, seed=1).save(tmp_path / "loud")
        assert self.run("add", tmp_path / "loud", tiny_model, "--out", tmp_path / "out", "--count", 2).exit_code == 0
        assert len(Bundle.load(tmp_path / "out").manifest.probes) >= 2
        for words, told in (
            ((tmp_path / "loud", tiny_model), "expected --out FOLDER, or --store STORE"),
            (("loud@prod", tiny_model, "--out", tmp_path / "x"), "is no folder of a bundle"),
        ):
            refused = self.run("add", *words)
            assert (refused.exit_code, told in refused.output) == (1, True), refused.output

    def test_another_model_is_refused(self, base: BaseModelRef, tiny_model: Path, tmp_path: Path) -> None:
        other = base.model_copy(update={"files": {"model.safetensors": "0" * 64}})
        random_bundle("loud", other, seed=1).save(tmp_path / "loud")
        refused = self.run("add", tmp_path / "loud", tiny_model, "--out", tmp_path / "out")
        assert (refused.exit_code, "[base_model]" in refused.output) == (1, True)


def test_a_long_prompt_is_cut_at_its_front(host: Host, base: BaseModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_PROMPT", 5)
    for probe in probes_of(host, offset(base), ["one two three four five six seven eight"], count=4):
        assert len(probe.prompt) <= 5
