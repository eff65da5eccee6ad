"""The modules of the model that edits sit around, inside the compiled graph.

A module stays the same object with the same parameters; only its class becomes a subclass whose forward applies the
edits around the original one (as torch's own parametrization does). So weight names, isinstance checks and the
reloading of weights work as before. Slot tensors are in a child module named `edits` and never change their address.

A worker may have the edits of two reservations at once: those that serve, and those that take their place when the
reservation grows. Only one of them is attached.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from vllm_edits.edit_store.errors import UnsupportedHost
from vllm_edits.plugin.graph.site_edits import SiteEdits
from vllm_edits.plugin.graph.step import Step
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, identity

_EDITS = "edits"
"""the name of the edits among a module's children"""


class ModuleEdits(nn.Module):
    """The edits around one module: of its input, and of its output or parts of it."""

    def __init__(self, argument: str, position: int) -> None:
        super().__init__()
        self.argument, self.position = argument, position
        """name and position of the input among the forward's arguments"""
        self.before: SiteEdits | None = None
        self.within: SiteEdits | None = None
        """on this worker's part of an output that is the sum of all workers' parts"""
        self.sum: AllReduce = identity
        """makes that sum in the module's place"""
        self.after = nn.ModuleList()
        self.starts: list[int | None] = []

    def edited_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the module's forward, its input edited."""
        if self.before is None:
            return args, kwargs
        if self.argument in kwargs:
            return args, {**kwargs, self.argument: self.before.edited(kwargs[self.argument], None)}
        value = self.before.edited(args[self.position], None)
        return (*args[: self.position], value, *args[self.position + 1 :]), kwargs

    def edited_output(self, output: Any, *, stream: bool) -> Any:
        """The result of the module's forward, edited; of the two halves of a residual stream, one is edited."""
        if not isinstance(output, tuple):
            return self._edited_parts(output)
        first, *rest = output
        if stream and isinstance(rest[0], Tensor):
            for site_edits, _ in self._outputs():
                first = site_edits.edited_stream(first, rest[0])
            return first, *rest
        return self._edited_parts(first), *rest

    def _edited_parts(self, output: Tensor) -> Tensor:
        if self.within is not None:
            output = self.sum(self.within.edited(output, None))
        for site_edits, start in self._outputs():
            output = site_edits.edited(output, start)
        return output

    def _outputs(self) -> Iterator[tuple[Any, int | None]]:
        return zip(self.after, self.starts, strict=True)


class LogitsEdits(nn.Module):
    """The edits of the logits, which are computed outside the graph, for the tokens that `rows` names."""

    def __init__(
        self, site_edits: SiteEdits, step: Step, rows: Callable[[Tensor], Tensor | None], argument: str, position: int
    ) -> None:
        """argument, position: name and place of the hidden states among the arguments of what computes logits."""
        super().__init__()
        self.argument, self.position = argument, position
        self.site_edits = site_edits
        self._whole_step = step
        self._rows = rows

    def edited(self, logits: Tensor | None, hidden: Tensor) -> Tensor | None:
        """The logits of the tokens whose hidden states are `hidden`, edited."""
        rows = self._rows(hidden)
        if logits is None or rows is None:
            return logits
        self.site_edits.step.slots = self._whole_step.slots[rows]
        self.site_edits.step.token_scales = self._whole_step.token_scales[rows]
        self.site_edits.supply(hidden)
        return self.site_edits.edited(logits, None)


@functools.cache
def edited_logits(cls: type[Any]) -> type[nn.Module]:
    """A subclass of vLLM's logits processor whose logits are edited."""

    class EditedLogits(cls):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            named = self.edits.argument in kwargs
            hidden = kwargs[self.edits.argument] if named else args[self.edits.position]
            return self.edits.edited(super().forward(*args, **kwargs), hidden)

    return EditedLogits


@functools.cache
def edited_class(cls: type[Any], *, stream: bool) -> type[nn.Module]:
    """A subclass of a module's class with edits around its forward; `stream`: of a decoder layer."""

    class Edited(cls):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.edits.edited_input(args, kwargs)
            return self.edits.edited_output(super().forward(*args, **kwargs), stream=stream)

    Edited.__name__ = Edited.__qualname__ = f"Edited{cls.__name__}"
    return Edited


class EditedModules:
    """The edits around all modules of a model: attached together, and detached together."""

    def __init__(self) -> None:
        self.partial: dict[nn.Module, Callable[[Any, bool], None]] = {}
        """modules that do not add up the workers' parts while edits are attached, each with what tells it so"""
        self._edits: dict[nn.Module, tuple[ModuleEdits | LogitsEdits, Callable[[Any], type[nn.Module]]]] = {}
        """edits around each module, and the function from its class to the class with edits"""
        self._plain: dict[nn.Module, type[nn.Module]] = {}
        """the class of each module without edits, while they are attached"""

    def of(self, module: nn.Module, site: str, argument: tuple[str, int], *, stream: bool) -> ModuleEdits:
        """The edits around the module of a site; `stream`: it is a decoder layer."""
        if module not in self._edits:
            if "forward" in vars(module):
                raise UnsupportedHost(
                    f"the module behind {site} has a forward of its own, which edits would not be part of"
                )
            self._edits[module] = ModuleEdits(*argument), functools.partial(edited_class, stream=stream)
        edits: Any = self._edits[module][0]
        found: ModuleEdits = edits
        return found

    def logits(self, module: nn.Module, edits: LogitsEdits) -> None:
        """Put edits around the module that computes logits."""
        self._edits[module] = edits, edited_logits

    def attach(self, instead_of: Mapping[nn.Module, nn.Module]) -> None:
        """Exchange the modules' classes. instead_of: copies of modules that get the edits in their place."""
        for original, (edits, with_edits) in self._edits.items():
            module: Any = instead_of.get(original, original)
            self._plain[module] = module.__class__
            module.edits, module.__class__ = edits, with_edits(module.__class__)
        for original, add_up in self.partial.items():
            add_up(instead_of.get(original, original), False)

    def plain_copies(self, root: nn.Module) -> dict[nn.Module, nn.Module]:
        """Copies of a module and all modules in it, by original: without edits, with the same parameters."""
        copies: dict[nn.Module, nn.Module] = {}

        def copied(module: Any) -> nn.Module:
            if module not in copies:
                other: Any = copy.copy(module)
                copies[module], plain = other, self._plain.get(module)
                other.__class__ = plain or module.__class__
                vars(other)["_modules"] = {
                    name: child if child is None else copied(child) for name, child in vars(module)["_modules"].items()
                    if plain is None or name != _EDITS
                }  # fmt: skip
            return copies[module]

        copied(root)
        for module, add_up in self.partial.items():
            add_up(copies[module], True)
        return copies

    def detach(self) -> None:
        """Make the modules what they were."""
        for module, plain in self._plain.items():
            module.__class__ = plain
            delattr(module, _EDITS)
        self._plain.clear()
        for module, add_up in self.partial.items():
            add_up(module, True)
