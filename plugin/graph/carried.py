"""Tensors on their way from one module to a later one, inside the compiled graph."""

from __future__ import annotations

from torch import Tensor


class Carried:
    """Tensors that one module hands to a later one within a forward pass, by name; empty after it.

    They are attributes. A compiled forward writes back its changes of objects that outlive it. vLLM takes a dictionary
    that is written back for a changed buffer, and refuses that where CUDA graphs are captured. An attribute that is
    None before and None after costs one assignment.
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
