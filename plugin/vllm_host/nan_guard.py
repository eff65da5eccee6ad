"""Keeps a version whose edits overflow from harming other requests.

Attention multiplies the values of whole cache blocks, those behind a request's end by zero; and zero times NaN is NaN.
So NaN in a block poisons whoever is given it next (on a CPU, and in FlashAttention 3; some other kernels mask it).
Values therefore enter the cache as finite numbers. Those that were not are huge, so whoever rightly reads them goes on
to overflow, and is still counted as corrupted.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention

from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.graph.finite import finite


def guard_against_nan(model: nn.Module) -> None:
    """Have every attention layer cache finite values only. Finite ones stay as they are, bit for bit."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise UnsupportedHost(
            "this vLLM builds the model without its Attention layer, so NaN could not be kept out of the KV cache. Use "
            "a supported version"
        )
    for layer in layers:
        layer.__class__ = _contained(layer.__class__)


@functools.cache
def _contained(cls: type[Any]) -> type[nn.Module]:
    """A subclass of an attention layer that caches finite values only."""

    class Contained(cls):  # type: ignore[misc]
        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(query, key, finite(value), *args, **kwargs)

    return Contained
