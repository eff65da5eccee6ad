"""A version in the weights of a tiny model: what it then says, what is refused, and that the loaded weights return."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.proofs.parity import random_numbers
from tests.support.fakes import BASE, WIDTHS, TinyModel, cheaply, edits_by_formula, plain_weights, tiny_by_formula
from vllm_edits.edit_store import (
    Bundle,
    LowRank,
    Offset,
    Provenance,
    Scale,
    Strength,
    SubspaceFilter,
    WeightDelta,
    check,
)
from vllm_edits.edit_store.edits import Edit
from vllm_edits.edit_store.errors import InstallRefused
from vllm_edits.plugin.weights.patched_weights import Copy, PatchedWeights

EDITS: list[Edit] = [
    LowRank(site="layers.0.mlp.out", reads="layers.0.mlp.h", rank=2),
    LowRank(site="layers.1.attn.out", reads="layers.1.attn.out", rank=1),
    LowRank(site="layers.2.q.out", reads="layers.2.attn.in", rank=1),
    Scale(site="layers.1.attn.z"),
    Scale(site="layers.0.k.out"),
    Scale(site="layers.2.mlp.in", per="channel"),
    SubspaceFilter(site="layers.0.attn.out", rank=2),
    SubspaceFilter(site="layers.1.mlp.out", rank=5, onto=True),
    Offset(site="layers.2.mlp.out"),
    WeightDelta(site="layers.1.gate.out", reads="layers.1.mlp.in"),
    WeightDelta(site="layers.0.up.out", reads="layers.0.mlp.in", layout="sparse", count=2),
]


def bundle_with(edits: list[Edit], seed: int = 0, **more: Any) -> Bundle:
    pairs = []
    for edit in edits:
        fields: dict[str, Any] = random_numbers(edit, BASE, seed)
        if isinstance(edit, WeightDelta) and edit.count is not None:
            fields |= {"rows": np.array([1, 3], dtype=np.int32), "columns": np.array([0, 7], dtype=np.int32)}
        pairs.append((edit, fields))
    return Bundle.create("polite", BASE, pairs, Provenance(tool="tests", method="random"), **more)


def fields_of(bundle: Bundle) -> list[tuple[Edit, dict[str, Any]]]:
    return [(edit, edit.numbers(check(bundle), WIDTHS)) for edit in bundle.manifest.edits]


class Engine:
    """A tiny model with a version in its weights, or none."""

    def __init__(self) -> None:
        self.model = TinyModel()
        self.weights: PatchedWeights = plain_weights(self.model)
        self.x = torch.randn(7, WIDTHS.hidden, generator=torch.Generator().manual_seed(1))
        self.epoch = 0

    def put(self, bundle: Bundle | None) -> None:
        self.epoch += 1
        patch = bundle and self.weights.prepare(bundle.version, bundle.manifest, check(bundle))
        self.weights.install(patch or None, self.epoch)

    def says(self) -> torch.Tensor:
        return self.model.logits(self.model(self.x))

    def bits(self) -> list[bytes]:
        return [each.detach().numpy().tobytes() for each in self.model.parameters()]


@cheaply
@given(st.lists(st.sampled_from(EDITS), unique=True, min_size=1, max_size=5), st.integers(0, 50))
def test_the_patched_model_says_what_the_edits_around_it_say(edits: list[Edit], seed: int) -> None:
    """Fused and alone, before and behind projections; and taken out again, every bit is as it was."""
    engine, bundle = Engine(), bundle_with(edits, seed)
    loaded, before = engine.bits(), engine.says()
    expected = tiny_by_formula(TinyModel(), engine.x, edits_by_formula(fields_of(bundle)))
    engine.put(bundle)
    torch.testing.assert_close(engine.says(), torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-3)
    assert engine.bits() != loaded, "positive control"
    assert engine.weights.version == bundle.version
    engine.put(None)
    assert engine.bits() == loaded
    assert torch.equal(engine.says(), before)
    assert (engine.weights.version, engine.weights.epoch) == (None, 2)


def test_a_thousand_exchanges_end_with_the_loaded_bits() -> None:
    """Versions that touch the same weights, other ones and none, in any order; the last is always what is told."""
    engine, random = Engine(), np.random.default_rng(0)
    bundles = [bundle_with([EDITS[number], EDITS[(number + 3) % len(EDITS)]], number) for number in range(6)]
    patches = {each.version: engine.weights.prepare(each.version, each.manifest, check(each)) for each in bundles}
    loaded, digests = engine.bits(), dict[str | None, str]()
    for epoch in range(1000):
        chosen = None if random.random() < 0.2 else bundles[random.integers(len(bundles))].version
        if chosen != engine.weights.version:
            engine.weights.install(patches[chosen] if chosen else None, epoch)
            assert engine.weights.digest == digests.setdefault(chosen, engine.weights.digest)
    assert len(set(digests.values())) == len(digests) == 7
    engine.weights.install(None, 1000)
    assert engine.bits() == loaded


def test_a_version_is_prepared_from_the_loaded_weights_whatever_is_in_them() -> None:
    first, second = bundle_with(EDITS[:3], 1), bundle_with(EDITS[:4], 2)
    direct, after_another = Engine(), Engine()
    direct.put(second)
    after_another.put(first)
    after_another.put(second)
    assert after_another.bits() == direct.bits()
    assert after_another.weights.digest == direct.weights.digest


def test_strength_is_the_bundles_default() -> None:
    bundle = bundle_with([EDITS[0]], strength=Strength(minimum=0, maximum=1, default=0.25))
    (edit, fields), engine = fields_of(bundle)[0], Engine()
    engine.put(bundle)
    weak = [(edit, {**fields, "write": fields["write"] * 0.25})]
    expected = tiny_by_formula(TinyModel(), engine.x, edits_by_formula(weak))
    torch.testing.assert_close(engine.says(), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


def test_constants_need_a_bias_and_projections_must_be_set_apart() -> None:
    """Each reason with the entry to add; nothing is changed, and a filter without a mean needs no bias."""
    engine = Engine()
    loaded = engine.bits()
    with pytest.raises(InstallRefused) as refusal:
        engine.put(bundle_with([Offset(site="layers.0.q.out"), Offset(site="layers.1.mlp.h")]))
    assert [reason.code for reason in refusal.value.reasons] == ["bias"]
    assert '{"site": "layers.0.q.out", "bias": true}' in refusal.value.reasons[0].message
    del engine.weights.parts[next(site for site in engine.weights.parts if str(site) == "layers.0.k.out")]  # type: ignore[attr-defined]
    with pytest.raises(InstallRefused, match=r'Add \{"site": "layers.0.k.out"\} to edits.weights_reserve'):
        engine.put(bundle_with([Offset(site="layers.0.attn.in")]))
    with pytest.raises(InstallRefused, match="no projection gives or reads that vector"):
        engine.put(bundle_with([SubspaceFilter(site="layers.0.resid", rank=1)]))
    assert engine.bits() == loaded
    filtered = SubspaceFilter(site="layers.1.q.out", rank=2)
    fields = {**random_numbers(filtered, BASE, 1), "mean": np.zeros(WIDTHS.of("q.out"), dtype=np.float32)}
    engine.put(Bundle.create("polite", BASE, [(filtered, fields)], Provenance(tool="tests", method="random")))
    assert engine.bits() != loaded


def test_weights_that_do_not_fit_into_memory_are_refused() -> None:
    """With what they take, before anything is computed."""
    engine = Engine()
    engine.weights._free_bytes = lambda: 500
    with pytest.raises(InstallRefused, match="take 512 bytes of host memory beside the loaded ones, and 500"):
        engine.put(bundle_with(EDITS[:1]))
    engine.weights._free_bytes = lambda: 512
    engine.put(bundle_with(EDITS[:1]))


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_an_exchange_that_fails_midway_is_undone(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first weight, a later one, or with a version in them already: what was there stays, bit for bit."""
    engine = Engine()
    engine.put(bundle_with(EDITS[:2], 1))
    before, digest = engine.bits(), engine.weights.digest
    patch = engine.weights.prepare("2" * 64, bundle_with(EDITS[2:6]).manifest, check(bundle_with(EDITS[2:6])))
    count, live = [0], next(iter(engine.weights._modules.values()))
    exchange = type(live).exchange

    def fails(self: Any, copy: Copy) -> None:
        count[0] += 1
        if count[0] == failing + 1:
            raise MemoryError("planted")
        exchange(self, copy)

    monkeypatch.setattr(type(live), "exchange", fails)
    with pytest.raises(MemoryError, match="planted"):
        engine.weights.install(patch, 9)
    assert engine.bits() == before
    assert (engine.weights.digest, engine.weights.epoch) == (digest, 1)
    engine.weights.install(patch, 9)  # positive control, and another attempt succeeds
    assert engine.weights.version == "2" * 64


def test_weights_that_are_not_what_was_prepared_are_put_back() -> None:
    """A bit that flips between preparing and installing is noticed."""
    engine, bundle = Engine(), bundle_with(EDITS[:2])
    before = engine.bits()
    patch = engine.weights.prepare(bundle.version, bundle.manifest, check(bundle))
    next(iter(patch.copies.values())).weight[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match="is not what was prepared"):
        engine.weights.install(patch, 1)
    assert engine.bits() == before
