"""Spiked covariance: what is planted is found as theory says, and noise has nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.spiked_covariance import (
    TRACY_WIDOM,
    SpikedCovariance,
    analyse,
    distance,
    edge_scale,
    law,
    law_median,
    population_value,
    sample_value,
    squared_cosine,
)

WIDTH, NOISE = 200, 4.0
GAMMAS = (0.02, 0.25, 1.0, 2.0)


def drawn(gamma: float, seed: int, planted: Sequence[float] = (), *, width: int = WIDTH) -> tuple[Tensor, Tensor, int]:
    """Covariance, planted directions [k, width], and the number of samples. planted: variances, in units of noise.

    What is planted has exactly its variance in the sample, so that noise alone blurs it.
    """
    random, samples = torch.Generator().manual_seed(seed), round(width / gamma)
    directions = torch.linalg.qr(torch.randn(width, max(1, len(planted)), generator=random).double()).Q.T
    x = torch.randn(samples, width, generator=random).double()
    for variance, direction in zip(planted, directions, strict=False):
        along = torch.randn(samples, generator=random).double()
        x += torch.outer(along * math.sqrt((variance - 1) * samples) / along.norm(), direction)
    return NOISE * x.T @ x / samples, directions, samples


def over_seeds(gamma: float, planted: Sequence[float], seeds: int = 4) -> list[tuple[SpikedCovariance, Tensor]]:
    found = []
    for seed in range(seeds):
        covariance, directions, samples = drawn(gamma, seed, planted)
        found.append((analyse(covariance, samples), directions))
    return found


class TestTheory:
    @pytest.mark.parametrize("gamma", [0.01, 0.3, 1.0, 2.0, 5.0])
    def test_the_law_is_the_integral_of_its_density(self, gamma: float) -> None:
        """The density sqrt((b - x) (x - a)) / (2 pi min(1, gamma) x), summed up by the middles of small steps."""
        low, high = (1 - math.sqrt(gamma)) ** 2, (1 + math.sqrt(gamma)) ** 2
        angles = torch.linspace(0, math.pi, 4001).double()
        ends = (low + high) / 2 - (high - low) / 2 * angles.cos()
        middles = (low + high) / 2 - (high - low) / 2 * ((angles[1:] + angles[:-1]) / 2).cos()
        density = ((high - middles) * (middles - low)).clamp_min(0).sqrt() / middles
        summed = (density * ends.diff()).cumsum(0) / (2 * math.pi * min(1.0, gamma))
        torch.testing.assert_close(law(ends[1:], gamma), summed, atol=1e-4, rtol=0)
        assert float(law(torch.tensor(low / 2), gamma)) == pytest.approx(0, abs=1e-6)
        assert float(law(torch.tensor(high * 2), gamma)) == pytest.approx(1)
        assert float(law(torch.tensor(law_median(gamma)).double(), gamma)) == pytest.approx(0.5, abs=1e-7)

    def test_the_median_goes_to_one_with_many_samples(self) -> None:
        assert law_median(1e-4) == pytest.approx(1, abs=1e-3)
        assert law_median(1.0) == pytest.approx(0.6528, abs=1e-3)

    @pytest.mark.parametrize("gamma", [0.02, 0.5, 1.0, 4.0])
    def test_the_correction_undoes_the_bias(self, gamma: float) -> None:
        threshold = 1 + math.sqrt(gamma)
        for variance in (1.01 * threshold, 3 * threshold, 50 * threshold):
            assert sample_value(variance, gamma) > variance
            assert population_value(sample_value(variance, gamma), gamma) == pytest.approx(variance)
        assert sample_value(threshold, gamma) == pytest.approx((1 + math.sqrt(gamma)) ** 2)
        assert sample_value(1.0, gamma) == sample_value(threshold, gamma), "below the threshold it is the edge"

    def test_cosines_go_from_nothing_at_the_threshold_to_one(self) -> None:
        for gamma in (0.1, 2.0):
            threshold = 1 + math.sqrt(gamma)
            assert squared_cosine(threshold, gamma) == pytest.approx(0, abs=1e-9)
            assert squared_cosine(0.5 * threshold, gamma) == 0
            assert 0 < squared_cosine(2 * threshold, gamma) < squared_cosine(1e4, gamma)
            assert squared_cosine(1e6, gamma) == pytest.approx(1, abs=1e-5)

    def test_the_margin_goes_with_two_thirds_of_the_samples(self) -> None:
        """Johnstone's scale of the largest eigenvalue, divided by the samples."""
        width, samples = 50, 400
        ends = math.sqrt(width) + math.sqrt(samples)
        johnstone = ends * (1 / math.sqrt(width) + 1 / math.sqrt(samples)) ** (1 / 3) / samples
        assert edge_scale(width, samples) == pytest.approx(johnstone)
        assert edge_scale(8 * width, 8 * samples) == pytest.approx(edge_scale(width, samples) / 4)


class TestPlanted:
    @pytest.mark.parametrize("gamma", GAMMAS)
    def test_spikes_are_found_with_the_values_and_cosines_of_theory(self, gamma: float) -> None:
        threshold = 1 + math.sqrt(gamma)
        planted = [variance * threshold for variance in (20.0, 10.0, 5.0)]
        found = over_seeds(gamma, planted)
        assert [len(each.spikes) for each, _ in found] == [3] * len(found)
        for place, variance in enumerate(planted):
            spikes = [(each.spikes[place], directions[place]) for each, directions in found]
            population = sum(spike.population for spike, _ in spikes) / len(spikes)
            assert population == pytest.approx(NOISE * variance, rel=0.06)
            value = sum(spike.value for spike, _ in spikes) / len(spikes)
            assert value == pytest.approx(NOISE * sample_value(variance, gamma), rel=0.06)
            cosine = sum(float(spike.direction @ direction) ** 2 for spike, direction in spikes) / len(spikes)
            assert cosine == pytest.approx(squared_cosine(variance, gamma), abs=0.05)
            predicted = sum(spike.squared_cosine for spike, _ in spikes) / len(spikes)
            assert cosine == pytest.approx(predicted, abs=0.05)

    def test_without_the_correction_the_values_would_be_a_third_larger(self) -> None:
        for each, _ in over_seeds(1.0, [4.0]):
            (spike,) = each.spikes
            assert spike.population == pytest.approx(NOISE * 4, rel=0.1)
            assert spike.value > 1.2 * NOISE * 4

    @pytest.mark.parametrize("gamma", GAMMAS)
    def test_noise_has_none_and_follows_the_law(self, gamma: float) -> None:
        for each, _ in over_seeds(gamma, []):
            assert each.spikes == ()
            assert each.noise == pytest.approx(NOISE, rel=0.05)
            assert each.follows_law
            assert each.fit < 0.05

    @pytest.mark.parametrize("gamma", [0.25, 2.0])
    def test_a_spike_below_the_threshold_is_not_found_and_one_above_is(self, gamma: float) -> None:
        root = math.sqrt(gamma)
        assert all(each.spikes == () for each, _ in over_seeds(gamma, [1 + 0.5 * root]))
        for each, _ in over_seeds(gamma, [1 + 4 * root]):
            (spike,) = each.spikes
            assert spike.population > each.detectable
            assert spike.value > each.cut > each.edge

    def test_the_noise_does_not_see_a_few_large_spikes(self) -> None:
        """The mean eigenvalue does."""
        covariance, _, samples = drawn(0.5, 0, [1000.0, 500.0, 100.0])
        found = analyse(covariance, samples)
        assert found.noise == pytest.approx(NOISE, rel=0.06)
        assert float(covariance.trace()) / WIDTH > 5 * NOISE

    def test_a_narrower_margin_lets_noise_in(self) -> None:
        covariance, _, samples = drawn(0.5, 0)
        assert analyse(covariance, samples, margin=TRACY_WIDOM).spikes == ()
        assert analyse(covariance, samples, margin=-20.0).spikes != ()


class TestSymmetry:
    def test_rotated_vectors_have_the_same_spectrum_and_rotated_spikes(self) -> None:
        covariance, _, samples = drawn(0.5, 0, [20.0, 8.0])
        rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)).double()).Q
        one, other = analyse(covariance, samples), analyse(rotation @ covariance @ rotation.T, samples)
        assert len(one.spikes) == len(other.spikes) == 2
        assert other.noise == pytest.approx(one.noise)
        assert other.fit == pytest.approx(one.fit)
        for before, after in zip(one.spikes, other.spikes, strict=True):
            assert (after.value, after.population, after.squared_cosine) == pytest.approx(
                (before.value, before.population, before.squared_cosine)
            )
            assert abs(float(after.direction @ (rotation @ before.direction))) == pytest.approx(1)
            assert abs(float(after.direction @ before.direction)) < 0.9, "positive control"

    def test_scaled_vectors_have_scaled_variances_and_the_same_spikes(self) -> None:
        covariance, _, samples = drawn(2.0, 0, [30.0])
        one, other = analyse(covariance, samples), analyse(9 * covariance, samples)
        for name in ("noise", "edge", "cut", "detectable"):
            assert getattr(other, name) == pytest.approx(9 * getattr(one, name))
        assert other.fit == pytest.approx(one.fit)
        (before,), (after,) = one.spikes, other.spikes
        assert (after.value, after.population) == pytest.approx((9 * before.value, 9 * before.population))
        assert after.squared_cosine == pytest.approx(before.squared_cosine)


class TestFit:
    def test_a_spectrum_that_falls_off_is_told_from_noise(self) -> None:
        """As of a language model's vectors: hundreds of directions pass for spikes, and the fit says so."""
        random, samples = torch.Generator().manual_seed(0), 4 * WIDTH
        scales = torch.arange(1, WIDTH + 1).double() ** -0.5
        x = torch.randn(samples, WIDTH, generator=random).double() * scales
        found = analyse(x.T @ x / samples, samples)
        assert len(found.spikes) > 20
        assert not found.follows_law
        assert found.fit > 0.15

    def test_heavy_tails_are_told_from_noise(self) -> None:
        """Vectors of very different lengths, in directions without any structure."""
        random, samples = torch.Generator().manual_seed(0), 4 * WIDTH
        lengths = torch.exp(1.5 * torch.randn(samples, 1, generator=random).double())
        x = torch.randn(samples, WIDTH, generator=random).double() * lengths
        assert not analyse(x.T @ x / samples, samples).follows_law

    def test_the_distance_is_the_largest_gap_between_the_two(self) -> None:
        gamma = 0.5
        quarter, half = law(torch.tensor([0.5, 1.0]).double(), gamma).tolist()
        assert distance(torch.tensor([1.0]), gamma) == pytest.approx(max(half, 1 - half))
        assert distance(torch.tensor([1.0, 0.5]), gamma) == pytest.approx(
            max(quarter, abs(0.5 - quarter), abs(half - 0.5), 1 - half)
        )
        assert distance(torch.tensor([]), gamma) == 1

    def test_samples_that_are_missing_are_no_eigenvalues_of_the_bulk(self) -> None:
        covariance, _, samples = drawn(2.0, 0)
        found = analyse(covariance, samples)
        assert (found.width, found.bulk, found.gamma) == (WIDTH, WIDTH // 2, 2.0)


def test_vectors_without_noise_are_refused() -> None:
    """Half of the directions have nothing in them, so there is no noise to compare with."""
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(0)).double()
    flat = torch.zeros(60, 60).double()
    flat[:20, :20] = x.T @ x / len(x)
    with pytest.raises(ValueError, match="found half of the eigenvalues next to zero"):
        analyse(flat, 500)
    assert analyse(flat[:20, :20], 500).spikes == ()
