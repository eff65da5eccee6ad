"""A server with a variant in its weights, as tests ask it."""

from __future__ import annotations

from loadtests.harness.client import complete
from tests.proofs.parity import random_numbers
from tests.support.bundles import bundle_of
from tests.support.engine import Serving
from vllm_edits.edit_store import BaseModelRef, Bundle, LowRank, Offset, Scale, WeightDelta

PROMPT = "The road to the sea is long, and those who walk it "


TOKENS = 24


def linear_bundle(name: str, base: BaseModelRef, seed: int) -> Bundle:
    """Fused, split and biased projections, before and behind, at several layers."""
    edits = (
        LowRank(site="layers.1.mlp.out", reads="layers.1.mlp.h", rank=2),
        LowRank(site="layers.0.q.out", reads="layers.0.attn.in", rank=1),
        WeightDelta(site="layers.3.up.out", reads="layers.3.mlp.in"),
        Scale(site="layers.2.attn.z"),
        Scale(site="layers.1.mlp.in", per="channel"),
        Offset(site="layers.2.mlp.out"),
    )
    return bundle_of(name, base, [(edit, random_numbers(edit, base, seed, 0.1)) for edit in edits])


def says(serving: Serving, model: str, prompt: str = PROMPT) -> tuple[str, str]:
    answer = complete(serving.url, model, prompt, TOKENS, ignore_eos=True)
    return answer["headers"]["x-edits-version"], answer["choices"][0]["text"]
