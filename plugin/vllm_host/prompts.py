"""What a prompt is made of, as both model runners of vLLM keep it: tokens, a client's vectors, or both."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def length(request: Any) -> int:
    """Number of positions of a prompt. request: vLLM's `NewRequestData` or `CachedRequestState`."""
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    return 0 if request.prompt_embeds is None else len(request.prompt_embeds)


def embedded(request: Any) -> NDArray[np.bool_] | None:
    """[prompt]: positions that take a vector which the client sent, and so have no token; None where none does."""
    if request.prompt_embeds is None:
        return None
    if request.prompt_is_token_ids is None:
        return np.ones(len(request.prompt_embeds), dtype=bool)
    return ~np.array(request.prompt_is_token_ids, dtype=bool)
