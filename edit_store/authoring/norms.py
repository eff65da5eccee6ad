"""The norm before an MLP, by what it does."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vllm_edits.edit_store.authoring.formula import architecture_of, decoder_of, hook
from vllm_edits.edit_store.errors import BundleRefused, Reason
from vllm_edits.edit_store.sites import Site


def norm_before(model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Weight and bias [hidden] of the norm whose output is a layer's mlp.in, by what the norm does.

    So one that scales by 1 + w has that weight. BundleRefused if there is no norm, or if a weight is zero.
    """
    made: list[tuple[nn.Module, Any]] = []
    seen: list[Tensor] = []
    site = Site(layer, "mlp.in")

    def record(module: nn.Module, _: Any, output: Any) -> None:
        made.append((module, output))

    with ExitStack() as hooks:
        for module in model.get_submodule(architecture_of(model).layer_path(layer)).modules():
            hooks.callback(module.register_forward_hook(record).remove)
        hooks.callback(hook(model, site, seen.append).remove)
        hooks.enter_context(torch.inference_mode())
        decoder_of(model)(torch.ones((1, 1), dtype=torch.long, device=model.device), use_cache=False)
    norm = next((module for module, output in made if output is seen[0]), None)
    if norm is None:
        raise BundleRefused("the norm", [Reason(
            "no_norm", f"expected a norm whose output is {site}, found none, so its vectors are not on a sphere. "
            "Choose another model, or build without edits at that site",
        )])  # fmt: skip
    signs = torch.ones_like(seen[0][0, 0])
    signs[
        1::2
    ] = -1  # mean zero and mean square one, which either kind of norm keeps; large, so that epsilon is nothing
    with torch.inference_mode():
        bias = norm(torch.zeros_like(signs)[None])[0]
        weight = (norm(1e3 * signs[None])[0] - bias) * signs
    if zeros := int((weight == 0).sum()):
        raise BundleRefused("the norm", [Reason(
            "zero_weights", f"expected a norm before {site} without a weight of zero, found {zeros}. Choose another "
            "layer",
        )])  # fmt: skip
    return weight.clone(), bias.clone()
