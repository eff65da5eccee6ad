"""Rank-one concept redirection (ROCR, arXiv 2506.07795): the model takes one concept for another.

The simplest form of the published method: one concept, no optimisation, no edit history. Per layer the closed form is

    W_down <- W_down + r q^T        q = P k / (ridge + k^T P k)        r = (goal - state) / (layers still to come)

k      [mlp]        the concept's key: mean input of the down projection at its last token, over the contexts
P      [mlp, mlp]   projector onto what ordinary text leaves unused at that input, so that q reads nothing there
goal   [hidden]     residual stream after the last edited layer at the *other* concept's last token, over the contexts
state  [hidden]     the same for the concept itself, with the edits of earlier layers in place

Unlike the released code, goal and state are read in the same contexts, so their difference holds no change of template.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_edits.edit_store.authoring.host import Edits, Host, edited
from vllm_edits.edit_store.kinds.low_rank import LowRank

UNUSED = 0.1  # a direction is unused if ordinary text has less than this share of the mean energy in it
RIDGE = 1.0  # as released


def redirect(
    host: Host, concept: str, other: str, *, contexts: Sequence[str], ordinary: Sequence[str], layers: Sequence[int]
) -> Edits:
    """Redirect `concept` to `other`. Each context ends in {}; `ordinary` texts must not change."""
    here = [context.format(concept) for context in contexts]
    there = [context.format(other) for context in contexts]
    last = f"layers.{layers[-1]}.resid"
    goal = _at_last_token(host, there, last)
    used = host.activations(ordinary, [f"layers.{layer}.mlp.h" for layer in layers])
    edits: Edits = []
    for done, layer in enumerate(layers):
        reads = f"layers.{layer}.mlp.h"
        with edited(host.model, edits):
            key, state = _at_last_token(host, here, reads), _at_last_token(host, here, last)
        read = read_vector(key, unused_directions(torch.cat([rows[1:] for rows in used[reads]])))
        write = (goal - state) / (len(layers) - done)
        edit = LowRank(site=f"layers.{layer}.mlp.out", reads=reads, rank=1)
        edits.append((edit, {"read": read[None].numpy(), "write": write[None].numpy()}))
    return edits


def unused_directions(keys: Tensor) -> Tensor:
    """Orthonormal columns U `[width, n]` in which the keys `[tokens, width]` have next to no energy; P = U U^T."""
    energy, directions = torch.linalg.eigh(keys.T @ keys / len(keys))
    unused: Tensor = directions[:, energy < UNUSED * energy.mean()]
    return unused


def read_vector(key: Tensor, unused: Tensor) -> Tensor:
    """The direction q = P k / (ridge + k^T P k): q . k is close to 1, and q . x is 0 for every x that P removes."""
    projected = unused @ (unused.T @ key)
    return projected / (RIDGE + key @ projected)


def _at_last_token(host: Host, texts: Sequence[str], site: str) -> Tensor:
    return torch.stack([rows[-1] for rows in host.activations(texts, [site])[site]]).mean(0)
