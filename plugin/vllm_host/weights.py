"""Finds the weights of a loaded model in which a version can be installed, and exchanges them. Runs in workers.

On a GPU, vLLM computes with the parameter itself. On a CPU, it packs the weight for oneDNN when it loads the model, and
drops the parameter. Its kernels then read the address of the packed weight from a tensor, so two weights are exchanged
by exchanging two addresses. On a CPU with AMX, small weights are packed into a tensor instead, whose numbers are
exchanged. The loaded weights are kept too, because packed weights cannot be unpacked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import vllm
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.edit_store.sites import Site
from vllm_edits.plugin.graph.edited_model import SiteModule
from vllm_edits.plugin.vllm_host.seams import optional
from vllm_edits.plugin.weights.checkpoint import Checkpoint
from vllm_edits.plugin.weights.patched_weights import Copy, LiveWeight, PatchedWeights, ProjectionPart
from vllm_edits.plugin.weights.plain_weight import PlainWeight, exchange_bias

_PRIMITIVES = 32
"""number of shapes for which oneDNN caches a plan, the same as in vLLM"""
_PROBES = 4
_HANDLER, _TILES = "handler", "packed_weight"
"""vLLM's names of a packed weight, for oneDNN and for AMX"""


class PackedWeight:
    """A weight in oneDNN's packed form, on a CPU. loaded_weight [out, in]: the weight before packing."""

    def __init__(self, handler: Any, loaded_weight: Tensor, bias: Tensor | None) -> None:
        self.dtype = loaded_weight.dtype
        self.bias = bias
        self._handler = handler
        self._loaded = loaded_weight
        random = torch.Generator().manual_seed(0)
        self._probes = torch.randn(_PROBES, loaded_weight.shape[1], generator=random).to(self.dtype)

    def loaded(self, aside: Copy | None) -> Tensor:
        del aside
        return self._loaded

    def copy(self, weight: Tensor, bias: Tensor | None) -> Copy:
        # Its fingerprint is taken later: vLLM's products share one scratch pad, which the engine uses now.
        return Copy(ops.create_onednn_mm(weight.t(), _PRIMITIVES), bias, weight.nbytes)

    def exchange(self, copy: Copy) -> None:
        # Each handler frees its weight when it is deleted, so addresses are exchanged, never copied.
        mine, other = self._handler.handler_tensor, copy.weight.handler_tensor
        address = mine.clone()
        mine.copy_(other)
        other.copy_(address)
        exchange_bias(self.bias, copy)

    def fingerprint(self, copy: Copy | None) -> bytes:
        """The products with fixed vectors. Packed weights cannot be read, only multiplied."""
        handler, bias = (self._handler, self.bias) if copy is None else (copy.weight, copy.bias)
        said: bytes = ops.onednn_mm(handler, self._probes, bias).view(torch.uint8).numpy().tobytes()
        return said


class TiledWeight(PlainWeight):
    """A weight in the order of AMX's tiles, on a CPU. loaded_weight [out, in]: the weight before packing."""

    def __init__(self, tiles: Tensor, loaded_weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(tiles, bias)
        self.dtype = loaded_weight.dtype
        self._loaded = loaded_weight

    def loaded(self, aside: Copy | None) -> Tensor:
        del aside
        return self._loaded

    def copy(self, weight: Tensor, bias: Tensor | None) -> Copy:
        return super().copy(torch.ops._C.convert_weight_packed(weight), bias)  # noqa: SLF001  as torch calls vLLM's


@contextmanager
def keeping_loaded(
    loader: Any, wanted: Callable[[nn.Module], Iterable[nn.Module]]
) -> Iterator[dict[nn.Module, Tensor]]:
    """While `loader` loads a model in the block, keep the weights of the wanted modules before vLLM packs them."""
    kept: dict[nn.Module, Tensor] = {}
    load_weights = loader.load_weights

    def load_and_keep(model: nn.Module, model_config: Any) -> None:
        load_weights(model, model_config)
        kept.update(_weights_of(wanted(model)))

    loader.load_weights = load_and_keep
    try:
        yield kept
    finally:
        loader.load_weights = load_weights


def _weights_of(modules: Iterable[Any]) -> Iterator[tuple[nn.Module, Tensor]]:
    """The weights of these modules. They are not copied, only referenced."""
    for module in modules:
        method = module.quant_method if isinstance(module, LinearBase) else None
        if not isinstance(method, UnquantizedLinearMethod):
            raise UnsupportedHost(
                f"edits.weights needs unquantised weights, found a {type(module).__name__} with "
                f"{type(method).__name__}. Serve an unquantised checkpoint, or leave out edits.weights and serve every "
                "variant per request"
            )
        yield module, module.weight.detach()


def patchable(
    model: nn.Module,
    site_modules: Mapping[Site, SiteModule],
    reserved: Mapping[Site, bool],
    kept: Mapping[nn.Module, Tensor],
    checkpoint: Checkpoint,
) -> PatchedWeights:
    """The weights of a loaded model in which a version can be installed.

    reserved: the reserved projections by the site of their output, and whether each needs a bias. A projection
    without a bias gets zeros. checkpoint: the checkpoint of the model.
    """
    architecture = checkpoint.architecture
    names, reads = {module: name for name, module in model.named_modules()}, architecture.projections()
    parts = {
        site: ProjectionPart(
            names[at.module], at.start or 0, at.shard, site_modules[site.beside(reads[site.point])].shard
        )
        for site, at in ((site, site_modules[site]) for site in sorted(reserved))
    }
    for site, biased in reserved.items():
        module: Any = site_modules[site].module
        if biased and module.bias is None:
            dtype = torch.float32 if _TILES in _captured(module) else kept[module].dtype  # as its kernel expects it
            zeros = torch.zeros(len(kept[module]), dtype=dtype, device=kept[module].device)
            module.bias = nn.Parameter(zeros, requires_grad=False)
    modules = {names[module]: _live(names[module], module, weight) for module, weight in kept.items()}
    return PatchedWeights(modules, parts, architecture, _free_bytes, checkpoint.projection)


def _free_bytes() -> int:
    return int(psutil.virtual_memory().available)


def _live(name: str, module: Any, loaded: Tensor) -> LiveWeight:
    bias = None if module.bias is None else module.bias.detach()
    if module.weight.data_ptr() == loaded.data_ptr():
        return PlainWeight(loaded, bias)
    held = _captured(module)
    if _HANDLER in held:
        return PackedWeight(held[_HANDLER], loaded, bias)
    if _TILES in held:
        return TiledWeight(held[_TILES], loaded, bias)
    raise UnsupportedHost(
        f"vLLM {vllm.__version__} packs the weight of {name} in a form that edits.weights does not support. Leave "
        "out edits.weights and serve every variant per request"
    )


def _captured(module: Any) -> Mapping[str, Any]:
    """The variables in the closure of vLLM's function for a projection on a CPU, by name."""
    computes = optional(module, "cpu_linear")
    return inspect.getclosurevars(computes).nonlocals if inspect.isfunction(computes) else {}
