"""Probes: what a server said is compared with what was recorded; and a manifest holds them, or says nothing of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.support.fakes import BASE, version_of
from vllm_edits.edit_store import Bundle, Strength, check
from vllm_edits.edit_store.bundle import Manifest
from vllm_edits.edit_store.errors import BundleRefused
from vllm_edits.edit_store.probes import FLOORS, LEAST, Probe, Trace, compare, effect_of

RANDOM = np.random.default_rng(0)
FLOOR = FLOORS["bfloat16"]
PLACES, WATCHED = 4, 10


def trace(numbers: Any, tokens: Sequence[int] = (1, 2, 3, 4), least: float = -12.0) -> Trace:
    rows = np.minimum(0, np.maximum(least, numbers))
    return Trace(tokens=tuple(tokens), logprobs=tuple(map(tuple, rows.tolist())), least=(least,) * len(rows))


def some(effect: float, *, tokens: Sequence[int] = (1, 2, 3, 4), strength: float = 1.0) -> Probe:
    """A probe of edits that change log-probabilities by so many nats."""
    base = RANDOM.uniform(-8, -3, size=(PLACES, WATCHED))
    change = effect * RANDOM.normal(size=base.shape)
    return Probe(
        prompt=(5, 6, 7), strength=strength, watched=tuple(range(WATCHED)), base=trace(base),
        edited=trace(base + change, tokens),
    )  # fmt: skip


def served(probe: Probe, applied: float, noise: float = 0.02) -> tuple[Trace, Trace]:
    """What a server says that applies so much of the edits."""
    base, edited = (np.array(each.logprobs) for each in (probe.base, probe.edited))
    rounding = noise * RANDOM.normal(size=(2, *base.shape))
    return (
        trace(base + rounding[0], probe.base.tokens),
        trace(base + applied * (edited - base) + rounding[1], probe.edited.tokens),
    )  # fmt: skip


def judged(probes: Sequence[Probe], applied: float, noise: float = 0.02) -> Any:
    pairs = [served(probe, applied, noise) for probe in probes]
    return compare(probes, [base for base, _ in pairs], [edited for _, edited in pairs], floor=FLOOR)


class TestCompare:
    @pytest.mark.parametrize("effect", [0.15, 0.5, 2.0])
    def test_what_is_applied_passes_and_what_is_not_does_not(self, effect: float) -> None:
        probes = [some(effect) for _ in range(4)]
        exact = judged(probes, 1.0)
        assert exact.passed
        assert not exact.weak
        assert exact.share == pytest.approx(1, abs=0.1)
        for applied in (0.5, 0.0, -1.0, 2.0):
            wrong = judged(probes, applied)
            assert not wrong.passed, applied
            assert wrong.share == pytest.approx(applied, abs=0.3)  # log-probabilities have bounds
        assert "% of the change that its author recorded is there" in judged(probes, 0.5).told()

    def test_another_edit_of_the_same_size_does_not_pass(self) -> None:
        probes = [some(1.0) for _ in range(3)]
        other = [probe.model_copy(update={"edited": some(1.0).edited}) for probe in probes]
        said = [served(each, 1.0) for each in other]
        assert not compare(probes, [base for base, _ in said], [edited for _, edited in said], floor=FLOOR).passed

    def test_edits_that_hardly_change_anything_are_weak(self) -> None:
        probes = [some(0.01) for _ in range(3)]
        assert judged(probes, 1.0).weak
        assert judged(probes, 0.0).passed
        none = [some(0.0)]
        assert judged(none, 1.0).weak
        assert judged(none, 1.0).passed

    def test_a_base_model_that_differs_much_allows_more(self) -> None:
        """As a quantised one does; nothing is said to be wrong because of it, until it is too much to tell."""
        probes = [some(2.0) for _ in range(4)]
        calm, wild = judged(probes, 1.0, 0.02), judged(probes, 1.0, 0.3)
        assert wild.passed
        assert wild.allowed > calm.allowed
        assert wild.noise > 5 * calm.noise
        assert not judged(probes, 0.0, 0.3).passed
        assert judged(probes, 1.0, 3.0).weak

    def test_places_behind_another_token_do_not_count(self) -> None:
        probe = some(1.0)
        base, edited = served(probe, 1.0)
        lost = np.array(edited.logprobs)
        lost[2:] = -9
        assert not compare([probe], [base], [trace(lost, edited.tokens)], floor=FLOOR).passed, "positive control"
        assert compare([probe], [base], [trace(lost, (1, 9, 9, 9))], floor=FLOOR).passed

    def test_the_base_model_may_say_other_tokens(self) -> None:
        """Then only the first place tells how much is applied."""
        probes = [some(1.0, tokens=(8, 8, 8, 8)) for _ in range(4)]
        assert judged(probes, 1.0).passed
        assert judged(probes, 0.0).share == pytest.approx(0, abs=0.1)

    def test_what_is_not_listed_counts_as_the_least(self) -> None:
        probe = some(0.0)
        base, _ = served(probe, 1.0)
        short = trace(np.array(probe.edited.logprobs), least=-4.0)
        assert compare([probe], [base], [short], floor=FLOOR).passed
        gone = trace(np.full((PLACES, WATCHED), LEAST), least=LEAST)
        assert not compare([probe], [base], [gone], floor=FLOOR).passed

    def test_without_the_base_model_the_floor_counts(self) -> None:
        probes = [some(1.0) for _ in range(3)]
        for applied, passes in ((1.0, True), (0.5, False)):
            said = [edited for _, edited in (served(probe, applied) for probe in probes)]
            assert compare(probes, [None] * 3, said, floor=FLOOR).passed is passes

    def test_effect(self) -> None:
        base = np.full((1, 2), -3.0)
        probe = Probe(
            prompt=(1,), watched=(0, 1), base=trace(base, (1,)), edited=trace(base + np.array([[3.0, -4.0]]), (1,))
        )
        assert effect_of(probe) == pytest.approx(np.sqrt((9 + 16) / 2))


class TestManifest:
    def test_without_probes_nothing_is_written_and_with_them_it_is_another_version(self) -> None:
        bundle = version_of("polite")
        assert "probes" not in json.loads(bundle.manifest.to_bytes())
        proven = bundle.with_probes([some(1.0)])
        assert proven.version != bundle.version
        assert proven.tensor_bytes == bundle.tensor_bytes
        assert Manifest.from_bytes(proven.manifest.to_bytes()) == proven.manifest
        check(proven, BASE)

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"watched": (0,)}, "log-probabilities each"),
            ({"watched": (0,) * WATCHED}, "every watched token once"),
            ({"edited": trace(np.zeros((2, WATCHED)), (1, 2))}, "4 places"),
            ({"prompt": ()}, "at least 1 item"),
        ],
    )
    def test_numbers_that_do_not_fit_are_refused(self, change: dict[str, Any], told: str) -> None:
        fields = {**dict(some(1.0)), **change}
        with pytest.raises(ValidationError, match=told):
            Probe(**fields)

    def test_tokens_and_strengths_that_the_model_does_not_have_are_told(self) -> None:
        far = some(1.0).model_copy(update={"prompt": (BASE.widths.vocab,)})
        bundle = version_of("polite").with_probes([far, some(1.0, strength=2.0)])
        with pytest.raises(BundleRefused) as caught:
            check(bundle, BASE)
        assert [reason.code for reason in caught.value.reasons] == ["probe", "probe"]
        wide = bundle.manifest.model_copy(
            update={"probes": (some(1.0, strength=2.0),), "strength": Strength(minimum=0, maximum=2)}
        )
        check(Bundle(wide, bundle.tensor_bytes), BASE)
