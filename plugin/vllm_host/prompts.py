"""Reads the prompt of a request in both model runners of vLLM: tokens, vectors from the client, or both."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def length(request: Any) -> int:
    """The number of positions of a prompt. request: vLLM's `NewRequestData` or `CachedRequestState`."""
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    return 0 if request.prompt_embeds is None else len(request.prompt_embeds)


def embedded(request: Any) -> NDArray[np.bool_] | None:
    """[prompt]: True at positions with a vector from the client, which have no token. None without such positions."""
    if request.prompt_embeds is None:
        return None
    if request.prompt_is_token_ids is None:
        return np.ones(len(request.prompt_embeds), dtype=bool)
    return ~np.array(request.prompt_is_token_ids, dtype=bool)
