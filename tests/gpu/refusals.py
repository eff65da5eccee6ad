"""The messages on a GPU that is too small or too old: the figure, and the fix. Each start must end by itself.

python -m tests.gpu.refusals         in a process that meets the driver that computes nothing
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.harness.server import free_port
from tests.gpu.facts import ended, require, tried
from tests.gpu.served import FLAGS, model, variant
from vllm_edits.edit_store import EditStore, identify

MIB = 1 << 20


@dataclass(frozen=True)
class Refusal:
    """A machine, and what a start there says."""

    what: str
    environment: Mapping[str, str]
    says: Sequence[str]
    flags: Sequence[str] = ("--enforce-eager",)


REFUSALS = (
    Refusal("a driver for CUDA 12", {"NULL_GPU_DRIVER": "12040"},
            ["torch is built for CUDA 13.0", "supports at most CUDA 12.4", "Update the driver"]),
    Refusal("a GPU of compute capability 6.1", {"NULL_GPU_CAPABILITY": "61"},
            ["GPU 0 has compute capability 6.1", "needs at least 7.5", "use a newer one"]),
    Refusal("a GPU whose memory does not hold the slots", {"NULL_GPU_MEMORY_MIB": "900"},
            ["edits.slots = 4000 takes", "beside the model and the KV cache of one request of 512 tokens",
             "no slots of", "fit. Leave them more memory by the flags named here"],
            ["--enforce-eager", "--set", "slots=4000"]),
    Refusal("a GPU whose KV cache takes what slots would", {"NULL_GPU_MEMORY_MIB": "900"},
            ["edits.slots = 4000 takes", "of --kv-cache-memory-bytes", "fit. Set edits.slots to that or less"],
            ["--enforce-eager", "--set", "slots=4000", "--kv-cache-memory-bytes", str(340 * MIB)]),
    # Known only when the model was compiled and its graphs captured.
    Refusal("V1 with full graphs", {"VLLM_USE_V2_MODEL_RUNNER": "0"},
            ["the V1 model runner replays full CUDA graphs without calling the model", "VLLM_USE_V2_MODEL_RUNNER=1"],
            ["--compilation-config", '{"cudagraph_mode": "FULL"}']),
)  # fmt: skip


def refused(refusal: Refusal, folder: Path) -> dict[str, object]:
    """Start a server on that machine: it must end, and say so."""
    store = EditStore(str(folder / "store"), create=True)
    store.promote(f"variant@{store.publish(variant('variant', identify(model()), 1.0))}")
    command = [
        str(Path(sys.executable).with_name("vllm-edits")), "serve", str(model()), "--store", store.url, "--port",
        str(free_port()), "--host", "127.0.0.1", *FLAGS, *refusal.flags,
    ]  # fmt: skip
    environment = {**os.environ, **refusal.environment, "PYTHONUNBUFFERED": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=480, check=False)
    said = " ".join((ran.stdout + ran.stderr).replace("│", " ").split())
    require(ran.returncode, "the server was not refused")
    missing = [part for part in refusal.says if part not in said]
    require(not missing, f"it did not say {missing}, but: …{said[-1500:]}")
    begin = said.index(refusal.says[0])
    return {"code": ran.returncode, "said": said[begin : begin + 300]}


def main() -> None:
    """The command."""
    worked = []
    for refusal in REFUSALS:
        with tempfile.TemporaryDirectory() as folder:
            worked.append(tried("refused", lambda: refused(refusal, Path(folder)), machine=refusal.what))  # noqa: B023
    ended(all(worked))


if __name__ == "__main__":
    main()
