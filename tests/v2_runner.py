"""vLLM's V2 model runner, the one of GPUs, on a CPU: its own code, with its kernels in Triton's interpreter.

What a GPU has besides is not there: CUDA graphs, streams, and memory that is not the host's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_INTERPRETED = Path(__file__).parent / "interpreted_triton"

V2_ON_A_CPU: Mapping[str, str] = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": os.pathsep.join([str(_INTERPRETED), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
"""Environment of a process that is to run it, from its start on."""
