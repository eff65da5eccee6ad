"""Statistics of what passes a site: right, kept, resumed where they stopped, and apart for every model and text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_edits.edit_store import BaseModelRef, identify
from vllm_edits.edit_store.authoring import statistics
from vllm_edits.edit_store.authoring.host import Host
from vllm_edits.edit_store.authoring.statistics import TEXTS_AT_ONCE, Moments, Statistics

SITES = ("layers.0.mlp.h", "layers.2.resid")
TEXTS = [f"Sentence {number} says that it is number {number * number}." for number in range(2 * TEXTS_AT_ONCE + 3)]


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModelRef:
    return identify(tiny_model)


class Steps:
    """Counts what is computed, and may stop it."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.done: list[int] = []
        self._stop_after = stop_after

    def __call__(self, _what: str, done: int, _total: int) -> None:
        self.done.append(done)
        if len(self.done) == self._stop_after:
            raise KeyboardInterrupt


def alike(one: Moments, other: Moments) -> bool:
    return (
        one.count == other.count and torch.equal(one.total, other.total) and torch.equal(one.products, other.products)
    )


def test_they_are_the_moments_of_all_tokens(host: Host, base: BaseModelRef, tmp_path: Path) -> None:
    found = Statistics(host, base, Steps(), folder=tmp_path).moments(SITES, TEXTS)
    for site, rows in host.activations(TEXTS, SITES).items():
        x = torch.cat(rows).double()
        assert found[site].count == len(x)
        torch.testing.assert_close(found[site].mean.double(), x.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[site].second.double(), x.T @ x / len(x), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found[site].covariance.double(), torch.cov(x.T, correction=0), atol=1e-4, rtol=1e-3)


def test_what_was_computed_once_is_read(host: Host, base: BaseModelRef, tmp_path: Path) -> None:
    """Also where one site is known and another is not; not for other texts, or another model."""
    first = Statistics(host, base, Steps(), folder=tmp_path).moments(SITES[:1], TEXTS)
    steps = Steps()
    again = Statistics(host, base, steps, folder=tmp_path)
    assert alike(again.moments(SITES[:1], TEXTS)[SITES[0]], first[SITES[0]])
    assert steps.done == []
    assert again.known(SITES[:1], TEXTS)
    assert not again.known(SITES, TEXTS)
    assert alike(again.moments(SITES, TEXTS)[SITES[0]], first[SITES[0]])
    assert steps.done == [TEXTS_AT_ONCE, 2 * TEXTS_AT_ONCE, len(TEXTS)]
    assert not again.known(SITES, TEXTS[1:])
    other = base.model_copy(update={"files": {**base.files, "config.json": "0" * 64}})
    assert not Statistics(host, other, steps, folder=tmp_path).known(SITES, TEXTS)
    assert not Statistics(host, base, steps, edited_by="a version", folder=tmp_path).known(SITES, TEXTS)


def test_an_interrupted_pass_goes_on_where_it_was(
    host: Host, base: BaseModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same sums, bit for bit."""
    monkeypatch.setattr(statistics, "SAVE_SECONDS", 0.0)
    whole = Statistics(host, base, Steps(), folder=tmp_path / "whole").moments(SITES, TEXTS)
    with pytest.raises(KeyboardInterrupt):
        Statistics(host, base, Steps(stop_after=1), folder=tmp_path / "parts").moments(SITES, TEXTS)
    steps = Steps()
    parts = Statistics(host, base, steps, folder=tmp_path / "parts").moments(SITES, TEXTS)
    assert steps.done == [2 * TEXTS_AT_ONCE, len(TEXTS)]
    assert all(alike(whole[site], parts[site]) for site in SITES)


def test_a_damaged_file_is_computed_again(host: Host, base: BaseModelRef, tmp_path: Path) -> None:
    found = Statistics(host, base, Steps(), folder=tmp_path).moments(SITES[:1], TEXTS)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    steps = Steps()
    again = Statistics(host, base, steps, folder=tmp_path).moments(SITES[:1], TEXTS)
    assert steps.done
    assert alike(found[SITES[0]], again[SITES[0]])
