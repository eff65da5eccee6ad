"""Ablation of the attention heads that a behaviour needs (Ships, arXiv 2410.13708, for any behaviour in prompts).

    z[head] *= 0        for the heads with the largest mean of   log p(answer) - log p(answer | head removed)

The attribution is exact: every head of every given layer is removed in turn. Ships measures the divergence of the whole
next-token distribution; here only the answer counts, so heads that merely change the wording are not chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add

import numpy as np

from vllm_edits.edit_store.authoring.host import Edits, Host, edited
from vllm_edits.edit_store.edits import Array
from vllm_edits.edit_store.kinds.scale import Scale


def ablate_heads(
    host: Host, prompts: Sequence[str], answers: Sequence[str], *, layers: Sequence[int], count: int
) -> Edits:
    """Remove the `count` heads of `layers` whose loss costs the answers most."""
    costs = attribute(host, prompts, answers, layers)
    factors = np.ones_like(costs)
    factors.flat[np.argsort(-costs, axis=None, kind="stable")[:count]] = 0
    return [
        (Scale(site=f"layers.{layer}.attn.z"), {"factor": factor})
        for layer, factor in zip(layers, factors, strict=True)
        if not factor.all()
    ]


def attribute(host: Host, prompts: Sequence[str], answers: Sequence[str], layers: Sequence[int]) -> Array:
    """Fall of the answers' mean log-probability without each head, `[layers, heads]`."""
    whole = host.likelihood(prompts, answers).mean()
    costs = np.zeros((len(layers), host.widths.heads), dtype=np.float32)
    for row, layer in enumerate(layers):
        with host.replaying(list(map(add, prompts, answers)), below=layer):
            for head in range(host.widths.heads):
                factor = np.ones(host.widths.heads, dtype=np.float32)
                factor[head] = 0
                with edited(host.model, [(Scale(site=f"layers.{layer}.attn.z"), {"factor": factor})]):
                    costs[row, head] = whole - host.likelihood(prompts, answers).mean()
    return costs
