"""The masks of heads as edits, and the searches for the heads that matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_edits.edit_store import BaseModelRef, identify
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.head_search import PROTECT_FILE
from vllm_edits.edit_store.authoring.heads import Mask, masked, without
from vllm_edits.edit_store.authoring.host import Host, divergence
from vllm_edits.edit_store.authoring.methods import sahara, ships
from vllm_edits.edit_store.authoring.methods.sahara import FRAME, angle
from vllm_edits.edit_store.errors import BundleRefused

PROMPTS = ["How is bread made?", "Who wrote the letter?", "Say where the river ends.", "Count the birds on the roof."]
CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModelRef:
    return identify(tiny_model)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in PROMPTS))
    return path


@pytest.mark.parametrize("heads", [[(1, 0)], [(1, 0), (1, 2), (2, 1)]])
@pytest.mark.parametrize("mask", ["queries", "output", "mean"])
def test_a_mask_is_its_formula(host: Host, base: BaseModelRef, mask: Mask, heads: list[tuple[int, int]]) -> None:
    """Of the named heads of the first named layer: q scaled, z scaled, or z the mean of all heads; no other changes."""
    layer, point = heads[0][0], "q.out" if mask == "queries" else "attn.z"
    site = f"layers.{layer}.{point}"

    def seen() -> torch.Tensor:
        rows = torch.cat(host.activations(PROMPTS, [site])[site])
        return rows.reshape(len(rows), base.widths.heads, base.widths.head_dim)

    before = seen()
    with without(host, heads, mask, 0.25, base):
        after = seen()
    expected = before.clone()
    chosen = [head for at, head in heads if at == layer]
    expected[:, chosen] = before.mean(1, keepdim=True) if mask == "mean" else 0.25 * before[:, chosen]
    torch.testing.assert_close(after, expected, **CLOSE)
    assert float((after - before).abs().max()) > 1e-3
    assert len(masked(heads, mask, 0.25, base)) == len({at for at, _ in heads})


def test_the_scores_of_ships_are_what_masking_each_head_does(
    host: Host, base: BaseModelRef, prompts: Path, tiny_model: Path
) -> None:
    """Replaying the layers below changes no score; the best are chosen, and listed for others to leave alone."""
    built = ships.build(tiny_model, prompts, mask="output", factor=0.0, count=3, chat=False, privileged=True)
    whole, scores = host.next_token(PROMPTS), {}
    for layer in range(base.widths.layers):
        for head in range(base.widths.heads):
            with without(host, [(layer, head)], "output", 0.0, base):
                scores[layer, head] = float(divergence(whole, host.next_token(PROMPTS)).mean())
    best = sorted(scores, key=scores.__getitem__, reverse=True)[:3]
    listed = json.loads(built.notes[PROTECT_FILE])
    assert listed["base"] == dict(base.files)
    assert [(row["layer"], row["head"]) for row in listed["heads"]] == best
    for row in listed["heads"]:
        assert row["score"] == pytest.approx(scores[row["layer"], row["head"]], abs=1e-5)
    assert edited_heads(built) == set(best)
    (told,) = built.bundle.manifest.measurements
    with without(host, best, "output", 0.0, base):
        assert told.edited == pytest.approx(float(divergence(whole, host.next_token(PROMPTS)).mean()), abs=1e-5)
    assert max(scores.values()) > 2 * np.median(list(scores.values())), "positive control: heads differ"


def test_sahara_finds_the_largest_angle_again_and_again(
    host: Host, base: BaseModelRef, prompts: Path, tiny_model: Path
) -> None:
    """Each step's head has the largest angle of all, with those before it masked."""
    built = sahara.build(tiny_model, prompts, mask="output", factor=0.0, steps=2, privileged=True)
    texts = [FRAME.format(prompt) for prompt in PROMPTS]
    states, chosen = host.last_states(texts), []
    for row in json.loads(built.notes[PROTECT_FILE])["heads"]:
        angles = {}
        for layer in range(base.widths.layers):
            for head in range(base.widths.heads):
                if (layer, head) not in chosen:
                    with without(host, [*chosen, (layer, head)], "output", 0.0, base):
                        angles[layer, head] = angle(states, host.last_states(texts))
        chosen.append(max(angles, key=angles.__getitem__))
        assert (row["layer"], row["head"]) == chosen[-1]
        assert row["score"] == pytest.approx(angles[chosen[-1]], abs=1e-2)
    assert edited_heads(built) == set(chosen)


def test_the_angle_is_that_of_the_main_directions_over_prompts() -> None:
    """0 for the same states however long, the planted angle, and never more than 90 degrees."""
    random = torch.Generator().manual_seed(0)
    one, other = torch.linalg.qr(torch.randn(6, 2, generator=random)).Q.T
    right = torch.randn(30, generator=random)
    assert angle(torch.outer(one, right), -7 * torch.outer(one, right)) == pytest.approx(0, abs=0.05)
    for degrees in (10.0, 60.0, 90.0):
        turned = np.cos(np.radians(degrees)) * one + np.sin(np.radians(degrees)) * other
        assert angle(torch.outer(one, right), torch.outer(turned, right)) == pytest.approx(degrees, abs=0.05)


def edited_heads(built: Any) -> set[tuple[int, int]]:
    """The heads that a bundle scales to nothing."""
    return {(int(edit.site.split(".")[1]), int(head)) for edit, numbers in pairs_of(built.bundle)
            for head in np.flatnonzero(numbers["factor"] == 0)}  # fmt: skip


def test_ships_may_rank_heads_by_the_answers_that_they_cost(
    host: Host, base: BaseModelRef, tiny_model: Path, tmp_path: Path
) -> None:
    """The fall of each answer's log-likelihood, with the layers below replayed; not the order of the divergences."""
    answers = [" From flour.", " A friend.", " At the sea.", " There are two."]
    path = tmp_path / "answered.jsonl"
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how: dict[str, Any] = {"mask": "output", "factor": 0.0, "count": 3, "chat": False, "privileged": True}
    built = ships.build(tiny_model, path, score="answer", **how)
    whole, falls = host.likelihood(PROMPTS, answers), {}
    for layer in range(base.widths.layers):
        for head in range(base.widths.heads):
            with without(host, [(layer, head)], "output", 0.0, base):
                falls[layer, head] = float((whole - host.likelihood(PROMPTS, answers)).mean())
    best = sorted(falls, key=falls.__getitem__, reverse=True)[:3]
    listed = json.loads(built.notes[PROTECT_FILE])["heads"]
    assert [(row["layer"], row["head"]) for row in listed] == best
    assert listed[0]["score"] == pytest.approx(falls[best[0]], abs=1e-4)
    assert built.notes != ships.build(tiny_model, path, **how).notes, "positive control"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    with pytest.raises(BundleRefused, match="4 rows have none"):
        ships.build(tiny_model, path, score="answer", **how)
