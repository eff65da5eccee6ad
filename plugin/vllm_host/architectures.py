"""Finds the module of each site in a loaded model, by the table in `vllm_edits.edit_store.architectures`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from vllm_edits.edit_store.architectures import Architecture, ModuleSide, supported
from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.edit_store.sites import Site, Widths
from vllm_edits.plugin.graph.edited_model import SiteModule
from vllm_edits.plugin.graph.tensor_parallel import ONLY_RANK, Rank, Shard
from vllm_edits.plugin.vllm_host.seams import optional

_VECTORS = "hidden_states"


def site_modules(model: nn.Module, name: str, widths: Widths, worker: Rank = ONLY_RANK) -> dict[Site, SiteModule]:
    """The module of every site of `model`, and the shard of the site's vector in this worker.

    UnsupportedHost if a module is missing, or divided among workers in an unexpected way.
    """
    architecture = supported(name)
    return {site: _site_module(model, architecture, widths, site, worker) for site in architecture.sites(widths.layers)}


def _site_module(model: nn.Module, architecture: Architecture, widths: Widths, site: Site, worker: Rank) -> SiteModule:
    try:
        root: Any = model
        if site.layer is not None:
            root = model.get_submodule(architecture.layer_path(site.layer))
        modules = dict(root.named_modules())
        at = architecture.side_of(site.point, widths.per_worker(worker.size), modules.__contains__)
        module = modules["logits_processor"] if site.point == "logits" else modules[at.path]
    except (AttributeError, KeyError) as error:
        raise UnsupportedHost(
            f"this vLLM builds {architecture.name} in an unexpected way: no module for {site} ({error}). Use a "
            "supported version"
        ) from error
    is_layer = site.point in ("embed.out", "resid")  # the first of them that is edited says it for both
    shard = worker.shard(widths, site.point)
    if worker.size > 1:
        _require_divided_so(module, at, shard, site)
    argument = _input_of(module, site, named=is_layer or site.point == "logits")
    return SiteModule(module, at.side, at.start, shard, argument, _add_up, is_layer)


def _input_of(module: Any, site: Site, *, named: bool) -> tuple[str, int]:
    """Name and place of the vectors among the arguments of a module's forward: the first one, if none is named so.

    named: one must be, since there are others, as of a layer
    """
    names = _arguments(type(module))
    if names and named and _VECTORS not in names:
        raise UnsupportedHost(
            f"this vLLM calls the module behind {site} otherwise than expected: with {', '.join(names)}, and no "
            f"{_VECTORS}"
        )
    position = names.index(_VECTORS) if _VECTORS in names else 0
    return names[position] if names else _VECTORS, position


def _arguments(module_class: type[Any]) -> tuple[str, ...]:
    """The names of a forward's arguments; none where it takes any, as that of a module which is edited already."""
    parameters = inspect.signature(module_class.forward).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters.values())
    return () if takes_any else tuple(name for name in parameters if name != "self")


def _add_up(module: Any, adds: bool) -> None:
    module.reduce_results = adds


def _require_divided_so(module: Any, at: ModuleSide, shard: Shard, site: Site) -> None:
    """UnsupportedHost if a projection has another part of a vector, or of a sum, than edits at the site expect."""
    if at.side == "input":
        found = optional(module, "RowParallelLinear.input_size_per_partition")
    else:
        found = optional(module, "ColumnParallelLinear.output_size_per_partition")
    fits = found is None or (found == shard.width if at.start is None else at.start + shard.width <= found)
    if not fits:
        why = f"expected {shard.width} numbers in each worker, found {found}"
    elif at.side == "output" and not optional(module, "RowParallelLinear.reduce_results", True):
        why = "expected the whole vector in each worker, found a part of a sum"
    else:
        return
    raise UnsupportedHost(
        f"this vLLM divides {site} among workers in an unexpected way: {why}. Start with --tensor-parallel-size 1"
    )
