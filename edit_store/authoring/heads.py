"""Attention heads as what a search removes: the masks of Ships and Sahara (arXiv 2410.13708) as edits.

queries   q[h] *= factor      undifferentiated attention: with a factor near zero the head attends evenly
output    z[h] *= factor      scaling contribution: its share of the attention's output
mean      z[h] <- mean over all heads of z

With several heads of one layer the mean is that of the outputs before any of them is replaced. The authors' code
replaces one after the other, so that a later mean has an earlier one in it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import numpy as np

from vllm_edits.edit_store.authoring.host import Edits, Host, edited
from vllm_edits.edit_store.base_ref import BaseModelRef
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.edit_store.kinds.scale import Scale
from vllm_edits.edit_store.sites import Widths

Head = tuple[int, int]
"""Layer and query head."""
Mask = Literal["queries", "output", "mean"]


def masked(heads: Iterable[Head], mask: Mask, factor: float, base: BaseModelRef) -> Edits:
    """Edits that mask these heads, one for each layer that has some."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in sorted(heads):
        by_layer[layer].append(head)
    if mask == "mean":
        return [_averaged(layer, of, base.widths) for layer, of in by_layer.items()]
    point = "q.out" if mask == "queries" else "attn.z"
    bias: Literal["scaled"] | None = "scaled" if point in base.biased else None
    edits: Edits = []
    for layer, of in by_layer.items():
        factors = np.ones(base.widths.heads, dtype=np.float32)
        factors[of] = factor
        edits.append((Scale(site=f"layers.{layer}.{point}", bias=bias), {"factor": factors}))
    return edits


def _averaged(layer: int, heads: list[int], widths: Widths) -> tuple[LowRank, dict[str, np.ndarray]]:
    """z[h] += mean - z[h], as a map of rank heads x head_dim from z to z."""
    size, site = widths.head_dim, f"layers.{layer}.attn.z"
    mean = np.tile(np.eye(size, dtype=np.float32), widths.heads) / widths.heads
    read = np.concatenate(
        [mean - np.eye(widths.heads * size, dtype=np.float32)[h * size : (h + 1) * size] for h in heads]
    )
    write = np.concatenate([np.eye(widths.heads * size, dtype=np.float32)[h * size : (h + 1) * size] for h in heads])
    return LowRank(site=site, reads=site, rank=len(read)), {"read": read, "write": write}


@contextmanager
def without(host: Host, heads: Iterable[Head], mask: Mask, factor: float, base: BaseModelRef) -> Iterator[None]:
    """Inside, the model runs with these heads masked."""
    with edited(host.model, masked(heads, mask, factor, base)):
        yield


def listed(scores: Mapping[Head, float], base: BaseModelRef, source: str) -> bytes:
    """A file with a list of heads, and the score that each was found by. Other edits can be kept off them."""
    heads = [{"layer": layer, "head": head, "score": round(score, 6)} for (layer, head), score in scores.items()]
    content = {"schema_version": 1, "base": dict(base.files), "source": source, "heads": heads}
    return (json.dumps(content, indent=1) + "\n").encode()
