"""What a server knows of a version: the strengths it allows, the cache it shares, whether its gates are counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.proofs.parity import random_numbers
from tests.support.bundles import bundle_of
from tests.support.fakes import BASE
from vllm_edits.edit_store import Bundle, Gate, Offset, Scope, Strength
from vllm_edits.edit_store.errors import RequestRefused
from vllm_edits.plugin.metrics import Metrics
from vllm_edits.plugin.serving.firings import FiringTotals
from vllm_edits.plugin.version_info import NO_INFO, VersionInfo

GATE: dict[str, Any] = {"site": "layers.1.mlp.out", "reads": "layers.1.mlp.in", "rank": 1}


def traits_of(*edits: Any, strength: Strength | None = None) -> VersionInfo:
    made = bundle_of("polite", BASE, [(edit, random_numbers(edit, BASE, 1)) for edit in edits])
    return VersionInfo.of(Bundle(made.manifest.model_copy(update={"strength": strength}), made.tensor_bytes).manifest)


@pytest.mark.parametrize(
    ("scopes", "tail", "bound"),
    [
        ([Scope()], None, False),
        ([Scope(tokens=(1, 2))], None, False),
        ([Scope(segment="prompt")], None, True),
        ([Scope(first=3)], None, True),
        ([Scope(segment="generated")], 0, True),
        ([Scope(last=4)], 4, True),
        ([Scope(last=4), Scope(segment="generated")], 4, True),
        ([Scope(last=4, first=1)], None, True),
        ([Scope(segment="generated"), Scope()], None, True),
        ([Scope(segment="generated", tokens=(5,))], 0, True),
    ],
)
def test_what_is_shared_with_the_base_is_what_comes_before_every_edit(
    scopes: list[Scope], tail: int | None, bound: bool
) -> None:
    """`tail` counts from the prompt's end; a version whose edits depend on that end is bound to the prompt's length."""
    found = traits_of(*(Offset(site=f"layers.{layer}.resid", scope=scope) for layer, scope in enumerate(scopes)))
    assert (found.tail, found.bound_to_prompt) == (tail, bound)


def test_only_gates_that_can_be_silent_are_counted() -> None:
    assert traits_of(Gate(**GATE)).fires
    assert not traits_of(Gate(**GATE, activation="sigmoid")).fires
    assert not traits_of(Offset(site="final")).fires


def test_a_strength_is_within_the_authors_bounds_or_refused() -> None:
    bounded = traits_of(Offset(site="final"), strength=Strength(minimum=0, maximum=2, default=0.5))
    assert [bounded.strength_of(asked, "polite") for asked in (None, 0.0, 2.0)] == [0.5, 0.0, 2.0]
    for asked in (-0.1, 2.1, math.nan, math.inf):
        with pytest.raises(RequestRefused, match=r"'polite': expected a strength of 0 to 2, by default 0\.5, found"):
            bounded.strength_of(asked, "polite")
    for unbounded in (NO_INFO, traits_of(Offset(site="final"))):
        assert unbounded.strength_of(None, "polite") == 1
        with pytest.raises(RequestRefused, match="'polite' accepts no strength"):
            unbounded.strength_of(1.0, "polite")


def test_bounds_are_in_order() -> None:
    with pytest.raises(ValueError, match="minimum <= default <= maximum"):
        Strength(minimum=0, maximum=0.5)


def test_firings_only_grow_also_when_a_version_comes_back() -> None:
    """Workers count from every install on; the metric goes on."""
    registry = CollectorRegistry()
    firings = FiringTotals(Metrics(registry))

    def counted() -> tuple[float, float]:
        labels = {"variant": "polite", "version": "v1"}
        tokens = registry.get_sample_value("vllm_edits_gate_tokens_total", labels)
        times = registry.get_sample_value("vllm_edits_gate_firings_total", {**labels, "edit": "layers.1.mlp.out"})
        return tokens or 0, times or 0

    def count(version: str, worker: int, tokens: int, times: int) -> tuple[int, int]:
        return firings.count("polite", version, worker, tokens, {"layers.1.mlp.out": times, "layers.2.resid": 1})

    assert [count("v1", 0, tokens, times) for tokens, times in ((9, 3), (9, 3), (20, 5))] == [(9, 4), (0, 0), (11, 2)]
    assert counted() == (20, 5)
    firings.forget("v1")
    count("v1", 0, 4, 2)
    count("v2", 0, 9, 9)
    assert counted() == (24, 7)
    count("v1", 1, 6, 4)
    assert counted() == (30, 11), "another worker, with tokens of its own"
