"""Fills the token slots for vLLM's V1 model runner (CPUs), before each forward pass of the whole model.

Python calls the outer model in every step, so a forward pre-hook sees each batch. Full CUDA graphs replay without this
call. They need the V2 runner, and V1 is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.claim import CLAIM
from vllm_edits.plugin.graph.step_filler import Extents, StepBatch
from vllm_edits.plugin.vllm_host import prompts
from vllm_edits.plugin.vllm_host.compat import need
from vllm_edits.plugin.vllm_host.loaded import LoadedEdits


def attach(runner: Any, loaded: LoadedEdits) -> None:
    """Fill the token slots of the edits that serve before every forward pass of `runner`'s model.

    Attaching twice is harmless.
    """
    batch = need(runner, "input_batch")
    need(batch, "req_ids")
    need(batch, "num_reqs")
    need(runner, "requests")
    need(batch, "num_computed_tokens_cpu")
    need(batch, "num_prompt_tokens")
    need(runner, "query_start_loc", "np")
    need(runner, "input_ids", "gpu")
    model = runner.get_model()
    if not isinstance(runner.model, nn.Module):
        raise UnsupportedHost(
            "the V1 model runner replays full CUDA graphs without calling the model, so edits cannot follow the batch. "
            'Start with VLLM_USE_V2_MODEL_RUNNER=1, or with --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\''
        )
    if getattr(model, "edits_attached", False):
        return
    model.edits_attached = True

    def prepare_step(_module: nn.Module, _args: Any) -> None:
        rows, count = runner.input_batch, runner.input_batch.num_reqs
        requests = [runner.requests[request_id] for request_id in rows.req_ids[:count]]

        def extents() -> Extents:
            return Extents(
                tokens=np.diff(runner.query_start_loc.np[: count + 1]),
                starts=rows.num_computed_tokens_cpu[:count],
                prompts=lambda: rows.num_prompt_tokens[:count],
                # Not the argument of forward, which is None if vLLM embeds the tokens itself.
                input_ids=runner.input_ids.gpu,
            )

        loaded.edited.set_step(StepBatch(requests, _claim, prompts.embedded, extents))

    model.register_forward_pre_hook(prepare_step)
    model.register_forward_hook(lambda _module, _args, output: loaded.edited.note_output(output))


def _claim(request: Any) -> Any:
    """The claim of a request, written by the engine gate. None for the base model."""
    sampling = request.sampling_params
    return sampling.extra_args.get(CLAIM) if sampling is not None and sampling.extra_args else None
