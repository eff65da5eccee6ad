"""How vLLM runs on a GPU, on a CPU: its V2 model runner, and its own backend of torch's compiler.

Both are vLLM's code as it is. `as_on_a_gpu` gives them what they need of a GPU: Triton's kernels run in its own
interpreter, so a step takes up to a third of a second. CUDA graphs, streams, and memory that is not the host's are not
there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from loadtests.harness.record import gpu

_ASKED = "VLLM_USE_V2_MODEL_RUNNER"
_HERE = Path(__file__).parent / "as_on_a_gpu"
_ON_A_CPU = {
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": os.pathsep.join([str(_HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
}

ON_V2: Mapping[str, str] = {_ASKED: "1", **({} if gpu() else _ON_A_CPU)}
"""Environment of a process that is to have the V2 runner, from its start on."""
IN_PIECES: Mapping[str, str] = {
    **ON_V2, "VLLM_USE_AOT_COMPILE": "1", **({} if gpu() else {"VLLM_PLUGINS": "in_pieces"}),
}  # fmt: skip
"""The same with models compiled as on a GPU, in pieces that are kept ahead of time."""


def runner_of(environment: Mapping[str, str]) -> str:
    """Which model runner a server with this added to its environment has."""
    return "V2" if gpu() or _ASKED in environment else "V1"
