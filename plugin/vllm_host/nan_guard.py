"""Keeps NaN out of the KV cache, so that a version whose edits overflow does not harm other requests.

Attention multiplies the values of whole cache blocks. Values after the end of a request are multiplied by zero, but
zero times NaN is NaN. So NaN in a block corrupts the next request that gets the block (on a CPU, and in FlashAttention
3; some other kernels mask it). Therefore values enter the cache as finite numbers. Values that were not finite become
huge. So the request itself still overflows, and is still counted as corrupted.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention

from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.graph.finite import finite


def guard_against_nan(model: nn.Module) -> None:
    """Make every attention layer cache finite values only. Finite values do not change, bit for bit."""
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
