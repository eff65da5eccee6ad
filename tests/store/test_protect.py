"""Attention heads that no edit may touch: which edits do, by their numbers, and the commands that refuse them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.bundles import Pairs, bundle_of
from vllm_edits.edit_store import (
    KINDS,
    BaseModelRef,
    Bundle,
    EditStore,
    Gate,
    LowRank,
    Offset,
    Scale,
    SubspaceFilter,
    WeightDelta,
    Widths,
)
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.errors import BundleRefused
from vllm_edits.edit_store.protect import Protect, ProtectedHead, touched
from vllm_edits.edit_store.sites import LAYER_POINTS, Site

WIDTHS = Widths(layers=3, hidden=24, mlp=16, heads=6, kv_heads=2, head_dim=4, vocab=24)
BASE = BaseModelRef(name="tiny", architecture="LlamaForCausalLM", widths=WIDTHS, files={"model.safetensors": "a" * 64})
QK_NORM = BASE.model_copy(update={"architecture": "Qwen3ForCausalLM"})
EVERY = Protect(base=BASE.files, heads=tuple(ProtectedHead(layer=1, head=head) for head in range(6)))
"""All heads of layer 1; three share each of two key-value heads."""
RANDOM = np.random.default_rng(0)


def heads(edit: Any, base: BaseModelRef = BASE, **numbers: Any) -> set[int]:
    """The heads of layer 1 that an edit touches."""
    bundle = bundle_of("one", base, [(edit, numbers)])
    assert {reason.code for reason in touched(bundle, EVERY)} <= {"protected_head"}
    return {int(reason.message.split(" head ")[1].split()[0]) for reason in touched(bundle, EVERY)}


def only(width: int, *rows: int, size: int = 4) -> np.ndarray:
    """Random numbers at the heads named, zeros elsewhere."""
    numbers = np.zeros(width, dtype=np.float32)
    for row in rows:
        numbers[row * size : (row + 1) * size] = RANDOM.normal(size=size)
    return numbers


def some(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


class TestChanged:
    """Vectors of a head: its queries, its output, and the keys and values of its group."""

    @pytest.mark.parametrize("point", ["q.out", "attn.z"])
    def test_factors_but_one(self, point: str) -> None:
        factors = np.ones(6)
        scale = Scale(site=f"layers.1.{point}")
        assert heads(scale, factor=factors) == set()
        factors[[2, 5]] = 0.0, 1.001
        assert heads(scale, factor=factors) == {2, 5}
        assert heads(Scale(site=f"layers.0.{point}"), factor=factors) == set(), "another layer"
        channels = np.ones(24)
        channels[7] = 0.5
        assert heads(Scale(site=f"layers.1.{point}", per="channel"), factor=channels) == {1}

    @pytest.mark.parametrize("point", ["k.out", "v.out"])
    def test_keys_and_values_are_those_of_a_group(self, point: str) -> None:
        scale = Scale(site=f"layers.1.{point}")
        assert heads(scale, factor=np.array([1.0, 0.5])) == {3, 4, 5}
        edit = LowRank(site=f"layers.1.{point}", reads="layers.1.attn.in", rank=1)
        assert heads(edit, read=some(1, 24), write=only(8, 0)[None]) == {0, 1, 2}

    def test_queries_and_keys_before_their_norm(self) -> None:
        for point, width, expected in (("q.proj", 24, {1}), ("k.proj", 8, {3, 4, 5})):
            edit = LowRank(site=f"layers.1.{point}", reads="layers.1.attn.in", rank=1)
            assert heads(edit, QK_NORM, read=some(1, 24), write=only(width, 1)[None]) == expected

    def test_rows_of_a_weight(self) -> None:
        """Dense, sparse and low-rank; a product of zero changes nothing, whatever its other factor has."""
        delta = np.stack([only(24, 3, 4)] * 24, axis=1)
        assert heads(WeightDelta(site="layers.1.q.out", reads="layers.1.attn.in"), delta=delta) == {3, 4}
        sparse = WeightDelta(site="layers.1.q.out", reads="layers.1.attn.in", layout="sparse", count=2)
        assert heads(sparse, rows=[4, 23], columns=[0, 0], values=[1e-6, 0.0]) == {1}
        product = LowRank(site="layers.1.q.out", reads="layers.1.attn.in", rank=2)
        read, write = some(2, 24), np.stack([only(24, 0), only(24, 5)])
        assert heads(product, read=read, write=write) == {0, 5}
        read[1] = 0
        assert heads(product, read=read, write=write) == {0}

    def test_offsets_and_a_norm_that_is_restored(self) -> None:
        vector = only(24, 1) * 1e-9
        assert heads(Offset(site="layers.1.attn.z"), vector=vector) == {1}
        assert heads(Offset(site="layers.1.q.out"), vector=vector) == {1}
        assert heads(Offset(site="layers.1.attn.z", renorm=True), vector=only(24, 1)) == set(range(6))

    def test_subspaces(self) -> None:
        """What is removed, what alone is kept, and what an oblique filter reads and writes."""
        basis = only(24, 2)
        basis /= np.linalg.norm(basis)
        off = SubspaceFilter(site="layers.1.attn.z", rank=1)
        assert heads(off, basis=basis[None], mean=100 * some(24)) == {2}
        onto = SubspaceFilter(site="layers.1.attn.z", rank=20, onto=True)
        assert heads(onto, basis=np.eye(24)[4:], mean=100 * some(24)) == {0}
        dual = basis + only(24, 4)
        oblique = SubspaceFilter(site="layers.1.q.out", rank=1, oblique=True)
        assert heads(oblique, basis=basis[None], dual=dual[None], mean=np.zeros(24)) == {2, 4}

    def test_a_gate_that_never_fires_on_random_vectors(self) -> None:
        """Neurons with a bias that no vector here overcomes: their numbers count."""
        gate = Gate(site="layers.1.q.out", reads="layers.1.attn.in", rank=1)
        assert heads(gate, read=some(1, 24), bias=[-1e9], write=only(24, 4)[None]) == {4}
        silu = Gate(site="layers.1.q.out", reads="layers.1.attn.in", rank=1, activation="silu")
        assert heads(silu, read=some(1, 24), bias=[-50.0], write=only(24, 4)[None]) == {4}


class TestReadOutput:
    """What is added at the output projection, or to another head, from a head's output."""

    @pytest.mark.parametrize("size", [1.0, 1e-9])
    def test_columns_of_the_output_projection(self, size: float) -> None:
        edit = LowRank(site="layers.1.attn.out", reads="layers.1.attn.z", rank=1)
        assert heads(edit, read=size * only(24, 0, 5)[None], write=some(1, 24)) == {0, 5}
        assert heads(edit, read=only(24, 0, 5)[None], write=np.zeros((1, 24))) == set()
        delta = np.stack([only(24, 2)] * 24) * size
        assert heads(WeightDelta(site="layers.1.attn.out", reads="layers.1.attn.z"), delta=delta) == {2}

    def test_in_place(self) -> None:
        """From head 1 to head 3 touches both; in the queries it touches the one that is written."""
        numbers = {"read": only(24, 1)[None], "write": only(24, 3)[None]}
        assert heads(LowRank(site="layers.1.attn.z", reads="layers.1.attn.z", rank=1), **numbers) == {1, 3}
        assert heads(LowRank(site="layers.1.q.out", reads="layers.1.q.out", rank=1), **numbers) == {3}
        basis = only(24, 1)
        basis /= np.linalg.norm(basis)
        turned = {"basis": basis[None], "dual": (basis + only(24, 3))[None], "mean": np.zeros(24)}
        assert heads(SubspaceFilter(site="layers.1.attn.z", rank=1, oblique=True), **turned) == {1, 3}

    @pytest.mark.parametrize("activation", ["relu", "step", "sigmoid", "silu"])
    def test_gates(self, activation: Any) -> None:
        gate = Gate(site="layers.1.attn.out", reads="layers.1.attn.z", rank=2, activation=activation)
        bias = [-1e6, 0.5] if activation in ("relu", "step") else [-2.0, 0.5]
        read = np.stack([only(24, 0), only(24, 4)])
        assert heads(gate, read=read, bias=bias, write=some(2, 24)) == {0, 4}

    def test_every_other_edit_leaves_heads_alone(self) -> None:
        """Each form of each kind at each point that is not of a head and does not read one."""
        own = {"q.proj", "k.proj", "q.out", "k.out", "v.out", "attn.z"}
        seen = 0
        for kind in KINDS.values():
            for point in LAYER_POINTS:
                for _, edit in kind.forms(Site(1, point), WIDTHS.of(point)) if point in kind.points else ():
                    numbers = edit.sample(np.random.default_rng(seen), WIDTHS, 0.5)
                    bundle = bundle_of("one", BASE, [(edit, numbers)])
                    try:
                        found = touched(bundle, EVERY)
                    except BundleRefused:  # no such point in a Llama
                        continue
                    assert bool(found) is (point in own or edit.source.endswith("attn.z")), edit
                    seen += 1
        assert seen > 60


class TestList:
    def test_one_reason_for_each_head_with_all_its_edits(self) -> None:
        protect = Protect(
            base=BASE.files, source="ships", heads=(ProtectedHead(layer=1, head=2), ProtectedHead(layer=2, head=0))
        )
        factor = np.zeros(6)
        pairs: Pairs = [
            (Scale(site=f"layers.{layer}.{point}"), {"factor": factor})
            for layer, point in ((1, "q.out"), (1, "attn.z"), (2, "q.out"), (0, "q.out"))
        ]
        one, two = touched(bundle_of("one", BASE, pairs), protect)
        assert one.message == (
            "layer 1, head 2 is protected, found by ships, and would be changed by scale at layers.1.q.out and scale "
            "at layers.1.attn.z"
        )
        assert two.message.startswith("layer 2, head 0 ")

    def test_a_list_of_another_model_or_of_heads_that_are_not_there(self) -> None:
        bundle = bundle_of("one", BASE, [(Offset(site="layers.1.resid"), {"vector": some(24)})])
        other = EVERY.model_copy(update={"base": {"model.safetensors": "b" * 64}})
        (reason,) = touched(bundle, other)
        assert (reason.code, "model.safetensors differ(s)" in reason.message) == ("base_model", True)
        wide = Protect(base=BASE.files, heads=(ProtectedHead(layer=3, head=0), ProtectedHead(layer=0, head=6)))
        assert [reason.code for reason in touched(bundle, wide)] == ["no_head", "no_head"]
        assert touched(bundle, EVERY) == []

    def test_a_file_is_read_whole_or_refused_with_all_reasons(self, tmp_path: Path) -> None:
        path = tmp_path / "protect.json"
        path.write_text(json.dumps(EVERY.model_dump()))
        assert Protect.load(path) == EVERY
        path.write_text(json.dumps({"schema_version": 2, "base": {"a": "b"}, "heads": [{"layer": -1}], "more": 1}))
        with pytest.raises(BundleRefused) as caught:
            Protect.load(path)
        fields = {reason.message.split(":")[0] for reason in caught.value.reasons}
        assert fields >= {"schema_version", "base.a", "heads.0.layer", "heads.0.head", "more"}
        for content, said in (("{", "expected JSON"), ('{"heads": []}', "base: Field required")):
            path.write_text(content)
            with pytest.raises(BundleRefused, match=said):
                Protect.load(path)
        with pytest.raises(BundleRefused, match=r"(?s)none\.json.*No such file"):
            Protect.load(tmp_path / "none.json")


Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Types a command, with the store in the environment."""
    EditStore(str(tmp_path / "store"), create=True)
    monkeypatch.setenv("VLLM_EDITS_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, list(map(str, words)))


class TestPublish:
    def test_a_bundle_that_touches_a_head_is_not_published(self, run: Run, tmp_path: Path) -> None:
        file = tmp_path / "protect.json"
        file.write_text(json.dumps(EVERY.model_dump()))
        factor = np.ones(6)
        for name, value in (("mild", 1.0), ("bold", 0.0)):
            factor[[1, 4]] = value
            pairs: Pairs = [(Scale(site="layers.1.attn.z"), {"factor": factor.copy()})]
            bundle_of(name, BASE, pairs).save(tmp_path / name)
        refused = run("publish", tmp_path / "bold", "--protect", file, "--tag", "prod")
        assert refused.exit_code == 1
        assert [f"layer 1, head {head} is protected" in refused.stderr for head in range(6)] == [
            False, True, False, False, True, False,
        ]  # fmt: skip
        assert json.loads(run("list", "--json").stdout) == []
        assert run("publish", tmp_path / "mild", "--protect", file).exit_code == 0
        assert run("publish", tmp_path / "bold").exit_code == 0, "positive control: without the list it may"
        assert "Name a protect.json" in run("publish", tmp_path / "mild", "--protect", tmp_path / "none").stderr

    @pytest.mark.long
    def test_a_build_keeps_off_the_heads_that_another_one_found(
        self, run: Run, tiny_model: Path, tmp_path: Path
    ) -> None:
        """The same heads again are refused, but written; other layers are published."""
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("How is bread made?", "Who?")))
        words = ("build", "ships", tiny_model, prompts, "--count", 1, "--privileged", "--layers")
        assert run(*words, 1, "--out", tmp_path / "safety").exit_code == 0
        listed = ("--publish", tmp_path / "store", "--protect", tmp_path / "safety" / "protect.json")
        refused = run("build", tmp_path / "safety" / "recipe.yaml", *listed, "--out", tmp_path / "again")
        assert refused.exit_code == 1
        assert "[protected_head]" in refused.stderr
        assert Bundle.load(tmp_path / "again") == Bundle.load(tmp_path / "safety")
        refused = run("build", tmp_path / "safety" / "recipe.yaml", *listed)
        (saved,) = (tmp_path / "cache" / "vllm-edits" / "built").iterdir()
        assert f"the bundle is in {saved}" in refused.stderr
        assert Bundle.load(saved) == Bundle.load(tmp_path / "safety")
        assert run(*words, 2, *listed, "--name", "other").exit_code == 0
        assert [row["name"] for row in json.loads(run("list", "--json").stdout)] == ["other"]

    def test_a_list_that_does_not_fit_is_told_before_anything_is_computed(
        self, run: Run, tiny_model: Path, tmp_path: Path
    ) -> None:
        file, prompts = tmp_path / "protect.json", tmp_path / "prompts.jsonl"
        file.write_text(json.dumps(EVERY.model_dump()))
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("How is bread made?", "Who?")))
        words = ("build", "ships", tiny_model, prompts, "--privileged", "--protect", file)
        assert "expected --publish STORE" in run(*words, "--out", tmp_path / "out").stderr
        refused = run(*words, "--publish", tmp_path / "store", "--dry-run")
        assert (refused.exit_code, "[base_model]" in refused.stderr) == (1, True)
        file.write_text("{")
        assert "expected JSON" in run(*words, "--publish", tmp_path / "store", "--dry-run").stderr


def test_show_tells_if_a_version_takes_safety_away_and_how_much_it_changes(run: Run, tmp_path: Path) -> None:
    for name, more in (("mild", {}), ("bold", {"privileged": True, "cumulative_edits": 12})):
        made = bundle_of(name, BASE, [(Offset(site="layers.1.resid"), {"vector": some(24)})])
        Bundle(made.manifest.model_copy(update=more), made.tensor_bytes).save(tmp_path / name)
        version = json.loads(run("publish", tmp_path / name, "--json").stdout)[0]["version"]
        shown = " ".join(run("show", f"{name}@{version}").stdout.split())
        assert ("privileged yes: it takes safety away" in shown) is bool(more)
        assert ("privileged no" in shown) is not bool(more)
        assert ("changes 12 concepts, facts or behaviours" if more else "changes not counted") in shown
        manifest = json.loads(run("show", f"{name}@{version}", "--json").stdout)["manifest"]
        assert (manifest["privileged"], manifest["cumulative_edits"]) == (bool(more), 12 if more else 0)
