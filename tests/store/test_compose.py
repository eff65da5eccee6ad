"""Several bundles as one variant: what it computes and is called, and what is said where edits do not simply add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.proofs.parity import random_numbers
from tests.support.bundles import bundle_of
from tests.support.edited_models import SLOTS, claim_on, install, reservation_of, run
from tests.support.fakes import (
    BASE,
    WIDTHS,
    RequestStep,
    TinyModel,
    edited_model,
    edits_by_formula,
    set_step,
    tiny_by_formula,
)
from vllm_edits.edit_store import (
    Bundle,
    EditStore,
    Gate,
    LowRank,
    Offset,
    Scale,
    Scope,
    Strength,
    SubspaceFilter,
    WeightDelta,
    check,
)
from vllm_edits.edit_store.cli import app
from vllm_edits.edit_store.compose import compose, conflicts
from vllm_edits.edit_store.errors import BundleRefused

RESID, OUT = "layers.1.resid", "layers.1.mlp.out"
AXES = np.eye(8, dtype=np.float32)


def made(name: str, *edits: Any, **numbers: Any) -> Bundle:
    pairs = [(edit, {**random_numbers(edit, BASE, seed), **numbers}) for seed, edit in enumerate(edits)]
    return bundle_of(name, BASE, pairs)


POLITE = made(
    "polite", Offset(site=RESID), LowRank(site=OUT, reads="layers.1.mlp.h", rank=2), Scale(site="layers.0.attn.z")
)
SAFE = made("safe", Offset(site=RESID), Gate(site=OUT, reads="layers.1.mlp.in", rank=1), Offset(site="layers.2.resid"))


def test_a_composition_has_the_edits_of_all_and_a_digest_of_its_own() -> None:
    both = compose([POLITE, SAFE])
    assert both.manifest.name == "polite+safe"
    assert [part.version for part in both.manifest.parts] == [POLITE.version, SAFE.version]
    assert [(edit.site, edit.kind, edit.part) for edit in both.manifest.edits if edit.site == RESID] == [
        (RESID, "offset", 1), (RESID, "offset", 2)
    ]  # fmt: skip
    assert check(both).keys() == {name for edit in both.manifest.edits for name in map(edit.tensor_name,
                                                                                     edit.shapes(WIDTHS))}  # fmt: skip
    assert compose([POLITE, SAFE]).version == both.version != compose([SAFE, POLITE]).version
    assert conflicts(both) == [], "what is added is added"


def test_a_composition_computes_both_in_a_slot_like_any_other() -> None:
    """Beside its parts alone and the base, in one batch."""
    both, model, plain = compose([POLITE, SAFE]), TinyModel(), TinyModel()
    edited = edited_model(model, reservation_of(both, POLITE, SAFE), slots=SLOTS)
    for slot, bundle in enumerate((both, POLITE, SAFE), 1):
        install(edited, slot, bundle)
    torch.manual_seed(0)
    x = torch.randn(4, WIDTHS.hidden)
    set_step(edited, [RequestStep(claim_on(edited, slot), 1) for slot in (0, 1, 2, 3)])
    served = run(model, edited, x).numpy()
    for row, bundles in enumerate(((), (POLITE, SAFE), (POLITE,), (SAFE,))):
        pairs = []
        for bundle in bundles:
            tensors = check(bundle)
            pairs += [(edit, edit.numbers(tensors, WIDTHS)) for edit in bundle.manifest.edits]
        truth = tiny_by_formula(plain, x, edits_by_formula(pairs))
        np.testing.assert_allclose(served[row], truth[row], rtol=1e-4, atol=1e-4)


def test_bundles_for_other_models_and_compositions_are_not_composed() -> None:
    other = BASE.model_copy(update={"name": "other", "files": {"model.safetensors": "b" * 64}})
    edit = Offset(site=RESID)
    foreign = bundle_of("foreign", other, [(edit, random_numbers(edit, other, 1))])
    refused = {
        "built for other": [POLITE, foreign],
        "two bundles or more": [POLITE],
        "none of them composed itself": [compose([POLITE, SAFE]), made("third", edit)],
    }
    for told, bundles in refused.items():
        with pytest.raises(BundleRefused, match=told):
            compose(bundles)


def test_a_strength_is_kept_if_every_part_takes_one() -> None:
    def bounded(bundle: Bundle, low: float, high: float) -> Bundle:
        strength = Strength(minimum=low, maximum=high, default=low)
        return Bundle(bundle.manifest.model_copy(update={"strength": strength}), bundle.tensor_bytes)

    assert compose([POLITE, bounded(SAFE, 0, 1)]).manifest.strength is None
    refused = {
        "polite takes none, so it is served at 1; safe takes": [POLITE, bounded(SAFE, 2, 3)],
        "polite takes 0 to 0.5, by default 0; safe": [bounded(POLITE, 0, 0.5), bounded(SAFE, 1, 2)],
    }
    for told, bundles in refused.items():
        with pytest.raises(BundleRefused, match=told):
            compose(bundles)
    both = compose([bounded(POLITE, -1, 0.5), bounded(SAFE, 0, 2)]).manifest.strength
    assert both == Strength(minimum=0, maximum=0.5, default=0.5)


def test_a_composition_is_named_after_its_parts() -> None:
    both = compose([POLITE, SAFE])
    for change in ({"name": "polite"}, {"name": "safe+polite"}, {"parts": ()}, {"parts": both.manifest.parts[:1]}):
        with pytest.raises(BundleRefused, match="composition"):
            check(Bundle(both.manifest.model_copy(update=change), both.tensor_bytes))


@pytest.mark.parametrize(
    ("one", "two", "told"),
    [
        (made("a", SubspaceFilter(site=RESID, rank=1), basis=AXES[:1]), made("b", Offset(site=RESID), vector=AXES[0]),
         "puts 100% of itself where the filter took"),
        (made("a", SubspaceFilter(site=RESID, rank=1), basis=AXES[:1]),
         made("b", Offset(site=RESID), vector=AXES[1]), None),
        (made("a", SubspaceFilter(site=RESID, rank=2), basis=AXES[:2]),
         made("b", SubspaceFilter(site=RESID, rank=1), basis=(AXES[:1] + AXES[2:3]) / 2**0.5), "cosine up to 0.71"),
        (made("a", SubspaceFilter(site=RESID, rank=2), basis=AXES[:2]),
         made("b", SubspaceFilter(site=RESID, rank=1), basis=AXES[2:3]), None),
        (made("a", LowRank(site=RESID, reads=RESID, rank=1), write=AXES[:1]),
         made("b", SubspaceFilter(site=RESID, rank=1), basis=AXES[:1]), "takes away 100% of what it adds"),
        (made("a", Scale(site=OUT, per="channel"), factor=np.r_[0.0, np.ones(7)]),
         made("b", LowRank(site=OUT, reads="layers.1.mlp.h", rank=1), write=AXES[:1]), "is not scaled"),
        (made("a", Scale(site=OUT, per="channel")), made("b", WeightDelta(site=OUT, reads="layers.1.mlp.h")),
         "what it adds is scaled or filtered too"),
        (made("a", Offset(site=RESID)), made("b", Offset(site=RESID, renorm=True)), "restored after both"),
        (made("a", Offset(site=RESID)), made("b", SubspaceFilter(site="layers.2.resid", rank=1)), None),
    ],
)  # fmt: skip
def test_edits_that_do_not_simply_add_up_are_told_with_what_comes_of_it(
    one: Bundle, two: Bundle, told: str | None
) -> None:
    """In either order."""
    for bundles in ([one, two], [two, one]):
        found = conflicts(compose(bundles))
        assert [told in conflict.effect for conflict in found] == ([True] if told else []), found


def test_composing_on_the_command_line(tmp_path: Path) -> None:
    """Conflicts are told and nothing is published; allowed, they are told again, and at every promotion."""
    store = EditStore(str(tmp_path / "store"), create=True)
    for bundle in (POLITE, SAFE, made("off", SubspaceFilter(site=RESID, rank=2), Offset(site="final"))):
        store.promote(f"{bundle.manifest.name}@{store.publish(bundle)}")

    def run_cli(*arguments: str) -> Any:
        return CliRunner().invoke(app, [*arguments, "--store", store.url])

    done = run_cli("compose", "polite", "safe", "--tag", "prod")
    assert done.exit_code == 0, done.output
    assert store.resolve("polite+safe") == compose([POLITE, SAFE]).version
    refused = run_cli("compose", "polite", "off")
    assert refused.exit_code == 1
    assert "where the filter took" in refused.stderr
    assert "polite+off" not in store.names()
    assert run_cli("compose", "polite", "off", "--allow-conflicts").exit_code == 0
    version = store.version_digests("polite+off")[0]
    assert "where the filter took" in run_cli("promote", f"polite+off@{version[:8]}").stderr


def test_scopes_of_parts_stay_their_own() -> None:
    late = made("late", Offset(site=RESID, scope=Scope(segment="generated")))
    both = compose([POLITE, late])
    assert [edit.scope.segment for edit in both.manifest.edits if edit.site == RESID] == ["all", "generated"]
