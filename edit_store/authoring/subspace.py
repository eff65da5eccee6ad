"""A filter of the directions in which two kinds of text differ: affine concept erasure, orthogonally projected.

    x <- x - V^T V (x - mean)

mean  [hidden]        mean of the wanted texts, to which the filtered coordinates move
V     [rank, hidden]  leading right singular vectors of (mean of each unwanted text - mean), less their part along the
                      attention sink; with rank 1 nearly the difference of the two class means

LEACE (arXiv 2306.03819) erases with an oblique projection that also whitens. The orthogonal one needs no covariance,
and moves unwanted texts to the wanted side instead of both to the middle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_edits.edit_store.authoring.host import Edits, Host
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter


def filter_contrast(
    host: Host, unwanted: Sequence[str], wanted: Sequence[str], *, layers: Sequence[int], rank: int = 1
) -> Edits:
    """Move the coordinates in which `unwanted` and `wanted` texts differ to the wanted mean, after each of `layers`."""
    edits: Edits = []
    for layer in layers:
        site = f"layers.{layer}.resid"
        texts = host.activations(wanted, [site])[site]
        mean = torch.cat([rows[1:] for rows in texts]).mean(0)
        differences = torch.stack([rows[1:].mean(0) for rows in host.activations(unwanted, [site])[site]]) - mean
        # The first token of any text is an attention sink, in most layers a hundred times longer than other states:
        # moving it would break every text, in whatever language, so the directions are made orthogonal to it.
        sink = torch.stack([rows[0] for rows in texts]).mean(0) - mean
        differences -= torch.outer(differences @ sink, sink) / (sink @ sink)
        basis = torch.linalg.svd(differences, full_matrices=False).Vh[:rank]
        edits.append((SubspaceFilter(site=site, rank=rank), {"basis": basis.numpy(), "mean": mean.numpy()}))
    return edits
