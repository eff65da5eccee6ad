"""A transformers model edited by the formulas of the kinds: forward hooks, nothing fused, no slots.

The authoring methods compute with it, and the served engine is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_edits.edit_store.architectures import Architecture, supported
from vllm_edits.edit_store.authoring.formulas import FORMULAS, Numbers
from vllm_edits.edit_store.base_model import widths_of
from vllm_edits.edit_store.edits import Edit, order_at_site
from vllm_edits.edit_store.scope import Scope
from vllm_edits.edit_store.sites import Site


@dataclass(frozen=True)
class FormulaRequest:
    """Input of the model: one whole sequence, of which the first `prompt` tokens are the prompt."""

    ids: Sequence[int]
    prompt: int

    def covered(self, scope: Scope) -> Tensor:
        """Tokens for which an edit of this scope counts, `[tokens, 1]`."""
        met = torch.from_numpy(scope.covers(np.arange(len(self.ids)), self.prompt))
        if scope.tokens is not None:
            met = met & torch.isin(torch.tensor(list(self.ids)), torch.tensor(scope.tokens))
        return met.unsqueeze(-1)


@contextmanager
def edited(
    model: Any,
    edits: Iterable[tuple[Edit, Mapping[str, Any]]],
    *,
    strength: float = 1.0,
    request: FormulaRequest | None = None,
) -> Iterator[None]:
    """Edit `model` inside a with statement; after it, it is the base model again.
    Computed in float32, or the model's dtype if that is wider; each site rounds once to the model's dtype. Edits that
    meet at one site apply in the order that their kinds declare. Edits with a scope need the `request`, given
    to the model as one sequence without a cache.
    """
    pairs = sorted(edits, key=lambda pair: order_at_site(pair[0]))
    seen: dict[str, Tensor] = {}
    sites = sorted({Site.parse(name) for edit, _ in pairs for name in (edit.site, edit.source)})
    with ExitStack() as hooks:
        for site in sites:
            here = _AtSite(
                [(edit, _tensors(fields)) for edit, fields in pairs if edit.site == str(site)], strength, request
            )

            def change(value: Tensor, here: _AtSite = here, site: Site = site) -> Tensor:
                seen[str(site)] = value = here.apply(value, seen)
                return value

            hooks.callback(hook(model, site, change).remove)
        yield


def _tensors(fields: Mapping[str, Any]) -> Numbers:
    return {name: torch.as_tensor(array) for name, array in fields.items()}


@dataclass(frozen=True)
class _AtSite:
    """The edits of one site, in their order."""

    edits: Sequence[tuple[Edit, Numbers]]
    strength: float
    request: FormulaRequest | None

    def apply(self, value: Tensor, seen: Mapping[str, Tensor]) -> Tensor:
        """`value` `[..., width]` after the edits; `seen` is what passed other sites of this forward pass."""
        if not self.edits:
            return value
        now = value.to(torch.promote_types(value.dtype, torch.float32))
        for _, stage in groupby(self.edits, key=lambda pair: pair[0].order.stage):
            now = self._after(list(stage), now, seen)
        return now.to(value.dtype)

    def _after(self, edits: Sequence[tuple[Edit, Numbers]], before: Tensor, seen: Mapping[str, Tensor]) -> Tensor:
        """The vector after the edits of one stage."""
        now, counted = before, dict[str, list[tuple[Edit, Tensor]]]()
        for edit, fields in edits:
            here = now if edit.in_turn else before
            x = here if edit.source == edit.site else seen[edit.source].to(now.dtype)
            scale = self._token_scale(edit)
            now = now + scale * FORMULAS[edit.kind].added(edit, _widened(fields, now.dtype), x, now)
            counted.setdefault(edit.kind, []).append((edit, scale))
        for kind, pairs in counted.items():
            now = FORMULAS[kind].settled(pairs, before, now)
        return now

    def _token_scale(self, edit: Edit) -> Tensor:
        """Factor by which the edit counts: a number, or one for each token."""
        if edit.scope.everything:
            return torch.tensor(self.strength)
        if self.request is None:
            raise ValueError(f"{edit.kind} at {edit.site} has a scope: say which request the model is given")
        return self.request.covered(edit.scope) * self.strength


def _widened(fields: Numbers, dtype: torch.dtype) -> Numbers:
    return {name: field.to(dtype) if field.is_floating_point() else field for name, field in fields.items()}


def architecture_of(model: Any) -> Architecture:
    """The table's entry for a transformers model."""
    return supported(type(model).__name__)


def hook(model: Any, site: Site, change: Callable[[Tensor], Tensor | None]) -> Any:
    """Call `change` with a site's vector `[..., width]` in every forward pass; what it returns goes on.

    None changes nothing. Undo with `.remove()`.
    """
    architecture, widths = architecture_of(model), widths_of(model.config.to_dict())
    root = model if site.layer is None else model.get_submodule(architecture.layer_path(site.layer))
    modules = dict(root.named_modules())
    at = architecture.side_of(site.point, widths, modules.__contains__)
    width = widths.of(site.point)

    def changed(tensor: Tensor) -> Tensor:
        part = tensor if at.start is None else tensor[..., at.start : at.start + width]
        apart = part.shape[-1] != width  # QK-norms see heads apart: [..., heads, head_dim]
        if apart and architecture.heads_first:
            part = part.transpose(-3, -2)
        new = change(part.flatten(-2) if apart else part)
        if new is None:
            return tensor
        if apart:
            new = new.reshape(part.shape)
            return new.transpose(-3, -2) if architecture.heads_first else new
        if at.start is None:
            return new
        return torch.cat([tensor[..., : at.start], new, tensor[..., at.start + width :]], dim=-1)

    around = _before if at.side == "input" else _after
    return around(modules[at.path], changed)


def weight_of(model: Any, site: Site) -> Tensor:
    """The rows [width, in] of the projection whose output is at a site. ValueError for any other site."""
    architecture, widths = architecture_of(model), widths_of(model.config.to_dict())
    modules = dict(model.get_submodule(architecture.layer_path(site.layer or 0)).named_modules())
    at = architecture.side_of(site.point, widths, modules.__contains__)
    weight = getattr(modules[at.path], "weight", None)
    if at.side != "output" or weight is None or weight.ndim != 2:
        raise ValueError(f"{site} is not the output of a projection")
    rows: Tensor = weight.T if architecture.transposed else weight
    return rows if at.start is None else rows[at.start : at.start + widths.of(site.point)]


def _before(module: nn.Module, changed: Callable[[Tensor], Tensor]) -> Any:
    def change_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}
        return (changed(args[0]), *args[1:]), kwargs

    return module.register_forward_pre_hook(change_input, with_kwargs=True)


def _after(module: nn.Module, changed: Callable[[Tensor], Tensor]) -> Any:
    def change_output(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return changed(output)
        if isinstance(output, tuple):
            return changed(output[0]), *output[1:]
        output.logits = changed(output.logits)
        return output

    return module.register_forward_hook(change_output)


def decoder_of(model: Any) -> Any:
    """The model without its output head."""
    return model.get_submodule(architecture_of(model).decoder)


def own_layers(model: Any) -> nn.ModuleList:
    """The model's decoder layers."""
    layers: nn.ModuleList = getattr(decoder_of(model), architecture_of(model).layers)
    return layers
