"""Changes of the residual stream that are written at the MLPs' outputs: which models allow that, and their factor."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_edits.edit_store.architectures import supported
from vllm_edits.edit_store.authoring.host import Host
from vllm_edits.edit_store.authoring.method import Inputs
from vllm_edits.edit_store.errors import Reason


def stream_problems(method: str, inputs: Inputs) -> Iterator[Reason]:
    """A norm between the MLP's output and the stream: what is written there would not arrive as it is."""
    if supported(inputs.base.architecture).post_norms is not None:
        yield Reason(
            "site", f"{method} writes a change of the residual stream at mlp.out, and in {inputs.base.architecture} a "
            "norm is between them. Use rome, which needs no such thing",
        )  # fmt: skip


def stream_gain(host: Host) -> float:
    """Factor on what a layer adds to the stream: 1, but for Granite."""
    return float(getattr(host.model.config, "residual_multiplier", 1.0))
