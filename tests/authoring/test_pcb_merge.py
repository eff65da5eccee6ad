"""PCB-Merging against its formulas on small vectors, and changes of a weight as low rank; both on a model's bundles."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.bundles import Pairs, bundle_of
from vllm_edits.edit_store import (
    BaseModelRef,
    Bundle,
    Gate,
    LowRank,
    Offset,
    Scale,
    Scope,
    WeightDelta,
    identify,
)
from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.authoring.build import Ask, again, pairs_of, prepare
from vllm_edits.edit_store.authoring.host import Host, edited
from vllm_edits.edit_store.authoring.low_rank_of import as_low_rank
from vllm_edits.edit_store.authoring.methods import pcb_merge
from vllm_edits.edit_store.authoring.methods.pcb_merge import MERGED_FILE, PcbMerge, merge
from vllm_edits.edit_store.authoring.recipe import RECIPE_FILE, Recipe
from vllm_edits.edit_store.authoring.task_vectors import TaskVectors, no_update
from vllm_edits.edit_store.edits import MAX_RANK, Array
from vllm_edits.edit_store.errors import BundleRefused, EditsError

CLOSE: dict[str, float] = {"atol": 1e-6, "rtol": 1e-4}


def random_vectors(*sizes: int, scale: float = 0.3) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))) * scale


def by_the_formulas(vectors: Array, weights: Sequence[float], ratio: float, tail: float) -> Array:
    """Every number by itself, in float64: clamp, intra, inter, threshold, norm, weighted mean."""
    tasks, numbers = vectors.shape
    clamped, scores = [], []
    for vector in vectors.astype(np.float64):
        ordered = sorted(abs(vector))
        least, most = ordered[int(numbers * tail)], ordered[int(numbers * (1 - tail) - 1)]
        magnitudes = [min(max(abs(number), least), most) for number in vector]
        score = []
        for place, magnitude in enumerate(magnitudes):
            norm = (magnitude - min(magnitudes)) / (max(magnitudes) - min(magnitudes))
            agreement = vector[place] * sum(other[place] for other in vectors.astype(np.float64))
            score.append(np.exp(tasks * norm**2) * np.tanh(agreement))
        threshold = sorted(score)[int(numbers * (1 - ratio))]
        kept = [max(each, threshold) for each in score]
        scores.append([(each - min(kept)) / (max(kept) - min(kept)) for each in kept])
        clamped.append([np.sign(number) * each for number, each in zip(vector, magnitudes, strict=True)])
    merged = np.zeros(numbers)
    for place in range(numbers):
        above = sum(scores[task][place] * weights[task] * clamped[task][place] for task in range(tasks))
        below = sum(scores[task][place] for task in range(tasks))
        merged[place] = above / below if below else 0
    return merged


class TestFormula:
    @pytest.mark.parametrize(("tasks", "ratio", "tail"), [(2, 0.1, 1e-4), (3, 0.4, 0.05), (5, 0.2, 0.0), (2, 1.0, 0.1)])
    def test_it_is_the_formulas_number_by_number(self, tasks: int, ratio: float, tail: float) -> None:
        vectors, weights = random_vectors(tasks, 60), [1.0, 1.2, 0.8, 1.0, 0.5][:tasks]
        found = merge(lambda: vectors, weights, ratio=ratio, tail=tail)
        np.testing.assert_allclose(found, by_the_formulas(vectors.numpy(), weights, ratio, tail), **CLOSE)
        other = by_the_formulas(vectors.numpy(), weights, ratio / 2, tail)
        assert not np.allclose(found, other, **CLOSE), "positive control: the ratio matters"

    def test_the_order_of_the_bundles_does_not_matter(self) -> None:
        """Bundles with their weights. Weights that change places are another merge."""
        vectors, weights = random_vectors(3, 400), [1.0, 1.5, 0.5]
        found = merge(lambda: vectors, weights, ratio=0.3)
        turned = merge(lambda: vectors[[2, 0, 1]], [0.5, 1.0, 1.5], ratio=0.3)
        torch.testing.assert_close(turned, found, **CLOSE)
        assert not torch.allclose(merge(lambda: vectors[[2, 0, 1]], weights, ratio=0.3), found, **CLOSE)

    def test_equal_bundles_are_that_bundle_where_it_is_large(self) -> None:
        """The largest tenth as it was, times the weight; the others are dropped. The input stays as it was."""
        vector = random_vectors(400)
        found = merge(lambda: [vector, vector], [1.5, 1.5], ratio=0.1, tail=0.0)
        torch.testing.assert_close(vector, random_vectors(400))
        kept = found != 0
        assert int(kept.sum()) == 39, "the threshold itself has no score"
        torch.testing.assert_close(found[kept], 1.5 * vector[kept], **CLOSE)
        assert float(vector[kept].abs().min()) > float(vector[~kept].abs().max()) - 1e-6

    def test_opposite_numbers_cancel_and_the_stronger_one_wins(self) -> None:
        """Where both have the same number with other signs there is nothing; where one is larger, only that counts."""
        one, other = torch.full((20,), 0.1), torch.full((20,), 0.1)
        one[0], other[0] = 1.0, -1.0
        one[1], other[1] = 1.0, -0.4
        one[2], other[2] = 1.0, 0.4
        found = merge(lambda: [one, other], [1.0, 1.0], ratio=0.3, tail=0.0)
        assert float(found[0]) == 0
        assert float(found[1]) == 1
        assert 0.4 < float(found[2]) < 1, "positive control: where they agree it lies between"
        assert not merge(lambda: [one, -one], [1.0, 1.0]).any()

    def test_the_tails_are_clamped(self) -> None:
        vector = random_vectors(1000)
        vector[7] = 100.0
        clamped, whole = (merge(lambda: [vector, vector], [1.0, 1.0], tail=tail)[7] for tail in (1e-3, 0.0))
        assert float(clamped) == float(vector.abs().sort().values[-2])
        assert float(whole) == 100


class TestLowRank:
    @pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
    def test_the_smallest_rank_within_the_error(self, shape: tuple[int, int]) -> None:
        """By the singular values of the library: one rank less would lose more."""
        delta = random_vectors(*shape)
        sizes = torch.linalg.svdvals(delta.double())
        for error in (0.5, 0.1, 0.01):
            form = as_low_rank(delta, error=error)
            assert form is not None
            lost = [float(sizes[rank:].norm() / sizes.norm()) for rank in (form.rank, form.rank - 1)]
            assert lost[0] <= error < lost[1]
            assert form.error == pytest.approx(lost[0], abs=1e-6)
            apart = (delta - form.write.T @ form.read).norm() / delta.norm()
            assert float(apart) == pytest.approx(form.error, abs=1e-5)

    def test_a_rank_that_is_not_enough_is_none_and_alone_is_the_nearest(self) -> None:
        delta = random_vectors(30, 40)
        assert as_low_rank(delta, rank=5, error=0.1) is None
        form = as_low_rank(delta, rank=5)
        assert form is not None
        assert form.rank == 5
        sizes = torch.linalg.svdvals(delta)
        assert form.error == pytest.approx(float(sizes[5:].norm() / sizes.norm()), abs=1e-5)

    def test_no_rank_above_that_of_the_matrix_or_of_an_edit(self) -> None:
        exact = random_vectors(64, 3) @ random_vectors(3, 32)
        form = as_low_rank(exact, rank=20)
        assert form is not None
        assert (form.rank, form.error < 1e-6) == (3, True)
        nothing = as_low_rank(torch.zeros(4, 5), error=0.1)
        assert nothing is not None
        assert (nothing.rank, nothing.error, float(nothing.write.T.matmul(nothing.read).abs().sum())) == (1, 0, 0)
        assert as_low_rank(torch.eye(MAX_RANK + 8), error=0.01) is None


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModelRef:
    return identify(tiny_model)


def delta_at(base: BaseModelRef, point: str, reads: str, seed: int, layer: int = 1) -> Pairs:
    shape = base.widths.of(point), base.widths.of(reads)
    edit = WeightDelta(site=f"layers.{layer}.{point}", reads=f"layers.{layer}.{reads}")
    return [(edit, {"delta": np.random.default_rng(seed).normal(size=shape) * 0.05})]


def low_rank_at(base: BaseModelRef, point: str, reads: str, seed: int, layer: int = 1) -> Pairs:
    edit = LowRank(site=f"layers.{layer}.{point}", reads=f"layers.{layer}.{reads}", rank=2)
    random = np.random.default_rng(seed)
    return [(edit, {name: random.normal(size=shape) * 0.2 for name, shape in edit.shapes(base.widths).items()})]


def sparse_at(base: BaseModelRef, seed: int, count: int) -> Pairs:
    edit = WeightDelta(site="layers.1.mlp.out", reads="layers.1.mlp.h", layout="sparse", count=count)
    return [(edit, edit.sample(np.random.default_rng(seed), base.widths, 0.05))]


Rows = Callable[..., Path]


@pytest.fixture
def rows(base: BaseModelRef, tmp_path: Path) -> Rows:
    """Saves bundles of these edits in folders, and gives the file that lists them."""

    def to(*pairs: Pairs, **columns: Any) -> Path:
        folders = [tmp_path / f"bundle-{number}" for number in range(len(pairs))]
        for number, (folder, of) in enumerate(zip(folders, pairs, strict=True)):
            bundle_of(f"bundle-{number}", base, of).save(folder)
        path = tmp_path / "bundles.jsonl"
        path.write_text("".join(json.dumps({"bundle": str(folder), **columns}) + "\n" for folder in folders))
        return path

    return to


class TestBuild:
    def test_the_change_of_the_weights_is_the_merged_vector(
        self, base: BaseModelRef, tiny_model: Path, rows: Rows
    ) -> None:
        """Dense, sparse, low-rank edits and several of one matrix; a matrix that a bundle leaves alone is zeros."""
        one = delta_at(base, "mlp.out", "mlp.h", 1) + low_rank_at(base, "attn.out", "attn.z", 2, layer=0)
        two = sparse_at(base, 3, 9000) + low_rank_at(base, "mlp.out", "mlp.h", 4)
        built = pcb_merge.build(tiny_model, rows(one, two, weight=1.1), ratio=0.2)
        down, out = (base.widths.hidden, base.widths.mlp), (base.widths.hidden, base.widths.of("attn.z"))
        sparse = np.zeros(down)
        sparse[two[0][1]["rows"], two[0][1]["columns"]] = two[0][1]["values"]
        products = [fields["write"].T @ fields["read"] for _, fields in (one[1], two[1])]
        flat = [
            np.concatenate([products[0].ravel(), one[0][1]["delta"].ravel()]),
            np.concatenate([np.zeros(out).ravel(), (sparse + products[1]).ravel()]),
        ]
        vectors = torch.tensor(np.array(flat), dtype=torch.float32)
        expected = merge(lambda: vectors, [1.1, 1.1], ratio=0.2).numpy()
        found = {edit.site: fields["delta"] for edit, fields in pairs_of(built.bundle)}
        assert list(found) == ["layers.0.attn.out", "layers.1.mlp.out"]
        np.testing.assert_allclose(np.concatenate([each.ravel() for each in found.values()]), expected, **CLOSE)
        assert 0.1 < np.count_nonzero(expected) / len(expected) < 0.4, "positive control"
        listed = json.loads(built.notes[MERGED_FILE])
        assert [row["version"] for row in listed] == [Bundle.load(Path(row["bundle"])).version for row in listed]

    def test_low_rank_is_the_same_within_its_error(self, base: BaseModelRef, tiny_model: Path, rows: Rows) -> None:
        """The matrices, and what the model does with them; with all of the rank it is the same."""
        file = rows(*(delta_at(base, "mlp.out", "mlp.h", seed) for seed in (1, 2)))
        host, prompt = Host.load(tiny_model), ["The river is long."]
        plain = host.next_token(prompt)

        def answers(built: Any) -> Tensor:
            with edited(host.model, pairs_of(built.bundle)):
                return host.next_token(prompt)

        made, apart = pcb_merge.build(tiny_model, file, ratio=0.5), []
        ((_, dense),), whole = pairs_of(made.bundle), answers(made)
        for error in (0.5, 1e-5):
            built = pcb_merge.build(tiny_model, file, ratio=0.5, error=error)
            ((edit, fields),) = pairs_of(built.bundle)
            assert isinstance(edit, LowRank)
            lost = np.linalg.norm(dense["delta"] - fields["write"].T @ fields["read"]) / np.linalg.norm(dense["delta"])
            assert lost <= error
            (told,) = built.bundle.manifest.measurements
            assert (told.edited, told.n) == (pytest.approx(lost, abs=1e-6), 1)
            apart.append(float((answers(built) - whole).abs().max()))
        assert apart[1] < 1e-3 < 0.1 * apart[0]
        assert float((plain - whole).abs().max()) > apart[0]

    def test_more_than_the_error_is_refused_with_what_the_rank_loses(
        self, base: BaseModelRef, tiny_model: Path, rows: Rows
    ) -> None:
        file = rows(*(delta_at(base, "mlp.out", "mlp.h", seed) for seed in (1, 2)))
        with pytest.raises(BundleRefused, match=r"layers\.1\.mlp\.out: .*at most 10\.0%, found that rank 4 loses \d"):
            pcb_merge.build(tiny_model, file, rank=4, error=0.1)
        ((edit, _),) = pairs_of(pcb_merge.build(tiny_model, file, rank=4).bundle)
        assert edit.capacity == 4

    def test_a_recipe_notices_another_bundle_in_the_folder(
        self, base: BaseModelRef, tiny_model: Path, rows: Rows, tmp_path: Path
    ) -> None:
        """The rows have the versions, so the file is the same and its rows are others."""
        pairs = [delta_at(base, "mlp.out", "mlp.h", seed) for seed in (1, 2, 3)]
        built = pcb_merge.build(tiny_model, rows(*pairs[:2]))
        built.save(tmp_path / "out")
        recipe = Recipe.load(tmp_path / "out" / RECIPE_FILE)
        assert again(recipe, PcbMerge).make().bundle == built.bundle
        bundle_of("bundle-1", base, pairs[2]).save(tmp_path / "bundle-1")
        with pytest.raises(EditsError, match=r"bundles\.jsonl has other rows"):
            again(recipe, PcbMerge)

    def test_a_bundle_that_changes_meanwhile_is_refused(
        self, base: BaseModelRef, tiny_model: Path, rows: Rows, tmp_path: Path
    ) -> None:
        pairs = [delta_at(base, "mlp.out", "mlp.h", seed) for seed in (1, 2, 3)]
        draft = prepare(Ask(PcbMerge(), tiny_model, (rows(*pairs[:2]),)))
        bundle_of("bundle-1", base, pairs[2]).save(tmp_path / "bundle-1")
        with pytest.raises(BundleRefused, match=r"bundle-1 was version .* when the build began"):
            draft.make()

    def test_the_version_of_a_row_must_be_that_of_the_folder(
        self, base: BaseModelRef, tiny_model: Path, rows: Rows, tmp_path: Path
    ) -> None:
        pairs = [delta_at(base, "mlp.out", "mlp.h", seed) for seed in (1, 2)]
        file = rows(*pairs)
        version = Bundle.load(tmp_path / "bundle-0").version

        def asked(*first: Any) -> Any:
            other = {"bundle": str(tmp_path / "bundle-1")}
            lines = [{"bundle": str(tmp_path / "bundle-0"), "version": each} for each in first] + [other]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            return prepare(Ask(PcbMerge(), tiny_model, (file,)))

        digests = {asked(each).inputs.data.digests()["bundles"] for each in (version, version[:6], "")}
        assert len(digests) == 1
        for wrong in ("0" * 64, version[:5], version.upper(), 7):
            with pytest.raises(BundleRefused, match=f"line 1: .*expected version {wrong} in .*, found {version}"):
                asked(wrong)
        file.write_text(json.dumps({"bundle": str(tmp_path / "none")}) + "\n")
        with pytest.raises(BundleRefused, match=r"expected the folder of a bundle, found no .*none"):
            prepare(Ask(PcbMerge(), tiny_model, (file,)))

    def test_edits_are_counted_together(self, base: BaseModelRef, tiny_model: Path, rows: Rows, tmp_path: Path) -> None:
        file = rows(*(delta_at(base, "mlp.out", "mlp.h", seed) for seed in (1, 2)))
        for number in range(2):
            made = Bundle.load(tmp_path / f"bundle-{number}")
            manifest = made.manifest.model_copy(update={"cumulative_edits": 3 + number})
            replace(made, manifest=manifest).save(tmp_path / f"bundle-{number}")
        assert pcb_merge.build(tiny_model, file).bundle.manifest.cumulative_edits == 7

    def test_a_bundle_that_takes_safety_away_marks_the_merged_one(
        self, base: BaseModelRef, tiny_model: Path, rows: Rows, tmp_path: Path
    ) -> None:
        file = rows(*(delta_at(base, "mlp.out", "mlp.h", seed) for seed in range(2)))
        assert not prepare(Ask(PcbMerge(), tiny_model, (file,))).make().bundle.manifest.privileged
        made = Bundle.load(tmp_path / "bundle-1")
        replace(made, manifest=made.manifest.model_copy(update={"privileged": True})).save(tmp_path / "bundle-1")
        with pytest.raises(BundleRefused, match="Say that this is meant"):
            prepare(Ask(PcbMerge(), tiny_model, (file,)))
        assert prepare(Ask(PcbMerge(), tiny_model, (file,), privileged=True)).make().bundle.manifest.privileged


class TestRefused:
    """All reasons at once, by bundle and edit, before the model is loaded."""

    @pytest.fixture(autouse=True)
    def _no_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Host, "load", None)

    def test_edits_that_are_no_update_of_one_weight(self, base: BaseModelRef, tiny_model: Path, rows: Rows) -> None:
        gate = Gate(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=1)
        scoped = low_rank_at(base, "mlp.out", "mlp.h", 1)
        scoped[0] = scoped[0][0].model_copy(update={"scope": Scope(segment="prompt"), "part": 2}), scoped[0][1]
        past_two = low_rank_at(base, "mlp.out", "mlp.in", 2)
        past_two[0] = past_two[0][0].model_copy(update={"part": 3}), past_two[0][1]
        wrong: Pairs = [
            (gate, {name: np.ones(shape) for name, shape in gate.shapes(base.widths).items()}),
            (Scale(site="layers.1.q.out"), {"factor": np.zeros(base.widths.heads)}),
            (Offset(site="layers.1.resid"), {"vector": np.ones(base.widths.hidden)}),
            *scoped, *past_two,
        ]  # fmt: skip
        good = delta_at(base, "mlp.out", "mlp.h", 3)
        with pytest.raises(BundleRefused) as caught:
            prepare(Ask(PcbMerge(), tiny_model, (rows(good, good + wrong, wrong[:1]),)))
        told = [reason.message for reason in caught.value.reasons]
        assert {reason.code for reason in caught.value.reasons} == {"no_update"}
        assert len(told) == 6
        assert not any("bundle-0" in each for each in told)
        for words in (
            "bundle-1: gate at layers.1.mlp.out is", "bundle-1: scale at layers.1.q.out", "offset at layers.1.resid",
            "layers.1.mlp.out.2 is no update of one weight: it has a scope", "more than one weight lies between",
            "bundle-2: gate",
        ):  # fmt: skip
            assert any(words in each for each in told), words

    def test_every_projection_of_an_architecture_has_updates(self, base: BaseModelRef) -> None:
        for name in ("LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "Qwen3MoeForCausalLM"):
            architecture = supported(name)
            for point, reads in architecture.projections().items():
                edit = LowRank(site=f"layers.0.{point}", reads=f"layers.0.{reads}", rank=1)
                assert no_update(edit, architecture) is None, (name, point)
        experts = LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.in", rank=1)
        assert "no projection gives that vector" in (no_update(experts, supported("Qwen3MoeForCausalLM")) or "")

    def test_other_models_and_broken_bundles(
        self, base: BaseModelRef, tiny_model: Path, rows: Rows, tmp_path: Path
    ) -> None:
        pairs = [delta_at(base, "mlp.out", "mlp.h", seed) for seed in range(3)]
        file = rows(*pairs)
        foreign = base.model_copy(update={"files": {"model.safetensors": "0" * 64}})
        bundle_of("bundle-0", foreign, pairs[0]).save(tmp_path / "bundle-0")
        tensors = tmp_path / "bundle-2" / "edits.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-4])
        with pytest.raises(BundleRefused) as caught:
            prepare(Ask(PcbMerge(), tiny_model, (file,)))
        told = {reason.code: reason.message for reason in caught.value.reasons}
        assert set(told) == {"base_model", "digest", "tensor_file"}
        assert [message.split(":")[0].rpartition("-")[2] for message in told.values()] == ["0", "2", "2"]

    def test_too_little_to_merge_and_too_much_for_a_bundle(
        self, base: BaseModelRef, tiny_model: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, few = delta_at(base, "mlp.out", "mlp.h", 1), sparse_at(base, 2, 4)
        with pytest.raises(BundleRefused, match=r"bundle-1 changes 4 of the 32768 numbers .*largest 4 .*\[too_few"):
            prepare(Ask(PcbMerge(), tiny_model, (rows(whole, few),)))
        prepare(Ask(PcbMerge(tail=0.0), tiny_model, (rows(whole, few),)))
        with pytest.raises(BundleRefused, match=r"Raise ratio \[ratio\]"):
            prepare(Ask(PcbMerge(ratio=2e-5), tiny_model, (rows(whole, whole + few[:0]),)))
        monkeypatch.setattr(pcb_merge, "MAX_TENSOR_FILE_BYTES", 1 << 16)
        monkeypatch.setattr(pcb_merge, "MAX_HEADER_BYTES", 1 << 10)
        two = delta_at(base, "mlp.out", "mlp.h", 2)
        with pytest.raises(BundleRefused, match=r"1 whole matrices are 131072 bytes.*Give --rank or --error"):
            prepare(Ask(PcbMerge(), tiny_model, (rows(whole, two),)))
        prepare(Ask(PcbMerge(rank=4), tiny_model, (rows(whole, two),)))


def test_bundles_that_cancel_each_other_leave_nothing(base: BaseModelRef, tiny_model: Path, rows: Rows) -> None:
    one = delta_at(base, "mlp.out", "mlp.h", 1)
    opposite: Pairs = [(one[0][0], {"delta": -one[0][1]["delta"]})]
    with pytest.raises(BundleRefused, match="they cancel each other"):
        pcb_merge.build(tiny_model, rows(one, opposite))


def test_task_vectors_split_into_the_matrices_they_came_from(base: BaseModelRef) -> None:
    pairs = delta_at(base, "q.out", "attn.in", 1, layer=2) + delta_at(base, "mlp.out", "mlp.h", 2, layer=0)
    tasks = TaskVectors.of([bundle_of("one", base, pairs), bundle_of("two", base, pairs[:1])])
    one, two = tasks.vectors()
    assert len(one) == len(two) == tasks.numbers
    found = {str(site): matrix for site, matrix in tasks.split(one)}
    for edit, fields in pairs:
        np.testing.assert_allclose(found[edit.site], fields["delta"], rtol=1e-6)
    assert [bool(matrix.any()) for _, matrix in tasks.split(two)] == [False, True]
