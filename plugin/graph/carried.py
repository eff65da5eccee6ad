"""Tensors on their way from one module to a later one, inside the compiled graph."""

from __future__ import annotations

from torch import Tensor


class Carried:
    """Tensors that one module hands to a later one within a forward pass, by name; after it there are none.

    They are attributes. A compiled forward writes back what it changed of objects that outlive it, and a dictionary
    that is written back is for vLLM a changed buffer, which it refuses where CUDA graphs are captured. An attribute
    that is None before and None after costs one assignment.
    """

    def keep(self, name: str, value: Tensor) -> None:
        """Carry a tensor."""
        setattr(self, _attribute(name), value)

    def get(self, name: str) -> Tensor:
        """A tensor that was kept in this forward pass."""
        value: Tensor = getattr(self, _attribute(name))
        return value

    def drop(self, name: str) -> None:
        """Carry it no further."""
        setattr(self, _attribute(name), None)


def _attribute(name: str) -> str:
    return "of_" + name.replace(".", "_")
