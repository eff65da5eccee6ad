"""Steering vectors: the directions, what they do to a preference, and the layer that a sweep takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_edits.edit_store import Offset
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.chat import beginning
from vllm_edits.edit_store.authoring.host import Host, edited
from vllm_edits.edit_store.authoring.methods import steer
from vllm_edits.edit_store.authoring.methods.steer import principal

PAIRS = [
    {"positive": f"The {thing} was wonderful.", "negative": f"The {thing} was terrible."}
    for thing in ("trip", "meal", "film", "road", "song", "house", "week", "lesson")
]
HELD = [{"prompt": "My day", "positive": " was wonderful.", "negative": " was terrible."},
        {"positive": "All is wonderful.", "negative": "All is terrible."}]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    for name, rows in (("pairs", PAIRS), ("held_out", HELD)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"pairs={tmp_path / 'pairs.jsonl'}", f"held_out={tmp_path / 'held_out.jsonl'}"


def vector(built: Any) -> np.ndarray:
    ((edit, numbers),) = pairs_of(built.bundle)
    assert isinstance(edit, Offset)
    return np.asarray(numbers["vector"])


def test_the_mean_is_the_difference_of_means(tiny_model: Path, files: tuple[str, str]) -> None:
    host, site = Host.load(tiny_model), "layers.2.resid"

    def mean(column: str, tokens: str) -> torch.Tensor:
        rows = host.activations([row[column] for row in PAIRS], [site])[site]
        return torch.stack([row[-1] if tokens == "last" else row[1:].mean(0) for row in rows]).mean(0)

    for tokens in ("last", "all"):
        expected = mean("positive", tokens) - mean("negative", tokens)
        built = steer.build(tiny_model, files[0], layers=[2], tokens=tokens)
        np.testing.assert_allclose(vector(built), expected.numpy(), atol=1e-5)
        opposite = steer.build(tiny_model, files[0], layers=[2], tokens=tokens, size=-2.0)
        np.testing.assert_allclose(vector(opposite), -2 * vector(built), atol=1e-5)


def test_the_principal_axis_points_to_the_positive_and_leaves_noise_out() -> None:
    """A planted direction under noise that differs from pair to pair; the sign is that of the mean."""
    random = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(200, generator=random), dim=0)
    differences = planted * torch.linspace(2, 6, 30)[:, None] + 0.1 * torch.randn(30, 200, generator=random)
    for sign in (1, -1):
        found = principal(sign * differences)
        assert float(sign * found @ planted / found.norm()) > 0.99
        assert float(found.norm()) == pytest.approx(4, abs=0.1)
    mean_error = (differences.mean(0) - 4 * planted).norm()
    assert float((principal(differences) - 4 * planted).norm()) < float(mean_error)


def test_a_sweep_takes_the_layer_that_prefers_the_positive_most(tiny_model: Path, files: tuple[str, str]) -> None:
    """On the pairs alone: the held-out pairs are only measured."""
    swept = steer.build(tiny_model, *files, sweep=True, layers=[0, 1, 2, 3])
    host, each, preferred = Host.load(tiny_model), [], []
    begins = [beginning(host.tokenizer)] * len(PAIRS)
    for layer in range(4):
        each.append(steer.build(tiny_model, *files, layers=[layer]))
        with edited(host.model, pairs_of(each[-1].bundle)):
            positive, negative = (host.likelihood(begins, [row[column] for row in PAIRS]).mean()
                                  for column in ("positive", "negative"))  # fmt: skip
        preferred.append(float(positive - negative))
    best = each[int(np.argmax(preferred))]
    assert max(preferred) > min(preferred) + 0.01
    np.testing.assert_array_equal(vector(swept), vector(best))
    (told,) = swept.bundle.manifest.measurements
    assert (told,) == best.bundle.manifest.measurements
    assert (told.n, told.metric) == (2, "preference held out, nats per token")
    assert told.edited != told.base


def test_options_shape_the_edit(tiny_model: Path, files: tuple[str, str]) -> None:
    built = steer.build(tiny_model, files[0], layers=[1, 3], keep_norm=True, scope="generated", direction="pca")
    edits = built.bundle.manifest.edits
    assert [(edit.site, edit.renorm, edit.scope.segment) for edit in edits if isinstance(edit, Offset)] == [
        ("layers.1.resid", True, "generated"), ("layers.3.resid", True, "generated"),
    ]  # fmt: skip
