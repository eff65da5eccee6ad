"""Where kernels compute nothing: what is read back of them. Python imports this by its name at its start.

Every sampled token is the same one, requests go on as they would, and log-probabilities fall evenly. What the weights
on the device are is told by the host, of a copy of them. All else that the device would have computed is whatever lies
in its memory. Where a function is not found by its name the import ends: a rehearsal that reads back garbage would
blame others for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from typing import Any

TOKEN = 5


def _on(device: Any, values: Any, dtype: Any) -> Any:
    """Values on a device, sent as a GPU's own work would leave them there: without a wait."""
    import torch

    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def _sampled(output: Any, batch: Any, req_states: Any, widths: Any) -> Any:
    """A V2 sampler's output in which each request got its tokens; none where its prompt is not through."""
    import torch

    ids = output.sampled_token_ids
    after = batch.num_computed_tokens_np + batch.num_scheduled_tokens
    through = after[: len(widths)] >= req_states.prefill_len.np[batch.idx_mapping_np[: len(widths)]]
    counts = [int(width) if ready else 0 for width, ready in zip(widths, through, strict=True)]
    output.sampled_token_ids = _on(ids.device, [[TOKEN] * ids.shape[1]] * ids.shape[0], ids.dtype)
    output.num_sampled = _on(ids.device, counts, torch.int32)
    output.num_rejected = _on(ids.device, [0] * len(counts), torch.int32)
    return output


def v2_sampler(module: Any) -> None:
    call = module.Sampler.__call__

    def sample(self: Any, logits: Any, input_batch: Any, *others: Any) -> Any:
        output = call(self, logits, input_batch, *others)
        return _sampled(output, input_batch, self.req_states, [1] * input_batch.num_reqs)

    module.Sampler.__call__ = sample


def v2_rejection(module: Any) -> None:
    """Every guess is taken."""
    call = module.RejectionSampler.__call__

    def sample(self: Any, logits: Any, input_batch: Any, *others: Any) -> Any:
        output = call(self, logits, input_batch, *others)
        cumulative = input_batch.cu_num_logits_np
        return _sampled(output, input_batch, self.sampler.req_states, cumulative[1:] - cumulative[:-1])

    module.RejectionSampler.__call__ = sample


def v1_sampler(module: Any) -> None:
    forward = module.Sampler.forward

    def sample(self: Any, *arguments: Any, **named: Any) -> Any:
        output = forward(self, *arguments, **named)
        ids = output.sampled_token_ids
        output.sampled_token_ids = _on(ids.device, [[TOKEN] * ids.shape[1]] * ids.shape[0], ids.dtype)
        return output

    module.Sampler.forward = sample


def v1_rejection(module: Any) -> None:
    forward = module.RejectionSampler.forward

    def sample(self: Any, metadata: Any, *arguments: Any, **named: Any) -> Any:
        output = forward(self, metadata, *arguments, **named)
        ids, taken = output.sampled_token_ids, metadata.num_draft_tokens
        rows = [[TOKEN] * (1 + count) + [-1] * (ids.shape[1] - 1 - count) for count in taken]
        output.sampled_token_ids = _on(ids.device, rows, ids.dtype)
        return output

    module.RejectionSampler.forward = sample


def logprobs(module: Any) -> None:
    import torch

    told = module.LogprobsTensors

    def falling(self: Any) -> Any:
        rows, width = self.logprob_token_ids.shape
        return self._replace(
            logprob_token_ids=torch.arange(TOKEN, TOKEN + width, dtype=torch.int32).repeat(rows, 1),
            logprobs=(-0.5 - torch.arange(width, dtype=torch.float32)).repeat(rows, 1),
            selected_token_ranks=torch.ones(rows, dtype=torch.int32),
        )

    to_host, tolists = told.to_cpu_nonblocking, told.tolists
    told.to_cpu_nonblocking = lambda self: falling(to_host(self))
    told.tolists = lambda self, *arguments: tolists(falling(self), *arguments)


def weights(module: Any) -> None:
    of_device = module.fingerprint

    def fingerprint(tensor: Any) -> bytes:
        of_device(tensor)
        told: bytes = of_device(tensor.cpu())
        return told

    module.fingerprint = fingerprint


CHANGED: dict[str, Callable[[Any], None]] = {
    "vllm.v1.worker.gpu.sample.sampler": v2_sampler,
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler": v2_rejection,
    "vllm.v1.sample.sampler": v1_sampler,
    "vllm.v1.sample.rejection_sampler": v1_rejection,
    "vllm.v1.outputs": logprobs,
    "vllm_edits.plugin.weights.plain_weight": weights,
}


class Finder(importlib.abc.MetaPathFinder):
    """Changes these modules when they are imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in CHANGED:
            return None
        spec: Any = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            CHANGED[name](module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
