"""A transformers model edited by the formulas of `vllm_edits.edit_store.edits`: forward hooks, nothing fused, no slots.

The authoring methods see an edited model through it, and the served engine is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_edits.edit_store.architectures import Architecture, supported
from vllm_edits.edit_store.base_model import widths_of
from vllm_edits.edit_store.edits import Edit, order_at_site
from vllm_edits.edit_store.kinds.gate import Gate
from vllm_edits.edit_store.kinds.low_rank import LowRank
from vllm_edits.edit_store.kinds.offset import Offset
from vllm_edits.edit_store.kinds.scale import Scale
from vllm_edits.edit_store.kinds.subspace_filter import SubspaceFilter
from vllm_edits.edit_store.kinds.weight_delta import WeightDelta
from vllm_edits.edit_store.scope import Scope
from vllm_edits.edit_store.sites import Site


@dataclass(frozen=True)
class Request:
    """What the model is given: one whole sequence, of which the first `prompt` tokens are the prompt."""

    ids: Sequence[int]
    prompt: int

    def covered(self, scope: Scope) -> Tensor:
        """`[tokens, 1]`: for which tokens an edit of this scope counts."""
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
    request: Request | None = None,
) -> Iterator[None]:
    """Inside, `model` computes with these edits; afterwards it is the base model again.

    Computed in float32, or the model's dtype if that is wider; each site rounds once to the model's dtype. Edits that
    meet at one site apply in the order that edit_store/edits.py lays down. Edits with a scope need the `request`, given
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


def _tensors(fields: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(array) for name, array in fields.items()}


@dataclass(frozen=True)
class _AtSite:
    """The edits of one site, in their order."""

    edits: Sequence[tuple[Edit, dict[str, Tensor]]]
    strength: float
    request: Request | None

    def apply(self, value: Tensor, seen: Mapping[str, Tensor]) -> Tensor:
        """`value` `[..., width]` after the edits; `seen` is what passed other sites of this forward pass."""
        if not self.edits:
            return value
        wide = torch.promote_types(value.dtype, torch.float32)
        now = value.to(wide)
        before_adding, before_moving, renorm = None, None, torch.tensor(False)
        for edit, fields in self.edits:
            numbers = {name: field.to(wide) if field.is_floating_point() else field for name, field in fields.items()}
            if isinstance(edit, WeightDelta):
                now = now + self._weight(edit) * _delta(edit, numbers, seen[edit.source].to(wide), now)
            elif isinstance(edit, LowRank | Gate):
                before_adding = now if before_adding is None else before_adding
                x = before_adding if edit.source == edit.site else seen[edit.source].to(wide)
                now = now + self._weight(edit) * _added(edit, numbers, x)
            elif isinstance(edit, Scale):
                factor = numbers["factor"].repeat_interleave(now.shape[-1] // len(numbers["factor"]))
                now = now + self._weight(edit) * (factor - 1) * now
            elif isinstance(edit, SubspaceFilter):
                inside = ((now - numbers["mean"]) @ numbers["basis"].T) @ numbers.get("dual", numbers["basis"])
                filtered = numbers["mean"] + inside if edit.onto else now - inside
                now = now + self._weight(edit) * (filtered - now)
            elif isinstance(edit, Offset):
                before_moving = now if before_moving is None else before_moving
                now = now + self._weight(edit) * numbers["vector"]
                renorm = renorm | (edit.renorm & (self._weight(edit) != 0))
        if before_moving is not None:
            kept = now * before_moving.norm(dim=-1, keepdim=True) / now.norm(dim=-1, keepdim=True)
            now = torch.where(renorm, kept, now)
        return now.to(value.dtype)

    def _weight(self, edit: Edit) -> Tensor:
        """How much the edit counts: a number, or one for each token."""
        if edit.scope.everything:
            return torch.tensor(self.strength)
        if self.request is None:
            raise ValueError(f"{edit.kind} at {edit.site} has a scope: say which request the model is given")
        return self.request.covered(edit.scope) * self.strength


def _added(edit: LowRank | Gate, numbers: dict[str, Tensor], x: Tensor) -> Tensor:
    if isinstance(edit, LowRank):
        return (x @ numbers["read"].T) @ numbers["write"]
    if edit.normalise:
        on_sphere = (x - numbers["norm_bias"]) / numbers["norm_weight"] / x.shape[-1] ** 0.5 - numbers["centroid"]
        x = on_sphere / on_sphere.norm(dim=-1, keepdim=True)
    z = x @ numbers["read"].T + numbers["bias"]
    return _ACTIVATIONS[edit.activation](z, edit.threshold) @ numbers["write"]


def _delta(edit: WeightDelta, numbers: dict[str, Tensor], x: Tensor, now: Tensor) -> Tensor:
    if edit.layout == "dense":
        return x @ numbers["delta"].T
    parts = x[..., numbers["columns"]] * numbers["values"]
    return torch.zeros_like(now).index_add(-1, numbers["rows"], parts)


_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, _: torch.relu(z),
    "jump_relu": lambda z, threshold: z * (z > threshold),
    "step": lambda z, threshold: (z > threshold).to(z.dtype),
    "silu": lambda z, _: torch.nn.functional.silu(z),
    "sigmoid": lambda z, _: torch.sigmoid(z),
}


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
