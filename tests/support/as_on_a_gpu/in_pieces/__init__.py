"""A platform of vLLM: a CPU whose models are compiled as a GPU's are, by vLLM's own backend.

It takes the graph apart at the attention, compiles the pieces, and keeps them ahead of time for the next start. vLLM
takes a CPU's graph as a whole instead.
"""

import os


def platform() -> str | None:
    """Where VLLM_PLUGINS names it, and not only because it is there."""
    return f"{__name__}.platform.InPieces" if __name__ in os.environ.get("VLLM_PLUGINS", "").split(",") else None
