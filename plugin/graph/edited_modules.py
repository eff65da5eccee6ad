"""The modules of the model that edits sit around, inside the compiled graph.

A module stays the same object with the same parameters; only its class becomes a subclass whose forward applies the
edits around the original one (as torch's own parametrization does). So weight names, isinstance checks and the
reloading of weights work as before. Slot tensors are in a child module named `edits` and never change their address.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from vllm_edits.plugin.graph.site_edits import SiteEdits
from vllm_edits.plugin.graph.step import Step
from vllm_edits.plugin.graph.tensor_parallel import AllReduce, identity


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
