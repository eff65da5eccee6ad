"""A small model with edits in its slots."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.proofs.parity import random_numbers
from tests.support.bundles import Pairs
from tests.support.fakes import (
    BASE,
    WIDTHS,
    TinyModel,
    edits_by_formula,
    tiny_by_formula,
)
from vllm_edits.edit_store import (
    Bundle,
    Gate,
    LowRank,
    Offset,
    Provenance,
    Scale,
    SubspaceFilter,
    check,
)
from vllm_edits.edit_store.edits import Array
from vllm_edits.plugin.graph.edited_model import EditedModel
from vllm_edits.plugin.graph.reservation import Reservation

SLOTS = 3


TOKENS = 12


def bundle_of(pairs: Pairs, name: str = "polite") -> Bundle:
    return Bundle.create(name, BASE, pairs, Provenance(tool="tests", method="random"))


def crowded(seed: int) -> Bundle:
    """Every kind at every layer, and several that meet at one site."""
    edits: list[Any] = []
    for layer in range(WIDTHS.layers):
        here = f"layers.{layer}."
        edits += [
            Scale(site=here + "attn.z"), Scale(site=here + "q.out", per="channel"),
            LowRank(site=here + "mlp.out", reads=here + "mlp.h", rank=2),
            LowRank(site=here + "mlp.out", reads=here + "mlp.h", rank=1, part=2),
            Gate(site=here + "mlp.out", reads=here + "mlp.in", rank=2),
            SubspaceFilter(site=here + "resid", rank=2), SubspaceFilter(site=here + "resid", rank=1, part=2),
            Offset(site=here + "resid"), Offset(site=here + "attn.out", renorm=True),
        ]  # fmt: skip
    return bundle_of([(edit, random_numbers(edit, BASE, seed * 100 + number)) for number, edit in enumerate(edits)])


def reservation_of(*bundles: Bundle) -> Reservation:
    return Reservation.for_versions(bundle.manifest for bundle in bundles)


def install(edited: EditedModel, slot: int, bundle: Bundle) -> str:
    return edited.install(slot, edited.prepare(bundle.version, bundle.manifest, check(bundle)))


def claim_on(edited: EditedModel, slot: int, strength: float = 1.0) -> Any:
    return [slot, edited.held[slot], strength] if slot else None


def run(model: TinyModel, edited: EditedModel, x: Tensor) -> Tensor:
    """Logits of every token, as a runner gets them."""
    hidden = model(x)
    edited.note_output(hidden)
    return model.logits(hidden)


def by_formula(model: TinyModel, x: Tensor, bundle: Bundle | None) -> Array:
    """The tiny model in numpy, edited by the formulas of the kinds."""
    tensors = check(bundle) if bundle else {}
    pairs = [(edit, edit.numbers(tensors, WIDTHS)) for edit in (bundle.manifest.edits if bundle else ())]
    return tiny_by_formula(model, x, edits_by_formula(pairs))
