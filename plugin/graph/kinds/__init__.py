"""Each kind of edit, applied to a batch of tokens that each belong to their own slot: a module for each. Plain torch,
which torch's compiler fuses.

A module defines the kind's `SlotTensors` and ends in `register`. Modules in this folder are found without a list.

Every function returns the vector that an edit adds, in float32: a long dot product in bfloat16 loses too much. Slot 0
is the base model. Its tensors are zeros, so it adds exactly zero, and its tokens stay as they are but for the sign of a
zero. Gathering by slot costs the same for any number of slots.

Shapes: T tokens, S slots, K rank, I and O width of what is read and written; `slots` is [T], values are [T, width].
Where a worker has a part of the vector that is read, `total` adds up all workers' parts of the dot products. `products`
multiplies tokens with the vectors of their slots.
"""

from __future__ import annotations

from vllm_edits.edit_store.edits import Edit
from vllm_edits.edit_store.kinds import KINDS
from vllm_edits.edit_store.registry import Registry, import_modules
from vllm_edits.plugin.graph.slot_tensors import SlotTensors

SLOT_TENSORS: Registry[type[SlotTensors]] = Registry("slot tensors of kind")
"""Slot tensors by the name of the kind."""


def register(kind: type[Edit], tensors: type[SlotTensors]) -> None:
    """Make a kind's slot tensors known. ValueError when it has others, or its stage is computed in another way."""
    for name, others in SLOT_TENSORS.items():
        other = KINDS[name]
        if other.order.stage == kind.order.stage and (others.stage, other.in_turn) != (tensors.stage, kind.in_turn):
            raise ValueError(f"kinds {name} and {kind.name()} share stage {kind.order.stage}, and compute it otherwise")
    SLOT_TENSORS.add(kind.name(), tensors)


import_modules(__name__, __path__)
