"""Intrinsic dimension and the bound on false positives: closed forms on spheres, and what triggers really do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vllm_edits.edit_store.authoring import selectivity
from vllm_edits.edit_store.authoring.selectivity import (
    Dimension,
    FalsePositives,
    Gates,
    Sphere,
    closeness,
    features_needed,
    folded_rows,
    intrinsic_dimension,
)
from vllm_edits.edit_store.kinds.gate import Gate

THETA = 0.1
"""wide enough for pairs to be close in a dozen dimensions"""


def uniform(count: int, width: int, seed: int = 0) -> Tensor:
    """Unit vectors, uniform on the sphere."""
    made = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made, dim=1)


def cap(cosine: float, width: int) -> float:
    """Share of the sphere within the cap of that cosine, by quadrature of (1 - t^2)^((width - 3) / 2)."""
    t = torch.linspace(-1, 1, 2_000_001, dtype=torch.float64)
    density = (1 - t**2).clamp(min=0) ** ((width - 3) / 2)
    return float(density[t >= cosine].sum() / density.sum())


class TestSphere:
    def test_features_are_those_of_the_gate_with_normalise(self) -> None:
        """A gate's own arithmetic, by its response and by what it adds; without the centroid it is another."""
        random = torch.Generator().manual_seed(0)
        x, weight, bias, centroid = (torch.randn(*shape, generator=random) for shape in ((9, 6), (6,), (6,), (6,)))
        weight = 1 + weight.abs()
        features = Sphere(weight, bias, centroid).features(x)
        gate = Gate(site="layers.0.mlp.out", reads="layers.0.mlp.in", rank=1, normalise=True, activation="relu")
        read, write = torch.tensor([[0.5, -1, 2, 0, 1, 3]]), torch.ones(1, 6)
        found = gate.apply(
            x.numpy(), torch.zeros(9, 6).numpy(), read=read.numpy(), bias=torch.zeros(1).numpy(), write=write.numpy(),
            norm_weight=weight.numpy(), norm_bias=bias.numpy(), centroid=centroid.numpy(),
        )  # fmt: skip
        torch.testing.assert_close(torch.relu(features @ read.T) @ write, torch.from_numpy(found))
        torch.testing.assert_close(features.norm(dim=1), torch.ones(9))
        other = Sphere(weight, bias, torch.zeros(6)).features(x)
        assert float((other - features).abs().max()) > 0.05

    def test_behind_a_norm_the_surface_has_length_one(self) -> None:
        stream = 5 * torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
        weight = torch.linspace(0.2, 3, 64)
        normed = torch.nn.functional.rms_norm(stream, (64,), weight, eps=1e-6)
        sphere = Sphere(weight, torch.zeros(64), torch.zeros(64))
        torch.testing.assert_close(sphere.surface(normed).norm(dim=1), torch.ones(7), atol=1e-5, rtol=0)
        assert float((Sphere(weight + 1, sphere.bias, sphere.centroid).surface(normed).norm(dim=1) - 1).abs().min()) > (
            0.1
        ), "another weight"


class TestDimension:
    @pytest.mark.parametrize("width", [2, 3, 5, 9])
    def test_on_a_sphere_it_is_the_share_of_a_cap(self, width: int) -> None:
        """Closed forms on the circle and the sphere, by quadrature above."""
        cosine = 1 + closeness(THETA)
        expected = {2: math.acos(cosine) / math.pi, 3: (1 - cosine) / 2}.get(width, cap(cosine, width))
        found = intrinsic_dimension(uniform(4000, width), THETA)
        assert found.probability == pytest.approx(expected, rel=0.05)
        assert found.value == pytest.approx(-1 - math.log2(expected), abs=0.08)
        assert not found.at_least

    def test_it_grows_with_the_dimension_and_not_with_what_is_around_it(self) -> None:
        values = [intrinsic_dimension(uniform(3000, width), THETA).value for width in (2, 3, 5, 8, 12)]
        assert values == sorted(values)
        assert values[-1] > values[0] + 4
        turned = torch.linalg.qr(torch.randn(50, 3, generator=torch.Generator().manual_seed(2))).Q
        assert intrinsic_dimension(uniform(3000, 3) @ turned.T, THETA).value == pytest.approx(values[1], abs=1e-3)

    def test_clusters_have_a_low_dimension(self) -> None:
        """A dozen points with little noise are close with the chance that two share one, however wide the space."""
        centres, which = uniform(12, 80, seed=3), torch.randint(12, (2000,), generator=torch.Generator().manual_seed(4))
        near = torch.nn.functional.normalize(centres[which] + 0.01 * uniform(2000, 80, seed=5), dim=1)
        assert intrinsic_dimension(near, 0.005).value == pytest.approx(math.log2(12) - 1, abs=0.1)
        assert intrinsic_dimension(uniform(2000, 80), 0.005).at_least, "negative control"
        assert intrinsic_dimension(uniform(1, 4).expand(5, 4), 0.005).value == -1, "all alike"

    def test_without_a_close_pair_it_is_at_least_what_one_would_give(self) -> None:
        few, more = (intrinsic_dimension(uniform(count, 100), 0.005) for count in (100, 1000))
        assert (few.close, few.pairs, few.at_least) == (0, 100 * 99 // 2, True)
        assert few.value == pytest.approx(-1 + math.log2(4950))
        assert math.isfinite(more.value)
        assert more.value > few.value + 6, "more features see further"

    def test_pairs_within_one_text_are_not_counted(self) -> None:
        """Texts that repeat themselves: alone they look alike, and between them nothing is."""
        texts = torch.arange(40).repeat_interleave(10)
        repeated = uniform(40, 60)[texts]
        apart = intrinsic_dimension(repeated, 0.005, texts)
        assert (apart.close, apart.pairs) == (0, 400 * 390 // 2)
        assert intrinsic_dimension(repeated, 0.005).close == 40 * 45, "negative control"
        with pytest.raises(ValueError, match="two texts"):
            intrinsic_dimension(repeated[:10], 0.005, texts[:10])

    def test_blocks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        features, texts = uniform(103, 4), torch.arange(103) // 2
        whole = intrinsic_dimension(features, THETA, texts)
        monkeypatch.setattr(selectivity, "_AT_ONCE", 10)
        assert intrinsic_dimension(features, THETA, texts) == whole
        assert whole.close > 100, "positive control"

    def test_the_features_needed_are_enough(self) -> None:
        """With so many as it says, about so many pairs are close; with a tenth of them, almost none."""
        dimension = intrinsic_dimension(uniform(4000, 12), THETA).value
        needed = features_needed(dimension, close=10)
        assert 30 < needed < 100
        close = [intrinsic_dimension(uniform(needed, 12, seed), THETA).close for seed in range(40)]
        assert sum(close) / 40 == pytest.approx(10, rel=0.25)
        assert sum(intrinsic_dimension(uniform(needed // 10, 12, seed), THETA).close for seed in range(40)) < 10


class TestBound:
    @pytest.mark.parametrize("width", [3, 5, 8])
    def test_no_random_trigger_fires_more_often(self, width: int) -> None:
        """Over many samples; the share without the root is not a bound."""
        features, triggers = uniform(20000, width), uniform(200, width, seed=6)
        bound = intrinsic_dimension(features[:4000], THETA).bound
        fired = (features @ triggers.T > 1 - THETA).float().mean(0)
        assert float(fired.max()) < bound
        assert float(fired.mean()) == pytest.approx(cap(1 - THETA, width), rel=0.1), "positive control: they do fire"

    def test_a_cluster_around_the_trigger_reaches_it(self) -> None:
        """A fifth of all text in one place: its gate fires on a fifth, which is the bound, and above its square."""
        trigger = uniform(1, 80)
        spread = uniform(5000, 80, seed=7)
        spread[:1000] = torch.nn.functional.normalize(trigger + 0.02 * spread[:1000], dim=1)
        found = intrinsic_dimension(spread, 0.005)
        rate = float((spread @ trigger[0] > 0.995).float().mean())
        assert rate == pytest.approx(0.2)
        assert found.bound == pytest.approx(rate, rel=0.01)
        assert found.bound**2 < rate / 2
        assert float((spread @ uniform(1, 80, seed=8)[0] > 0.995).float().mean()) == 0, "another trigger"

    def test_it_is_the_root_of_the_share_of_close_pairs(self) -> None:
        assert Dimension(100, 4950, 99).bound == pytest.approx(math.sqrt(99 / 4950))
        assert Dimension(100, 4950, 0).bound == pytest.approx(math.sqrt(1 / 4950))
        assert closeness(0.005) == pytest.approx(2 * 0.005 * (0.005 - 2))


class TestGates:
    SPHERE = Sphere(torch.linspace(0.5, 2, 24), torch.zeros(24), torch.zeros(24))

    def text(self, count: int = 3000) -> Tensor:
        """Vectors behind a norm, about a common centre as those of a model are."""
        spread = uniform(count, 24, seed=9) + 2 * uniform(1, 24, seed=10)
        return torch.nn.functional.normalize(spread, dim=1) * 24**0.5 * self.SPHERE.weight

    def test_the_folded_row_is_the_published_system(self) -> None:
        """Row by row, with C summed about each trigger; the response at the trigger is the one asked for."""
        text, triggers = self.text(), self.text()[:3] + 0.1 * self.SPHERE.weight
        covariance = torch.cov(text.T, correction=0)
        rows = folded_rows(self.SPHERE, triggers, text.mean(0), covariance, theta=0.05, height=50.0)
        assert rows is not None
        torch.testing.assert_close((rows * triggers).sum(1), torch.full((3,), 50.0), atol=0.01, rtol=0)
        surface = self.SPHERE.surface(text).double()
        for row, x in zip(rows, triggers, strict=True):
            s = self.SPHERE.surface(x).double()
            v = torch.linalg.solve((surface - s).T @ (surface - s) / len(text), s)
            bias = 50 / 0.05 * (0.05 - s @ s)
            expected = (50 / 0.05 * s + v / v.norm() * bias / (v / v.norm() @ s)) / self.SPHERE.weight / 24**0.5
            torch.testing.assert_close(row.double(), expected, rtol=1e-3, atol=0.05)
            share = float((text @ row > 0).float().mean())
            plain = 50 / 0.05 * s / self.SPHERE.weight / 24**0.5
            assert share < 0.05 < float((text @ plain.float() > 0).float().mean()), "without a bias it opens at half"
        assert folded_rows(self.SPHERE, triggers, text.mean(0), torch.zeros(24, 24), theta=0.05, height=50.0) is None

    def test_a_gate_opens_above_its_cosine(self) -> None:
        text = self.text()
        gates = Gates(self.SPHERE, self.SPHERE.features(text[:2]), theta=0.1, height=7.0)
        responses, cosines = gates.responses(text), gates.cosines(text)
        torch.testing.assert_close(responses[:2].diagonal(), torch.full((2,), 7.0), atol=1e-4, rtol=0)
        assert torch.equal(responses > 0, cosines > 0.9)
        assert 0 < float((responses > 0).float().mean()) < 0.5

    def test_triggers_that_open_another_gate_are_named(self) -> None:
        x = self.text()[:4]
        x[3] = x[1] + 1e-3
        gates = Gates(self.SPHERE, self.SPHERE.features(x), theta=0.005, height=50.0)
        assert gates.crossing(x) == [(1, 3)]
        assert Gates(self.SPHERE, gates.triggers[:3], 0.005, 50.0).crossing(x[:3]) == []

    def test_false_positives_are_counted_but_for_first_tokens(self) -> None:
        text = self.text()
        found = FalsePositives(Gates(self.SPHERE, self.SPHERE.features(text[:2]), theta=0.005, height=50.0))
        found.add(torch.stack([text[0], text[100], text[1], text[0], text[0]]))
        assert (found.tokens, found.opened, found.first_opened) == (4, 3, 1)
        assert found.by_gate.tolist() == [2, 1]
        assert found.share == 0.75
        assert found.cosines.tolist() == pytest.approx([1, 1], abs=1e-5)
        found.add(text[200:300])
        assert (found.tokens, found.opened, found.first_opened) == (103, 3, 1)
