"""Bundles of random numbers, and how tests publish them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vllm_edits.edit_store import (
    BaseModelRef,
    Bundle,
    EditStore,
    LowRank,
    Measurement,
    Offset,
    Provenance,
    Scale,
    SubspaceFilter,
    Widths,
    identify,
)
from vllm_edits.edit_store.bundle import GATE_FIRINGS

Pairs = list[tuple[Any, dict[str, np.ndarray]]]


def random_pairs(kind: str, layer: int, widths: Widths, seed: int, strength: float = 0.3) -> Pairs:
    """One edit of a kind with random numbers, about `strength` of the activations it meets."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    if kind == "low_rank":
        edit = LowRank(site=f"layers.{layer}.mlp.out", reads=f"layers.{layer}.mlp.h", rank=2)
        return [(edit, {"read": normal(2, widths.mlp) * strength, "write": normal(2, widths.hidden) * strength})]
    if kind == "scale":
        return [(Scale(site=f"layers.{layer}.attn.z"), {"factor": generator.uniform(0, 1.5, widths.heads)})]
    if kind == "subspace_filter":
        basis = np.linalg.qr(normal(widths.hidden, 3))[0].T
        edit = SubspaceFilter(site=f"layers.{layer}.resid", rank=3)
        return [(edit, {"basis": basis, "mean": normal(widths.hidden) * strength})]
    return [(Offset(site=f"layers.{layer}.resid"), {"vector": normal(widths.hidden) * strength})]


KINDS = ("low_rank", "scale", "subspace_filter", "offset")


def random_bundle(name: str, base: BaseModelRef, seed: int, *, strength: float = 0.3, label: str = "") -> Bundle:
    """A bundle with one edit of every kind at different layers."""
    pairs = [
        pair
        for number, kind in enumerate(KINDS)
        for pair in random_pairs(kind, number % base.widths.layers, base.widths, seed * 10 + number, strength)
    ]
    return bundle_of(name, base, pairs, label)


def bundle_of(name: str, base: BaseModelRef, pairs: Pairs, label: str = "") -> Bundle:
    """A bundle of given edits, made at a fixed time: the same numbers are the same version."""
    created = datetime(2026, 1, 1, tzinfo=UTC)
    return Bundle.create(name, base, pairs, Provenance(tool="tests", method="random"), label=label, created_at=created)


def whose_gates_fire(bundle: Bundle, rate: float) -> Bundle:
    """The same, with its author's word for how often its gates fire for each token."""
    measured = (Measurement(metric=GATE_FIRINGS, base=0, edited=rate, n=1000),)
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"measurements": measured}))


def publish(store: EditStore, bundle: Bundle, tag: str | None = "prod") -> str:
    """Publish and, unless `tag` is None, promote; returns the version."""
    version = store.publish(bundle)
    if tag is not None:
        store.promote(f"{bundle.manifest.name}@{version}", tag=tag)
    return version


def base_of(model: Path) -> BaseModelRef:
    return identify(model)
