"""What a bundle is, and every way in which one is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_edits.edit_store import (
    BaseModelRef,
    Bundle,
    Gate,
    LowRank,
    Manifest,
    Offset,
    Provenance,
    Scale,
    SubspaceFilter,
    WeightDelta,
    Widths,
    check,
)
from vllm_edits.edit_store.canonical import canonical_json, sha256
from vllm_edits.edit_store.errors import BundleRefused
from vllm_edits.edit_store.verify import edit_rules

WIDTHS = Widths(layers=4, hidden=8, mlp=16, heads=2, kv_heads=2, head_dim=4, vocab=32)
BASE = BaseModelRef(name="tiny", architecture="LlamaForCausalLM", widths=WIDTHS, files={"model.safetensors": "a" * 64})
PROVENANCE = Provenance(tool="tests", method="random")


def arrays(edit: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Random numbers of the shapes an edit asks for, with an orthonormal basis where one is due."""
    generator = np.random.default_rng(seed)
    fields = {name: generator.normal(size=shape) for name, shape in edit.shapes(WIDTHS).items()}
    if "basis" in fields:
        fields["basis"] = np.linalg.qr(fields["basis"].T)[0].T
    if "dual" in fields:
        fields["dual"] = fields["basis"]
    if "rows" in fields:
        fields |= {"rows": [0, 1, 2], "columns": [3, 0, 2]}
    return fields


def edits_of_every_kind() -> list[Any]:
    return [
        LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=2),
        Scale(site="layers.2.attn.z"),
        SubspaceFilter(site="layers.3.resid", rank=2),
        SubspaceFilter(site="layers.3.resid", rank=1, oblique=True, part=2),
        SubspaceFilter(site="final", rank=3, onto=True),
        Offset(site="layers.3.resid"),
        Offset(site="layers.3.resid", renorm=True, part=2),
        JET_PACK,
        SPARSE,
        WeightDelta(site="layers.1.q.out", reads="layers.1.attn.in"),
    ]


def bundle_of(edits: list[Any], changes: dict[str, Any] | None = None, **tensors: Any) -> Bundle:
    pairs = [(edit, {**arrays(edit), **tensors}) for edit in edits]
    made = Bundle.create("polite", BASE, pairs, PROVENANCE)
    return made if changes is None else Bundle(made.manifest.model_copy(update=changes), made.tensor_bytes)


JET_PACK = Gate(site="layers.0.mlp.out", reads="layers.0.mlp.in", rank=1, normalise=True)
SPARSE = WeightDelta(site="layers.0.mlp.out", reads="layers.0.mlp.h", layout="sparse", count=3)


def codes(refusal: pytest.ExceptionInfo[BundleRefused]) -> set[str]:
    return {reason.code for reason in refusal.value.reasons}


def test_a_bundle_of_every_kind_is_accepted_and_survives_a_round_trip(tmp_path: Any) -> None:
    """Positive control of this file: a good bundle is not refused, on disk or off."""
    made = bundle_of(edits_of_every_kind())
    assert set(check(made, BASE)) == {
        edit.tensor_name(field) for edit in made.manifest.edits for field in edit.shapes(WIDTHS)
    }
    made.save(tmp_path)
    assert Bundle.load(tmp_path) == made
    assert Bundle.load(tmp_path).version == made.version


def test_the_version_changes_with_any_number_and_any_field() -> None:
    """Identity is content: one different number or word is another version."""
    made = bundle_of([Offset(site="layers.0.resid")])
    nudged = bundle_of([Offset(site="layers.0.resid")], vector=arrays(Offset(site="layers.0.resid"))["vector"] + 1e-3)
    renamed = Bundle(made.manifest.model_copy(update={"label": "2"}), made.tensor_bytes)
    assert len({made.version, nudged.version, renamed.version}) == 3


@pytest.mark.long
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(1 - 2**53, 2**53 - 1) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_canonical_json_has_one_spelling_per_value(value: Any) -> None:
    """Parsing canonical bytes and writing them again gives the same bytes, so a digest names a value."""
    data = canonical_json(value)
    assert canonical_json(json.loads(data)) == data
    assert json.loads(data) == value


def test_a_manifest_with_other_spacing_is_refused() -> None:
    data = json.dumps(json.loads(bundle_of(edits_of_every_kind()).manifest.to_bytes()), indent=1).encode()
    with pytest.raises(BundleRefused, match="RFC 8785"):
        Manifest.from_bytes(data)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"surprise": 1}, "unknown_field"),
        ({"edits": [{"kind": "magic", "site": "layers.0.resid"}]}, "unknown_kind"),
        ({"edits": [{"kind": "offset", "site": "layers.0.nose"}]}, "unknown_site"),
        ({"edits": []}, "manifest"),
        ({"schema_version": 2}, "manifest"),
        ({"name": "../../etc"}, "manifest"),
    ],
)
def test_a_manifest_that_breaks_the_schema_is_refused(change: dict[str, Any], code: str) -> None:
    fields = {**json.loads(bundle_of(edits_of_every_kind()).manifest.to_bytes()), **change}
    with pytest.raises(BundleRefused) as refusal:
        Manifest.from_bytes(canonical_json(fields))
    assert code in codes(refusal)


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null"])
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(BundleRefused):
        Manifest.from_bytes(data)


@pytest.mark.parametrize(
    ("edits", "code"),
    [
        ([Offset(site="layers.0.resid"), Offset(site="layers.0.resid")], "duplicate_site"),
        ([Scale(site="layers.0.resid")], "site"),
        ([Scale(site="layers.0.mlp.out", per="head")], "site"),
        ([SubspaceFilter(site="logits", rank=1)], "site"),
        ([Gate(site="layers.0.mlp.out", reads="layers.0.attn.z", rank=1)], "site"),
        ([WeightDelta(site="layers.0.resid", reads="layers.0.resid")], "site"),
        ([WeightDelta(site="layers.0.mlp.out", reads="layers.0.mlp.h", layout="sparse")], "site"),
        ([Offset(site="layers.0.attn.post")], "site"),
        ([Offset(site="layers.0.q.proj")], "site"),
        ([LowRank(site="layers.0.mlp.out", reads="layers.1.mlp.h", rank=1)], "site"),
        ([Scale(site="layers.4.attn.z")], "site"),
    ],
)
def test_an_edit_where_it_has_no_meaning_is_refused(edits: list[Any], code: str) -> None:
    with pytest.raises(BundleRefused) as refusal:
        check(bundle_of(edits))
    assert code in codes(refusal)


@pytest.mark.parametrize(
    ("edit", "tensors", "code"),
    [
        (Offset(site="layers.0.resid"), {"vector": np.ones(9)}, "shape"),
        (Offset(site="layers.0.resid"), {"vector": np.full(8, np.nan)}, "not_finite"),
        (Offset(site="layers.0.resid"), {"vector": np.full(8, np.inf)}, "not_finite"),
        (Offset(site="layers.0.resid"), {"extra": np.ones(8)}, "unknown_tensor"),
        (SubspaceFilter(site="layers.0.resid", rank=1), {"basis": np.full((1, 8), 0.5)}, "not_orthonormal"),
        (SubspaceFilter(site="layers.0.resid", rank=1), {"basis": np.full((1, 8), 3e38)}, "not_orthonormal"),
        (SubspaceFilter(site="layers.0.resid", rank=2), {"basis": np.eye(8)[:1]}, "shape"),
        (SubspaceFilter(site="layers.0.resid", rank=1, oblique=True), {"dual": np.ones((1, 8))}, "not_dual"),
        (JET_PACK, {"norm_weight": np.zeros(8)}, "norm_weight"),
        (SPARSE, {"rows": [0, 1, 8]}, "index"),
        (SPARSE, {"columns": [0, 1, -1]}, "index"),
        (SPARSE, {"rows": [1, 0, 2]}, "index"),
        (SPARSE, {"rows": [0, 0, 0], "columns": [1, 1, 2]}, "index"),
    ],
)
def test_numbers_that_break_a_rule_are_refused(edit: Any, tensors: dict[str, Any], code: str) -> None:
    with pytest.raises(BundleRefused) as refusal:
        check(bundle_of([edit], **tensors))
    assert code in codes(refusal)


def test_a_bias_is_not_scaled_unless_that_is_said() -> None:
    """The alternative that keeps the bias is named; with neither nothing is published."""
    biased = BASE.model_copy(update={"biased": ("q.out",)})
    told = {bias: edit_rules([Scale(site="layers.0.q.out", bias=bias)], biased) for bias in (None, "scaled")}
    assert [reason.code for reason in told[None]] == ["bias"]
    assert "add an offset of (1 - factor) * bias" in told[None][0].message
    assert told["scaled"] == edit_rules([Scale(site="layers.0.v.out")], biased) == []


def test_heads_of_queries_given_for_keys_are_refused_by_name() -> None:
    """Indexing keys by query heads would silently do nothing, or scale a whole group (Ships, weight mode)."""
    grouped = BASE.model_copy(update={"widths": WIDTHS.model_copy(update={"kv_heads": 1})})
    made = Bundle.create("polite", grouped, [(Scale(site="layers.0.k.out"), {"factor": np.ones(2)})], PROVENANCE)
    with pytest.raises(BundleRefused, match="Keys and values have 1 heads here, not the 2 of the queries"):
        check(made)


@pytest.mark.parametrize(
    ("architecture", "edit", "told"),
    [
        ("Qwen3ForCausalLM", LowRank(site="layers.0.q.out", reads="layers.0.attn.in", rank=1), "layers.0.q.proj"),
        ("Qwen3ForCausalLM", Scale(site="layers.0.k.proj"), "Scale layers.0.k.out"),
        ("Qwen3MoeForCausalLM", LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=1), "inside the experts"),
        ("GPT2LMHeadModel", Offset(site="layers.0.gate.out"), "nearest point is up.out"),
        ("LlamaForCausalLM", Offset(site="layers.0.mlp.post"), "this is mlp.out"),
        ("LamaForCausalLM", Offset(site="layers.0.resid"), "Did you mean 'LlamaForCausalLM'"),
    ],
)
def test_what_an_architecture_hides_is_refused_with_the_nearest_that_exists(
    architecture: str, edit: Any, told: str
) -> None:
    (reason,) = edit_rules([edit], BASE.model_copy(update={"architecture": architecture}))
    assert told in reason.message
    assert (
        edit_rules([Offset(site="layers.0.attn.out")], BASE.model_copy(update={"architecture": "Qwen3ForCausalLM"}))
        == []
    )


def test_two_names_of_one_place_are_one_site() -> None:
    assert Offset(site="layers.3.resid.in").site == "layers.2.resid"
    assert Offset(site="layers.3.resid.out").site == "layers.3.resid"
    assert Offset(site="layers.0.resid.in").site == "embed.out"


def test_a_missing_tensor_is_refused() -> None:
    edit = LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=1)
    made = Bundle.create("polite", BASE, [(edit, {"read": np.ones((1, 16))})], PROVENANCE)
    with pytest.raises(BundleRefused) as refusal:
        check(made)
    assert codes(refusal) == {"missing_tensor"}


def test_another_base_model_is_refused_and_named() -> None:
    other = BASE.model_copy(update={"name": "other", "files": {"model.safetensors": "b" * 64}})
    with pytest.raises(BundleRefused, match=r"built for tiny but this is other") as refusal:
        check(bundle_of(edits_of_every_kind()), other)
    assert codes(refusal) == {"base_model"}


def test_all_reasons_come_at_once() -> None:
    """An author mends everything in one go."""
    edits = [Offset(site="layers.9.resid"), Scale(site="layers.0.resid")]
    with pytest.raises(BundleRefused) as refusal:
        check(bundle_of(edits), BASE.model_copy(update={"files": {"x": "c" * 64}}))
    assert len(refusal.value.reasons) >= 3


@given(st.data())
def test_no_mutation_of_the_tensor_file_is_accepted(data: st.DataObject) -> None:
    """Flipped, cut or grown, the bytes are refused: by digest always, and without crashing by structure alone."""
    good = bundle_of(edits_of_every_kind())
    raw = bytearray(good.tensor_bytes)
    how = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    if how == "flip":
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw += data.draw(st.binary(min_size=1, max_size=64))
    with pytest.raises(BundleRefused) as refusal:
        check(Bundle(good.manifest, bytes(raw)))
    assert "digest" in codes(refusal)
    blob = good.manifest.tensors.model_copy(update={"sha256": sha256(bytes(raw)), "size": max(1, len(raw))})
    believed = Bundle(good.manifest.model_copy(update={"tensors": blob}), bytes(raw))
    try:
        check(believed)
    except BundleRefused:
        return
    assert how == "flip"  # a flipped bit inside a number may be a good number


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "code": "x"}},
        {"a": []},
        [],
    ],
)
def test_hostile_tensor_headers_are_refused(header: Any) -> None:
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + bytes(8)
    good = bundle_of(edits_of_every_kind())
    blob = good.manifest.tensors.model_copy(update={"sha256": sha256(raw), "size": len(raw)})
    with pytest.raises(BundleRefused) as refusal:
        check(Bundle(good.manifest.model_copy(update={"tensors": blob}), raw))
    assert codes(refusal) & {"tensor_file", "dtype"}


def test_an_enormous_header_is_refused_without_being_read() -> None:
    raw = (2**62).to_bytes(8, "little") + b"{}"
    good = bundle_of(edits_of_every_kind())
    with pytest.raises(BundleRefused) as refusal:
        check(Bundle(good.manifest, raw))
    assert "too_large" in codes(refusal)
