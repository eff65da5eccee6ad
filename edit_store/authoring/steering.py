"""A steering vector: contrastive activation addition (arXiv 2312.06681), over whole texts instead of answer letters.

    x <- x + strength (towards - away)

towards, away  [hidden]  mean of the residual stream at that layer over texts of each kind
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_edits.edit_store.authoring.host import Edits, Host
from vllm_edits.edit_store.kinds.offset import Offset


def steer(
    host: Host, towards: Sequence[str], away: Sequence[str], *, layers: Sequence[int], strength: float = 1.0
) -> Edits:
    """Move every token from the mean of `away` texts to the mean of `towards` texts, after each of `layers`."""
    edits: Edits = []
    for layer in layers:
        site = f"layers.{layer}.resid"
        vector = host.mean_activation(towards, site) - host.mean_activation(away, site)
        edits.append((Offset(site=site), {"vector": (strength * vector).numpy()}))
    return edits
