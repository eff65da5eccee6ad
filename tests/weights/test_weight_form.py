"""Edits as changes of weights, held against the same edits applied to vectors by their kinds' own formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.proofs.parity import random_numbers
from tests.support.fakes import BASE, WIDTHS, cheaply, edits_by_formula
from vllm_edits.edit_store import Gate, LowRank, Offset, Scale, Scope, SubspaceFilter, WeightDelta
from vllm_edits.edit_store.architectures import ARCHITECTURES, supported
from vllm_edits.edit_store.edits import Edit, order_at_site
from vllm_edits.plugin.weights.weight_form import formless, patched, touched

HERE = "layers.1."
LLAMA = supported("LlamaForCausalLM")
OUT, IN = HERE + "mlp.out", HERE + "mlp.h"
GIVEN: dict[str, Edit] = {
    "delta": WeightDelta(site=OUT, reads=IN),
    "sparse": WeightDelta(site=OUT, reads=IN, layout="sparse", count=3, part=2),
    "scale": Scale(site=OUT, per="channel"),
    "update": LowRank(site=OUT, reads=IN, rank=2),
    "in place": LowRank(site=OUT, reads=OUT, rank=2, part=2),
    "filter": SubspaceFilter(site=OUT, rank=2),
    "oblique": SubspaceFilter(site=OUT, rank=2, oblique=True, part=2),
    "onto": SubspaceFilter(site=OUT, rank=3, onto=True, part=3),
    "offset": Offset(site=OUT),
}
READ: dict[str, Edit] = {
    "scale": Scale(site=IN, per="channel"),
    "in place": LowRank(site=IN, reads=IN, rank=2),
    "filter": SubspaceFilter(site=IN, rank=2),
    "onto": SubspaceFilter(site=IN, rank=5, onto=True, part=2),
    "offset": Offset(site=IN),
}
Pairs = list[tuple[Edit, dict[str, Any]]]


def numbered(edits: list[Edit], seed: int) -> Pairs:
    pairs = []
    for edit in edits:
        fields: dict[str, Any] = random_numbers(edit, BASE, seed + edit.part)
        if isinstance(edit, WeightDelta) and edit.count is not None:
            fields |= {"rows": np.array([0, 2, 2]), "columns": np.array([5, 0, 7])}
        pairs.append((edit, fields))
    return pairs


def ordered(pairs: Pairs) -> Pairs:
    return sorted(pairs, key=lambda pair: order_at_site(pair[0]))


subsets = st.tuples(st.sets(st.sampled_from(sorted(GIVEN))), st.sets(st.sampled_from(sorted(READ))), st.integers(0, 99))


@cheaply
@given(subsets)
def test_a_patched_projection_does_what_the_edits_do_around_it(chosen: tuple[set[str], set[str], int]) -> None:
    """Any edits together, before and behind a projection with a bias, on random vectors, in float64."""
    after, before, seed = chosen
    given_, read = numbered([GIVEN[name] for name in after], seed), numbered([READ[name] for name in before], seed)
    random = np.random.default_rng(seed)
    weight, bias = random.normal(size=(WIDTHS.hidden, WIDTHS.mlp)), random.normal(size=WIDTHS.hidden)
    x = random.normal(size=(5, WIDTHS.mlp))
    at = edits_by_formula(given_ + read)
    expected = at(OUT, at(IN, x) @ weight.T + bias)
    new, new_bias = patched(torch.tensor(weight), torch.tensor(bias), ordered(given_), ordered(read))
    assert new.dtype == torch.float64
    np.testing.assert_allclose(x @ new.numpy().T + new_bias.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_strength_goes_from_the_base_to_the_whole_edit(name: str) -> None:
    """0 leaves weight and bias as they are, bit for bit, and half of it lies in the middle of what is linear in it."""
    weight, bias = torch.randn(WIDTHS.hidden, WIDTHS.mlp, dtype=torch.float64), torch.randn(WIDTHS.hidden).double()
    pairs = numbered([GIVEN[name]], 3)
    none, half, whole = (patched(weight, bias, pairs, [], strength) for strength in (0.0, 0.5, 1.0))
    assert torch.equal(none[0], weight)
    assert torch.equal(none[1], bias)
    for start, middle, end in zip((weight, bias), half, whole, strict=True):
        torch.testing.assert_close(middle, (start + end) / 2)
    assert any(not torch.equal(start, end) for start, end in zip((weight, bias), whole, strict=True))


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (Gate(site=OUT, reads=IN, rank=1), "depends on the token"),
        (LowRank(site=OUT, reads=IN, rank=1, scope=Scope(segment="generated")), "has a scope"),
        (Offset(site=OUT, renorm=True), "not linear"),
        (SubspaceFilter(site=HERE + "resid", rank=1), "give q.out, k.out, v.out, attn.out, gate.out, up.out, mlp.out"),
        (Offset(site="logits"), "no projection gives or reads"),
        (WeightDelta(site="logits", reads="final"), "the output head is often the embeddings too"),
        (LowRank(site=OUT, reads=HERE + "mlp.in", rank=1), "more than one weight lies between layers.1.mlp.in"),
        (LowRank(site=OUT, reads=IN, rank=1), None),
        (Scale(site=HERE + "attn.z"), None),
        (WeightDelta(site=OUT, reads=IN), None),
    ],
)
def test_what_has_no_weight_form_is_refused_with_what_to_do_instead(edit: Edit, why: str | None) -> None:
    reasons = formless([edit], LLAMA)
    assert [reason.code for reason in reasons] == ([] if why is None else ["weights_mode"])
    if why is not None:
        assert why in reasons[0].message
        assert "per request" in reasons[0].message


def test_an_edit_of_what_projections_read_changes_all_of_them() -> None:
    """Queries, keys and values; behind QK-norm it is the projection that counts; experts are none."""
    edit = Offset(site=HERE + "attn.in")
    assert [site.point for site in touched(edit, LLAMA)] == ["q.out", "k.out", "v.out"]
    assert [site.point for site in touched(edit, supported("Qwen3ForCausalLM"))] == ["q.proj", "k.proj", "v.out"]
    assert not touched(Offset(site=HERE + "mlp.in"), supported("Qwen3MoeForCausalLM"))
    assert [site.point for site in touched(Offset(site=HERE + "mlp.in"), supported("GPT2LMHeadModel"))] == ["up.out"]
    for architecture in ARCHITECTURES.values():
        assert all(architecture.hidden(point) is None for point in architecture.projections())
